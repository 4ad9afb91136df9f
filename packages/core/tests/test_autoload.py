"""The hook at the end of `import torch`, on stand-ins for what it reads of torch."""

from __future__ import annotations

import sys
import types
import warnings

import pytest

from flash_attention_registry import (
    EnvironmentVariableError,
    Registry,
    RegistryWarning,
    RequestUnavailableError,
    autoload,
    before_using_cuda,
    default,
)

GOOD = """
from flash_attention_registry import default
def register():
    default.register_flash_attention_impl("good", register_fn=lambda: None)
"""


@pytest.fixture
def process(site, torchs, monkeypatch):
    """The registry of a process in which torch is being imported and `good` is installed."""
    site.install("good_provider", GOOD, provides={"good": "good_provider:register"})
    registry = Registry(in_step_with_torch=True)
    monkeypatch.setattr(default, "_registry", registry)
    monkeypatch.setattr(autoload, "_called", False)
    return registry


@pytest.fixture
def router(monkeypatch):
    """Stands for the part that knows torch; its list holds what was awaited."""
    package = types.ModuleType("flash_attention_registry.sdpa")
    package.__all__ = []
    module = types.ModuleType("flash_attention_registry.sdpa.router")
    module.awaited = []
    module.await_first_call = lambda *given: module.awaited.append(given)
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_what_is_installed_is_listed_in_torchs_registry_without_being_imported(process, torchs):
    autoload.autoload()
    assert "good" in torchs._FLASH_ATTENTION_IMPLS
    assert (process.current(), torchs._FLASH_ATTENTION_ACTIVE) == (None, None)
    assert "good_provider" not in sys.modules


def test_what_is_asked_for_is_active_in_both(process, torchs, asked):
    asked("good")
    autoload.autoload()
    assert (process.current(), torchs._FLASH_ATTENTION_ACTIVE[0]) == ("good", "good")


def test_however_many_providers_call_it_it_acts_once(process, asked, kernels):
    process.register("mine", register_fn=kernels.installer("mine"))
    asked("mine")
    autoload.autoload()
    assert process.current() == "mine"
    process.restore()
    autoload.autoload()
    assert process.current() is None


def test_what_needs_cuda_is_settled_by_the_first_call_on_a_gpu(process, asked, router, kernels):
    process.register("gpu", register_fn=kernels.installer("gpu"), availability=before_using_cuda)
    asked("gpu")
    autoload.autoload()
    assert (process.current(), process.request.pending) == (None, ("gpu",))
    ((device_type, first),) = router.awaited
    assert device_type == "cuda"
    assert first() is True
    assert process.current() == "gpu"


def test_a_request_waits_if_torch_is_imported_by_the_part_that_knows_it(
    process, asked, router, kernels
):
    """`sdpa` imports torch in its first lines, and is of no use to a provider before its last."""
    process.register("gpu", register_fn=kernels.installer("gpu"), availability=before_using_cuda)
    asked("gpu")
    del sys.modules["flash_attention_registry.sdpa"].__all__
    autoload.autoload()
    assert (process.request.pending, router.awaited) == (("gpu",), [])
    sys.modules["flash_attention_registry.sdpa"].__all__ = []
    process.request.resume()
    assert len(router.awaited) == 1


def test_what_needs_no_cuda_does_not_load_the_part_that_knows_torch(process, asked, router):
    asked("good")
    autoload.autoload()
    assert router.awaited == []


def test_metadata_that_cannot_be_read_is_a_warning_and_stops_nothing(
    process, asked, kernels, monkeypatch, failing
):
    process.register("mine", register_fn=kernels.installer("mine"))
    asked("mine")
    unreadable = failing(OSError("unreadable"))
    monkeypatch.setattr(process.discovery, "entries", unreadable)
    with pytest.warns(RegistryWarning, match="cannot be listed: OSError: unreadable"):
        autoload.autoload()
    assert process.current() == "mine"


def test_nothing_is_raised_where_warnings_are_errors(process, asked, monkeypatch, failing, caplog):
    asked("nobody")
    monkeypatch.setattr(process, "show_to_torch", failing(OSError("unreadable")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autoload.autoload()
    listing, request = caplog.records
    assert "OSError: unreadable" in listing.getMessage()
    assert "'nobody'" in request.getMessage()
    assert {record.name for record in caplog.records} == {"flash_attention_registry"}


@pytest.mark.parametrize(
    ("value", "error"),
    [("nobody", RequestUnavailableError), ("good,,nobody", EnvironmentVariableError)],
)
def test_in_a_strict_environment_it_raises_what_is_the_matter(process, asked, value, error):
    asked(value, strict="1")
    with pytest.raises(error):
        autoload.autoload()


def test_a_warning_comes_from_the_line_outside_of_the_package(process, asked):
    asked("nobody")
    with pytest.warns(RegistryWarning) as given:
        autoload.autoload()
    assert given[0].filename == __file__
