"""Code that Inductor generates past the dispatcher is told of, from what decides about it."""

from __future__ import annotations

import sys
import types
import warnings

import pytest

from flash_attention_registry.sdpa import install, installed_kernel_sets, router
from flash_attention_registry.sdpa.overrides import why_bypassed

CONFIG = "torch._inductor.config"
VARIABLE = "TORCHINDUCTOR_CPP_WRAPPER"


def load_config(monkeypatch: pytest.MonkeyPatch, **settings: bool) -> None:
    module = types.ModuleType(CONFIG)
    vars(module).update(settings)
    monkeypatch.setitem(sys.modules, CONFIG, module)


@pytest.fixture(autouse=True)
def _no_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, CONFIG, raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)


def test_without_a_setting_nothing_is_bypassed() -> None:
    assert why_bypassed() is None


@pytest.mark.parametrize("value", ["", "0", "true"])
def test_a_value_that_inductor_does_not_take_for_yes_is_none(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert why_bypassed() is None


def test_the_variable_decides_before_inductor_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    reason = why_bypassed()
    assert reason is not None
    assert reason.startswith(f"{VARIABLE}=1 is set: ")
    assert "Switch it off to have it served" in reason


def test_a_config_that_is_being_loaded_does_not_decide_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_config(monkeypatch)
    assert why_bypassed() is None
    monkeypatch.setenv(VARIABLE, "1")
    assert why_bypassed() is not None


@pytest.mark.parametrize("value", ["0", "1"])
def test_inductors_config_decides_once_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    load_config(monkeypatch, cpp_wrapper=False)
    assert why_bypassed() is None
    load_config(monkeypatch, cpp_wrapper=True)
    reason = why_bypassed()
    assert reason is not None
    assert reason.startswith(f"{CONFIG}.cpp_wrapper is set: ")


def test_inductors_config_is_where_it_is_looked_for() -> None:
    """If this fails, torch has moved the setting: `why_bypassed` must learn where to."""
    from torch._inductor import config

    assert config.__name__ == CONFIG
    assert config.cpp_wrapper is False
    with config.patch(cpp_wrapper=True):
        sys.modules[CONFIG] = config
        assert why_bypassed() is not None


def test_an_installation_warns_of_it_at_the_line_that_installs(
    monkeypatch: pytest.MonkeyPatch, plain_kernels: type
) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    kernel_set = plain_kernels()
    with pytest.warns(RuntimeWarning, match="past the dispatcher") as given:
        install(kernel_set, "cpu")
    assert [warning.filename for warning in given] == [__file__]
    assert installed_kernel_sets() == {"cpu": kernel_set}


def test_where_warnings_are_errors_nothing_is_installed(
    monkeypatch: pytest.MonkeyPatch, plain_kernels: type
) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="past the dispatcher"):
            install(plain_kernels(), "cpu")
    assert installed_kernel_sets() == {}
    assert router._slots["cpu"].library is None
