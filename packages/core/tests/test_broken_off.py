"""What an interrupt of the registry's own code has broken off is completed by what comes next.

Here the state that an interrupt leaves is made up, one at a time; `test_interrupts` interrupts at
every step and looks at the result only.
"""

from __future__ import annotations

import pytest

from flash_attention_registry import RegistryWarning, slot
from flash_attention_registry.registration import Registration
from flash_attention_registry.scope import ImplScope
from flash_attention_registry.swap import Swap


@pytest.fixture
def heard(ab):
    """What a listener hears."""
    heard = []
    ab.add_listener(lambda before, after: heard.append((before, after)))
    return heard


def broken_off(registry, target):
    """A switch from what is active that has begun, and gone no further."""
    swap = registry._slot._swap = Swap(registry._slot.active, target)
    return swap


def go_on(registry):
    """Any transition, such as one that changes nothing."""
    registry.show_to_torch()
    assert registry._slot._swap is None


def test_before_the_removal_nothing_has_changed(ab, kernels, heard):
    broken_off(ab, ab.registration("b"))
    go_on(ab)
    assert (ab.current(), kernels.installed, heard) == ("a", ["a"], [])


def test_after_the_removal_the_previous_one_is_put_back(ab, kernels, heard):
    swap = broken_off(ab, ab.registration("b"))
    swap.removal().run(swap.previous.handle.remove)
    go_on(ab)
    assert (ab.current(), kernels.installed, heard) == ("a", ["a"], [])


def test_after_the_installation_the_new_one_is_active(ab, kernels, heard):
    swap = broken_off(ab, ab.registration("b"))
    swap.removal().run(swap.previous.handle.remove)
    swap.installation.run(swap.target.register_fn)
    go_on(ab)
    assert (ab.current(), kernels.installed, heard) == ("b", ["b"], [("a", "b")])


def test_after_the_removal_for_stock_nothing_is_active(ab, kernels, heard):
    swap = broken_off(ab, None)
    swap.removal().run(swap.previous.handle.remove)
    go_on(ab)
    assert (ab.current(), kernels.installed, heard) == (None, [], [("a", None)])


@pytest.mark.parametrize("handle", [object(), property()])
def test_what_gave_no_handle_is_not_taken_for_installed(ab, kernels, handle):
    swap = broken_off(ab, ab.registration("b"))
    swap.removal().run(swap.previous.handle.remove)
    swap.installation.run(lambda: handle)
    go_on(ab)
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_what_cannot_be_looked_at_is_no_handle(ab, kernels):
    class Odd:
        @property
        def remove(self):
            raise OSError("unreadable")

    swap = broken_off(ab, ab.registration("b"))
    swap.installation.run(Odd)
    go_on(ab)
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_a_way_back_that_has_been_made_is_not_made_again(ab, kernels):
    swap = broken_off(ab, ab.registration("b"))
    swap.removal().run(swap.previous.handle.remove)
    swap.way_back.run(swap.previous.registration.register_fn)
    go_on(ab)
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_a_way_back_that_has_failed_is_not_tried_again(ab, kernels, heard, failing):
    swap = broken_off(ab, ab.registration("b"))
    swap.removal().run(swap.previous.handle.remove)
    with pytest.raises(OSError, match="gone"):
        swap.way_back.run(failing(OSError("gone")))
    go_on(ab)
    assert (ab.current(), kernels.installed, heard) == (None, [], [("a", None)])


def test_a_way_back_that_fails_now_is_told_of(ab, kernels, fails_after):
    ab.register("c", register_fn=fails_after(1, kernels.installer("c"), OSError("gone")))
    ab.activate("c")
    swap = broken_off(ab, ab.registration("b"))
    swap.removal().run(swap.previous.handle.remove)
    with pytest.warns(RegistryWarning, match="could not be activated again") as given:
        go_on(ab)
    assert "failed with" not in str(given[0].message)
    assert (ab.current(), kernels.installed) == (None, [])


def test_an_interrupted_way_back_is_raised_although_something_else_failed_first(
    ab, kernels, failing, fails_after
):
    ab.register("c", register_fn=fails_after(1, kernels.installer("c"), KeyboardInterrupt()))
    ab.register("d", register_fn=failing(OSError("gone")))
    ab.activate("c")
    with pytest.warns(RegistryWarning, match="KeyboardInterrupt"), pytest.raises(KeyboardInterrupt):
        ab.activate("d")
    assert (ab.current(), kernels.installed) == (None, [])


class Interrupted(Registration):
    """Its installation is interrupted before its `register_fn` is called, or after that."""

    def install(self, call):
        if self.after:
            super().install(call)
        self.times -= 1
        if self.times == 0:
            raise KeyboardInterrupt
        if not self.after:
            super().install(call)


@pytest.mark.parametrize("after", [False, True])
def test_a_way_back_that_is_interrupted_by_the_way_goes_on(ab, kernels, failing, after):
    registration = Interrupted("c", register_fn=kernels.installer("c"))
    registration.after, registration.times = after, 2
    ab._catalogue.add(registration)
    ab.register("d", register_fn=failing(OSError("gone")))
    ab.activate("c")
    with pytest.raises(KeyboardInterrupt):
        ab.activate("d")
    assert (ab.current(), kernels.installed) == ("c", ["c"])


def test_a_handle_that_was_kept_as_stuck_is_kept_once(ab, failing):
    swap = broken_off(ab, ab.registration("b"))
    with pytest.raises(OSError, match="no"):
        swap.removal().run(failing(OSError("no")))
    ab._slot._keep_if_stuck(swap)
    go_on(ab)
    assert ab.stuck_handles() == (swap.previous.handle,)


def test_a_listener_that_an_interrupt_came_before_is_called(ab, heard, monkeypatch):
    class Call(slot.Call):
        interrupts = 1

        def run(self, *given):
            if Call.interrupts and given[1:] == ("a", "b"):
                Call.interrupts = 0
                raise KeyboardInterrupt
            super().run(*given)

    monkeypatch.setattr(slot, "Call", Call)
    with pytest.raises(KeyboardInterrupt):
        ab.activate("b")
    assert (ab.current(), heard) == ("b", [("a", "b")])


def test_a_scope_that_is_interrupted_on_leaving_is_left(ab, kernels, monkeypatch):
    leave, calls = ab.leave, []

    def interrupted_at_first(entry):
        calls.append(entry)
        if len(calls) == 1:
            raise KeyboardInterrupt
        leave(entry)

    monkeypatch.setattr(ab, "leave", interrupted_at_first)
    with pytest.raises(KeyboardInterrupt), ImplScope(ab, "b"):
        pass
    assert (ab.current(), kernels.installed) == ("a", ["a"])
