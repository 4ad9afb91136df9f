"""What `FLASH_ATTENTION_IMPL` asks for: when it is activated, and what is said if it cannot be."""

from __future__ import annotations

import sys
import warnings

import pytest

from flash_attention_registry import (
    EnvironmentVariableError,
    ImplUnavailableError,
    ReentrantTransitionError,
    RegistryWarning,
    RequestUnavailableError,
    RestoreError,
    activate_requested_flash_attention_impl,
    environment,
)


def unavailable(registry, name, reason):
    registry.register(name, register_fn=lambda: None, availability=lambda: reason)


def never(*_):
    pytest.fail("nothing is to be awaited")


# On demand


def test_what_is_asked_for_is_activated_on_demand(abc, asked, kernels):
    asked("a")
    abc.request.activate()
    assert (abc.current(), kernels.running, abc.request.pending) == ("a", "a", ())


def test_on_demand_it_may_need_cuda(abc, asked):
    asked("c")
    abc.request.activate()
    assert abc.current() == "c"


def test_nothing_happens_if_nothing_is_asked_for(ab, kernels):
    ab.request.activate()
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_the_public_function_says_what_is_active_then(installed, asked, kernels):
    assert activate_requested_flash_attention_impl() is None
    installed.register("a", register_fn=kernels.installer("a"), family="letters")
    asked("letters")
    assert activate_requested_flash_attention_impl() == "a"


def test_native_restores_torchs_own_kernels_without_a_warning(ab, asked, kernels):
    asked("native")
    for _ in range(2):
        ab.request.activate()
        assert (ab.current(), kernels.running) == (None, "stock")


def test_the_first_that_can_be_activated_is(abc, asked, failing):
    unavailable(abc, "elsewhere", "needs another GPU")
    abc.register("broken", register_fn=failing(OSError("no kernels")))
    asked("nobody,elsewhere,broken,b,a")
    abc.request.activate()
    assert abc.current() == "b"


def test_native_as_the_last_resort_is_no_failure(ab, asked):
    asked("nobody,native")
    ab.request.activate()
    assert ab.current() is None


def test_if_none_can_be_the_error_gives_each_reason_and_nothing_changes(ab, asked, failing):
    unavailable(ab, "elsewhere", "needs another GPU")
    ab.register("broken", register_fn=failing(OSError("no kernels")))
    asked("nobody,elsewhere,broken")
    with pytest.raises(RequestUnavailableError) as caught:
        ab.request.activate()
    text = str(caught.value)
    assert "FLASH_ATTENTION_IMPL=nobody,elsewhere,broken asks for what cannot be" in text
    assert list(caught.value.reasons) == ["nobody", "elsewhere", "broken"]
    assert "Unknown flash attention impl 'nobody'" in caught.value.reasons["nobody"]
    assert "needs another GPU" in caught.value.reasons["elsewhere"]
    assert caught.value.reasons["broken"] == "no kernels"
    for name, reason in caught.value.reasons.items():
        assert f"\n  {name}: {reason}" in text
    assert isinstance(caught.value, ImplUnavailableError)
    assert isinstance(caught.value.__cause__, OSError)
    assert (ab.current(), ab.request.pending) == ("a", ())


def test_on_demand_a_value_that_cannot_be_understood_is_an_error(ab, asked):
    asked("a,,b")
    with pytest.raises(EnvironmentVariableError, match="empty place"):
        ab.request.activate()
    assert ab.current() == "a"


def test_what_is_disabled_is_not_activated(abc, asked, monkeypatch):
    monkeypatch.setenv(environment.DISABLE, "a")
    asked("a,b")
    abc.request.activate()
    assert abc.current() == "b"


def test_in_a_transition_it_is_refused(abc, asked, kernels):
    asked("b")
    abc.register("c", register_fn=kernels.installer("c"), prepare=abc.request.activate)
    with pytest.raises(ReentrantTransitionError, match="FLASH_ATTENTION_IMPL asks for"):
        abc.activate("c")


def test_a_remove_that_raises_is_no_reason_to_go_on_to_the_next_name(abc, asked, kernels):
    stuck = kernels.installer_with_stuck_handle("stuck", OSError("busy"))
    abc.register("stuck", register_fn=stuck)
    abc.activate("stuck")
    asked("a,b")
    with pytest.raises(RestoreError, match="busy"):
        abc.request.activate()
    assert abc.current() == "a"


# Values name what is installed or registered, and nothing else


@pytest.mark.parametrize(
    "value",
    [
        "innocent",
        "innocent:register",
        "innocent.register",
        "package.innocent",
        "./innocent.py",
        "{folder}/innocent.py",
        "innocent;import innocent",
        "innocent:register,package.innocent:register",
    ],
)
def test_a_value_that_looks_like_a_module_or_a_path_imports_nothing(abc, asked, site, value):
    (site.folder / "innocent.py").write_text("def register(): raise SystemExit('it was called')")
    (site.folder / "package").mkdir()
    (site.folder / "package" / "innocent.py").write_text("raise SystemExit('it was imported')")
    asked(value.format(folder=site.folder))
    before = set(sys.modules)
    with pytest.raises(RequestUnavailableError, match="Unknown flash attention impl"):
        abc.request.activate()
    assert {name for name in set(sys.modules) - before if "innocent" in name} == set()
    assert "package" not in sys.modules
    assert abc.current() is None


# At the end of `import torch`


def test_what_needs_no_cuda_is_activated_at_once(abc, asked):
    asked("a")
    abc.request.honour(never)
    assert (abc.current(), abc.request.pending) == ("a", ())


