"""Each completed transition is published, and nothing else."""

from __future__ import annotations

import pytest

from flash_attention_registry import RegistryWarning


@pytest.fixture
def seen(ab):
    """The transitions that a listener of `ab` has heard of."""
    transitions = []
    ab.add_listener(lambda before, after: transitions.append((before, after)))
    return transitions


def test_activation_and_restoration_are_published(ab, seen):
    ab.activate("b")
    ab.restore()
    ab.activate("a")
    ab.unregister("a")
    assert seen == [("a", "b"), ("b", None), (None, "a"), ("a", None)]


@pytest.mark.filterwarnings("ignore::flash_attention_registry.RegistryWarning")
def test_what_changes_nothing_is_not_published(ab, seen, failing):
    ab.register("c", register_fn=failing(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        ab.activate("c")
    with pytest.raises(ValueError, match="Unknown"):
        ab.activate("d")
    ab.activate("a")
    assert seen == []
    ab.restore()
    ab.restore()
    assert seen == [("a", None)]


def test_a_switch_to_a_newer_registration_of_the_same_name_is_published(ab, seen, kernels):
    ab.register("a", register_fn=kernels.installer("a2"))
    ab.activate("a")
    assert seen == [("a", "a")]


def test_listeners_see_the_new_state(ab):
    states = []
    ab.add_listener(lambda before, after: states.append(ab.current()))
    ab.activate("b")
    assert states == ["b"]


def test_a_removed_listener_hears_no_more(ab):
    heard = []
    handle = ab.add_listener(lambda before, after: heard.append(after))
    ab.activate("b")
    handle.remove()
    handle.remove()
    ab.activate("a")
    assert heard == ["b"]


def test_a_listener_may_remove_itself(ab):
    heard = []

    def once(before, after):
        heard.append(after)
        handle.remove()

    handle = ab.add_listener(once)
    ab.activate("b")
    ab.activate("a")
    assert heard == ["b"]


def test_a_listener_that_raises_disturbs_neither_the_transition_nor_the_others(ab, failing):
    heard = []
    ab.add_listener(lambda before, after: 1 / 0)
    ab.add_listener(lambda before, after: heard.append(after))
    with pytest.warns(RegistryWarning, match="listener.*ZeroDivisionError.*'a' to 'b'"):
        ab.activate("b")
    assert heard == ["b"]
    assert ab.current() == "b"


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupt_in_a_listener_is_raised_when_all_is_done_and_said(ab, kernels, interrupt):
    def interrupting(before, after):
        raise interrupt

    ab.register("s", register_fn=kernels.installer_with_stuck_handle("s", OSError("no")))
    ab.activate("s")
    heard = []
    ab.add_listener(interrupting)
    ab.add_listener(lambda before, after: 1 / 0)
    ab.add_listener(lambda before, after: heard.append((before, after)))
    with (
        pytest.warns(RegistryWarning, match="ZeroDivisionError"),
        pytest.raises(type(interrupt)) as caught,
    ):
        ab.activate("b")
    assert caught.value is interrupt
    assert "remove() of flash attention impl 's' raised OSError: no" in caught.value.__notes__[0]
    assert (ab.current(), heard) == ("b", [("s", "b")])


@pytest.mark.filterwarnings("ignore::flash_attention_registry.RegistryWarning")
def test_an_interrupt_in_a_listener_is_raised_although_the_transition_failed(
    registry, kernels, failing, fails_after
):
    registry.register("a", register_fn=fails_after(1, kernels.installer("a"), MemoryError()))
    registry.register("c", register_fn=failing(OSError("gone")))
    registry.activate("a")
    registry.add_listener(lambda *_: failing(KeyboardInterrupt())())
    with pytest.raises(KeyboardInterrupt) as caught:
        registry.activate("c")
    assert isinstance(caught.value.__context__, OSError)
    assert registry.current() is None
