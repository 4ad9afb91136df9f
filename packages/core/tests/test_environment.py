"""The environment variables: lists and booleans, parsed strictly; errors tell a way out."""

from __future__ import annotations

import pytest

from flash_attention_registry import EnvironmentVariableError, environment

BLANK = ["", " ", "\t"]
VARIABLES = (environment.IMPL, environment.STRICT, environment.DISABLE)

REQUESTS = {
    "a name": ("fa4-triton", ("fa4-triton",)),
    "space around it": ("  fa4-triton ", ("fa4-triton",)),
    "a list": ("fa4-cuda,FA4", ("fa4-cuda", "FA4")),
    "a list with space": (" fa4-cuda , FA4 ", ("fa4-cuda", "FA4")),
    "native": ("native", ("native",)),
    "native as the last resort": ("FA4,native", ("FA4", "native")),
    "one of torch's": ("torch:FA3", ("torch:FA3",)),
}


@pytest.mark.parametrize(("value", "names"), REQUESTS.values(), ids=REQUESTS)
def test_a_request_is_a_list_of_names_in_their_order(monkeypatch, value, names):
    monkeypatch.setenv(environment.IMPL, value)
    assert environment.requested() == names


@pytest.mark.parametrize("blank", BLANK)
def test_a_blank_value_is_none_at_all(monkeypatch, blank):
    for variable in VARIABLES:
        monkeypatch.setenv(variable, blank)
    assert environment.requested() == ()
    assert environment.strict() is False
    assert environment.disabled() == frozenset()
    assert environment.why_disabled("a", "FA4") is None


def test_without_the_variables_nothing_is_asked_for():
    assert environment.requested() == ()
    assert environment.strict() is False
    assert environment.disabled() == frozenset()
    assert environment.why_disabled("a", "FA4") is None


@pytest.mark.parametrize("read", [environment.requested, environment.disabled])
@pytest.mark.parametrize("value", [",", "a,", ",a", "a,,b", "a, ,b"])
def test_an_empty_place_in_a_list_is_an_error(monkeypatch, read, value):
    variable = environment.IMPL if read is environment.requested else environment.DISABLE
    monkeypatch.setenv(variable, value)
    with pytest.raises(EnvironmentVariableError, match="empty place") as caught:
        read()
    assert f"{variable}={value!r}" in str(caught.value)
    assert f"as in {variable}=" in str(caught.value)


@pytest.mark.parametrize("value", ["native,FA4", "a,native,b", "native,native"])
def test_what_follows_native_is_an_error(monkeypatch, value):
    monkeypatch.setenv(environment.IMPL, value)
    with pytest.raises(EnvironmentVariableError, match="would never be used") as caught:
        environment.requested()
    assert f"FLASH_ATTENTION_IMPL={value!r}" in str(caught.value)
    assert "Put 'native' last, or leave it out" in str(caught.value)


@pytest.mark.parametrize("value", ["1", "true", "yes", "on", "TRUE", "On", " 1 "])
def test_strict_can_be_set(monkeypatch, value):
    monkeypatch.setenv(environment.STRICT, value)
    assert environment.strict() is True


@pytest.mark.parametrize("value", ["0", "false", "no", "off", "False", " 0 "])
def test_strict_can_be_set_to_no(monkeypatch, value):
    monkeypatch.setenv(environment.STRICT, value)
    assert environment.strict() is False


@pytest.mark.parametrize("value", ["2", "y", "t", "enabled", "strict", "1,1", "01"])
def test_strict_is_no_guess(monkeypatch, value):
    monkeypatch.setenv(environment.STRICT, value)
    with pytest.raises(EnvironmentVariableError, match="neither yes nor no") as caught:
        environment.strict()
    assert f"FLASH_ATTENTION_IMPL_STRICT={value!r}" in str(caught.value)
    assert "Set it to 1" in str(caught.value)


def test_a_value_that_cannot_be_understood_is_a_value_error(monkeypatch):
    monkeypatch.setenv(environment.STRICT, "maybe")
    with pytest.raises(ValueError, match="maybe"):
        environment.strict()


def test_a_check_raises_for_none_of_the_variables_if_all_can_be_understood(monkeypatch):
    environment.check()
    for variable, value in zip(VARIABLES, ("a,native", "yes", "b,FA4"), strict=True):
        monkeypatch.setenv(variable, value)
    environment.check()


@pytest.mark.parametrize("wrong", [VARIABLES[:1], VARIABLES[1:2], VARIABLES[2:], VARIABLES])
def test_a_check_says_of_each_variable_what_is_the_matter(monkeypatch, wrong):
    for variable in wrong:
        monkeypatch.setenv(variable, "a,,b")
    with pytest.raises(EnvironmentVariableError) as caught:
        environment.check()
    lines = str(caught.value).splitlines()
    assert [line.partition("=")[0] for line in lines] == list(wrong)


def test_names_and_families_can_be_disabled(monkeypatch):
    monkeypatch.setenv(environment.DISABLE, "a, FA4")
    assert environment.disabled() == {"a", "FA4"}
    own = environment.why_disabled("a")
    assert own == "it is disabled by FLASH_ATTENTION_IMPL_DISABLE=a, FA4"
    of_family = environment.why_disabled("b", "FA4")
    assert of_family == "its family FA4 is disabled by FLASH_ATTENTION_IMPL_DISABLE=a, FA4"
    assert environment.why_disabled("b") is None
    assert environment.why_disabled("b", "FA3") is None


def test_names_are_compared_as_they_are_written(monkeypatch):
    monkeypatch.setenv(environment.DISABLE, "FA4,ab")
    assert environment.why_disabled("fa4") is None
    assert environment.why_disabled("a") is None


def test_each_question_reads_the_environment_anew(monkeypatch):
    assert environment.requested() == ()
    monkeypatch.setenv(environment.IMPL, "a")
    assert environment.requested() == ("a",)
    monkeypatch.setenv(environment.DISABLE, "a")
    assert environment.why_disabled("a") is not None
    monkeypatch.delenv(environment.DISABLE)
    assert environment.why_disabled("a") is None


@pytest.mark.parametrize("name", ["native", "a,b", "torch:FA4", "torch:"])
@pytest.mark.parametrize("what", ["impl", "family"])
def test_a_name_that_the_variables_could_not_ask_for_cannot_be_registered(registry, name, what):
    names = {"impl": name} if what == "impl" else {"impl": "a", "family": name}
    with pytest.raises(ValueError, match="must not be") as caught:
        registry.register(register_fn=lambda: None, **names)
    assert repr(name) in str(caught.value)
    assert ("family of flash attention impl 'a'" in str(caught.value)) == (what == "family")
    assert registry.names() == []