def test_without_a_request_nothing_is_activated_or_awaited(abc):
    abc.request.honour(never)
    assert (abc.current(), abc.request.pending) == (None, ())


def test_what_needs_cuda_is_pending_and_awaited(abc, asked, kernels):
    asked("nobody,c,b")
    awaited = []
    abc.request.honour(lambda *_: awaited.append(abc.request.pending))
    assert awaited == [("nobody", "c", "b")]
    assert abc.request.pending == ("nobody", "c", "b")
    assert (abc.current(), kernels.installed) == (None, [])


def test_it_is_awaited_once_though_awaiting_it_imports_what_resumes_it(abc, asked):
    asked("c")
    awaited = []

    def await_first_call(*_):
        awaited.append(1)
        abc.request.resume()

    abc.request.honour(await_first_call)
    assert (awaited, abc.request.pending) == ([1], ("c",))


def test_what_is_known_without_cuda_waits_for_nothing(abc, asked):
    asked("a,c")
    abc.request.honour(never)
    assert abc.current() == "a"


def failing_request(registry):
    unavailable(registry, "elsewhere", "needs another GPU")
    return "nobody,elsewhere"


def test_a_failure_is_one_warning_with_the_reasons(abc, asked):
    asked(failing_request(abc))
    with pytest.warns(RegistryWarning) as given:
        abc.request.honour(never)
    (warning,) = given
    text = str(warning.message)
    assert "Unknown flash attention impl 'nobody'" in text
    assert "needs another GPU" in text
    assert text.endswith("\nTorch's own attention kernels run.")
    assert (abc.current(), abc.request.pending) == (None, ())


def test_a_failure_does_not_raise_where_warnings_are_errors(abc, asked, caplog):
    asked(failing_request(abc))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        abc.request.honour(never)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("flash_attention_registry", "WARNING")
    assert "needs another GPU" in record.getMessage()


def test_a_failure_is_an_error_in_a_strict_environment(abc, asked):
    asked(failing_request(abc), strict="1")
    with pytest.raises(RequestUnavailableError, match="needs another GPU"):
        abc.request.honour(never)


def test_a_value_that_cannot_be_understood_is_a_warning(abc, asked):
    asked("a,,b")
    with pytest.warns(RegistryWarning, match=r"EnvironmentVariableError: .*empty place"):
        abc.request.honour(never)
    assert abc.current() is None


def test_a_value_that_cannot_be_understood_is_an_error_in_a_strict_environment(abc, asked):
    asked("a,,b", strict="yes")
    with pytest.raises(EnvironmentVariableError, match="empty place"):
        abc.request.honour(never)


@pytest.mark.parametrize("impl", ["", "a", "nobody"])
def test_strictness_that_cannot_be_understood_is_not_taken_for_yes(abc, asked, impl):
    asked(impl, strict="maybe")
    with pytest.warns(RegistryWarning, match=r"_STRICT='maybe' is neither yes nor no") as given:
        abc.request.honour(never)
    assert len(given) == 1
    assert abc.current() is None


@pytest.mark.parametrize("impl", ["", "a"])
def test_names_to_disable_that_cannot_be_read_are_a_warning(abc, asked, monkeypatch, impl):
    asked(impl)
    monkeypatch.setenv(environment.DISABLE, "b,,c")
    with pytest.warns(RegistryWarning, match=r"_DISABLE='b,,c' has an empty place") as given:
        abc.request.honour(never)
    assert len(given) == 1
    assert abc.current() is None


@pytest.mark.parametrize("impl", ["", "a"])
def test_they_are_an_error_in_a_strict_environment(abc, asked, monkeypatch, impl):
    asked(impl, strict="1")
    monkeypatch.setenv(environment.DISABLE, "b,,c")
    with pytest.raises(EnvironmentVariableError, match=r"_DISABLE='b,,c' has an empty place"):
        abc.request.honour(never)


def test_if_the_first_call_cannot_be_awaited_there_is_a_warning(abc, asked, failing):
    asked("c")
    with pytest.warns(RegistryWarning, match="RuntimeError: unknown schema"):
        abc.request.honour(failing(RuntimeError("unknown schema")))
    assert abc.request.pending == ()


def test_if_the_first_call_cannot_be_awaited_a_strict_environment_raises(abc, asked, failing):
    asked("c", strict="1")
    with pytest.raises(RuntimeError, match="unknown schema"):
        abc.request.honour(failing(RuntimeError("unknown schema")))


def test_what_the_program_activated_before_is_left_alone(ab, asked, kernels):
    asked("b")
    ab.request.honour(never)
    assert (ab.current(), ab.request.pending, kernels.removals) == ("a", (), [])


def a_family_whose_first_member_fails(registry, failing):
    fails = failing(OSError("no kernels"))
    registry.register("first", register_fn=fails, family="FA4", priority=2)
    registry.register("second", register_fn=lambda: None, family="FA4", priority=1)
    return "FA4"


@pytest.mark.parametrize("strict", ["", "1"])
def test_a_warning_that_a_filter_makes_an_error_is_no_failure(abc, asked, failing, caplog, strict):
    asked(a_family_whose_first_member_fails(abc, failing), strict=strict)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        abc.request.honour(never)
    assert abc.current() == "second"
    assert "Passed over 'first'" in caplog.text
    assert "Torch's own attention kernels run" not in caplog.text


def test_on_demand_such_a_warning_is_raised_as_what_it_is(abc, asked, failing):
    asked(a_family_whose_first_member_fails(abc, failing) + ",a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RegistryWarning, match="Passed over"):
            abc.request.activate()
    assert abc.current() == "second"
