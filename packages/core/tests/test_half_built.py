"""What a `register_fn` had installed before it failed is removed again."""

from __future__ import annotations

import threading

import pytest

from flash_attention_registry import HandleError, Registry, RegistryWarning
from flash_attention_registry.discovery import Discovery
from flash_attention_registry.half_built import undo_on_failure


@pytest.fixture
def install(kernels):
    """Installs kernels of a name as a library does that leaves word of how to undo it."""

    def install(name):
        undo_on_failure(lambda: name in kernels.installed and kernels.installed.remove(name))
        return kernels.installer(name)()

    return install


@pytest.fixture
def install_and(install):
    """Makes a `register_fn` that installs kernels, and then does something."""
    return lambda name, then: lambda: (install(name), then())[1]


@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt()])
def test_of_a_register_fn_that_raises(ab, kernels, install_and, failing, error):
    ab.register("half", register_fn=install_and("half", failing(error)))
    with pytest.raises(type(error)):
        ab.activate("half")
    assert (ab.current(), kernels.installed) == ("a", ["a"])
    ab.restore()
    with pytest.raises(type(error)):
        ab.activate("half")
    assert (ab.current(), kernels.installed) == (None, [])


def test_of_a_register_fn_that_returns_no_handle(ab, kernels, install_and):
    ab.register("half", register_fn=install_and("half", object))
    with pytest.raises(HandleError, match="'half'"):
        ab.activate("half")
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_of_a_member_of_a_family_before_the_next_is_tried(registry, kernels, install_and, failing):
    half = install_and("half", failing(OSError("gone")))
    registry.register("half", register_fn=half, family="family", priority=1)
    registry.register("whole", register_fn=kernels.installer("whole"), family="family")
    with pytest.warns(RegistryWarning, match="gone"):
        registry.activate("family")
    assert (registry.current(), kernels.installed) == ("whole", ["whole"])


def test_of_a_way_back_that_fails(registry, kernels, install_and, failing, fails_after):
    then = fails_after(1, kernels.installer("whole"), OSError("second time"))
    registry.register("once", register_fn=install_and("half", then))
    registry.register("fails", register_fn=failing(OSError("gone")))
    registry.activate("once")
    kernels.installed.remove("half")
    with pytest.raises(OSError, match="gone"), pytest.warns(RegistryWarning, match="second time"):
        registry.activate("fails")
    assert (registry.current(), kernels.installed) == (None, [])


def test_the_latest_first_and_before_the_previous_one_is_back(ab, kernels):
    order = []

    def half():
        for number in (1, 2):
            undo_on_failure(lambda number=number: order.append((number, *kernels.installed)))
        raise OSError("gone")

    ab.register("half", register_fn=half)
    with pytest.raises(OSError, match="gone"):
        ab.activate("half")
    assert order == [(2,), (1,)]


def test_an_interrupt_does_not_keep_it_from_being_removed(ab, kernels, install, fails_after):
    undo = fails_after(0, bool, KeyboardInterrupt())

    def half():
        install("half")
        undo_on_failure(lambda: undo() if undo.calls == 0 else None)
        raise OSError("gone")

    ab.register("half", register_fn=half)
    with pytest.raises(KeyboardInterrupt):
        ab.activate("half")
    assert (undo.calls, ab.current(), kernels.installed) == (-1, "a", ["a"])


def test_what_has_given_its_handle_is_removed_by_that_alone(ab, kernels, failing):
    undone = []

    def whole():
        undo_on_failure(lambda: undone.append("whole"))
        return kernels.installer("whole")()

    ab.register("whole", register_fn=whole)
    ab.register("fails", register_fn=failing(OSError("gone")))
    ab.activate("whole")
    with pytest.raises(OSError, match="gone"):
        ab.activate("fails")
    ab.restore()
    assert (undone, kernels.installed) == ([], [])
    assert kernels.removals.count("whole") == 2


def test_nothing_is_kept_of_what_is_installed_by_hand(ab, kernels, install, failing):
    ab.register("fails", register_fn=failing(OSError("gone")))
    install("by hand")
    with pytest.raises(OSError, match="gone"):
        ab.activate("fails")
    assert sorted(kernels.installed) == ["a", "by hand"]


def test_another_thread_installs_for_itself(ab, kernels, install):
    def half():
        other = threading.Thread(target=install, args=("other's",))
        other.start()
        other.join()
        install("half")
        raise OSError("gone")

    ab.register("half", register_fn=half)
    with pytest.raises(OSError, match="gone"):
        ab.activate("half")
    assert sorted(kernels.installed) == ["a", "other's"]


def test_a_registry_inside_of_another_has_its_own(ab, kernels, install):
    inner = Registry(Discovery(prefix="nothing.is.declared.in.such.a.group"))
    inner.register("inner", register_fn=lambda: install("inner"))

    def half():
        install("before")
        inner.activate("inner")
        install("after")
        raise OSError("gone")

    ab.register("half", register_fn=half)
    with pytest.raises(OSError, match="gone"):
        ab.activate("half")
    assert sorted(kernels.installed) == ["a", "inner"]
    assert (ab.current(), inner.current()) == ("a", "inner")
