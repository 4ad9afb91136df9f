from __future__ import annotations

import subprocess
import sys

import pytest

from flash_attention_registry import (
    FamilyUnavailableError,
    HandleError,
    ImplUnavailableError,
    Registry,
    RegistryWarning,
    RestoreError,
    default_registry,
)
from flash_attention_testkit import FakeHandle, FakeProvider


@pytest.fixture
def registry(fresh_flash_attention_registry: Registry) -> Registry:
    return fresh_flash_attention_registry


def test_a_handle_counts_its_removals_and_raises_only_if_it_is_told_to() -> None:
    handle = FakeHandle()
    handle.remove()
    handle.remove()
    assert (handle.removals, handle.removed) == (2, True)

    stuck = FakeHandle(OSError("stuck"))
    with pytest.raises(OSError, match="stuck"):
        stuck.remove()
    assert (stuck.removals, stuck.removed) == (1, False)


def test_a_provider_runs_from_its_activation_to_its_removal(registry: Registry) -> None:
    provider = FakeProvider("fake")
    provider.register(registry)
    assert (provider.runs, provider.calls) == (False, [])

    registry.activate("fake")
    assert provider.runs
    registry.restore()

    assert not provider.runs
    assert provider.calls == ["availability", "prepare", "register_fn", "remove"]
    assert [handle.removals for handle in provider.handles] == [1]


def test_a_shared_log_tells_the_order_among_providers(registry: Registry) -> None:
    log: list[str] = []
    for name in "ab":
        FakeProvider(name, log=log).register(registry)
        registry.activate(name)

    assert log == [
        *("a: availability", "a: prepare", "a: register_fn"),
        *("b: availability", "b: prepare", "a: remove", "b: register_fn"),
    ]


def test_family_and_priority_are_registered(registry: Registry) -> None:
    providers = [
        FakeProvider(name, family="F", priority=rank) for name, rank in (("a", 1), ("b", 2))
    ]
    for provider in providers:
        provider.register(registry)

    registry.activate("F")

    assert [provider.runs for provider in providers] == [False, True]
    assert providers[1].calls == ["availability", "recommended", "prepare", "register_fn"]


def test_without_a_registry_it_registers_with_the_one_of_the_process(
    flash_attention_registry_reset: Registry,
) -> None:
    FakeProvider("kit-fake").register()

    assert "kit-fake" in flash_attention_registry_reset.names()
    assert flash_attention_registry_reset is default_registry()


@pytest.mark.parametrize("step", ["prepare", "register_fn"])
@pytest.mark.parametrize(
    ("how", "error"), [(OSError("no kernels"), OSError), ("no kernels", RuntimeError)], ids=str
)
def test_a_step_that_fails_installs_nothing(
    registry: Registry, step, how: BaseException | str, error: type[Exception]
) -> None:
    provider = FakeProvider(fails={step: how})
    provider.register(registry)

    with pytest.raises(error, match="no kernels"):
        registry.activate("fake")

    assert (provider.runs, provider.calls[-1]) == (False, step)
    provider.mend()
    registry.activate("fake")
    assert provider.runs


@pytest.mark.parametrize("how", ["too old", OSError("too old")], ids=["reason", "exception"])
def test_an_unavailable_provider_is_asked_nothing_more(
    registry: Registry, how: BaseException | str
) -> None:
    provider = FakeProvider(fails={"availability": how})
    provider.register(registry)

    with pytest.raises(ImplUnavailableError, match="too old"):
        registry.activate("fake")

    assert provider.calls == ["availability"]


def test_a_provider_that_is_not_recommended_is_not_taken_for_its_family(registry: Registry) -> None:
    provider = FakeProvider(family="F", fails={"recommended": "slow here"})
    provider.register(registry)

    with pytest.raises(FamilyUnavailableError, match="slow here"):
        registry.activate("F")

    assert not provider.runs


def test_a_removal_can_be_made_to_fail_while_it_is_active(registry: Registry) -> None:
    provider = FakeProvider()
    provider.register(registry)
    registry.activate("fake")
    provider.fail("remove", OSError("stuck"))

    with pytest.raises(RestoreError, match="stuck"):
        registry.restore()

    assert provider.runs, "its kernels are still there"
    assert provider.calls[-1] == "remove"


def test_without_a_handle_its_kernels_go_on_running(registry: Registry) -> None:
    provider = FakeProvider(gives="nothing")
    provider.register(registry)
    registry.activate("fake")

    with pytest.warns(RegistryWarning, match="returned no handle"):
        registry.restore()

    assert provider.runs


def test_a_handle_can_lack_its_remove(registry: Registry) -> None:
    provider = FakeProvider(gives="handle without remove")
    provider.register(registry)

    with pytest.raises(HandleError, match="without a callable remove"):
        registry.activate("fake")


def test_what_there_is_not_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"no step 'install'; choose one of \['availability'"):
        FakeProvider(fails={"install": "x"})  # type: ignore[dict-item]  # refused in time
    with pytest.raises(ValueError, match="no step 'install'"):
        FakeProvider().mend("install")  # type: ignore[arg-type]  # refused in time
    with pytest.raises(ValueError, match=r"gives is 'a handle'; choose one of \['handle'"):
        FakeProvider(gives="a handle")  # type: ignore[arg-type]  # refused in time


def test_fakes_need_no_torch() -> None:
    code = (
        "import sys; from flash_attention_testkit import FakeEntryPoints, FakeProvider\n"
        "from flash_attention_registry import Registry\n"
        "FakeProvider().register(Registry()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
