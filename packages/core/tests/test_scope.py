"""`use`: back to the previous implementation, whatever happened in between."""

from __future__ import annotations

import warnings

import pytest

from flash_attention_registry import RegistryWarning, RestoreError, UnknownImplError
from flash_attention_registry.scope import ImplScope


def test_the_scope_returns_to_the_previous_implementation(ab, kernels):
    with ImplScope(ab, "b") as name:
        assert (name, ab.current(), kernels.installed) == ("b", "b", ["b"])
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_the_scope_returns_to_stock(ab, kernels):
    ab.restore()
    with ImplScope(ab, "b"):
        pass
    assert (ab.current(), kernels.running) == (None, "stock")


def test_the_scope_gives_the_name_of_the_member_that_a_family_chose(registry, kernels):
    registry.register("one", register_fn=kernels.installer("one"), family="FA4")
    with ImplScope(registry, "FA4") as name:
        assert name == "one"


def test_the_scope_of_what_is_active_changes_nothing(ab, kernels):
    with ImplScope(ab, "a"):
        pass
    assert (ab.current(), kernels.removals) == ("a", [])


def test_an_error_in_the_block_passes_through(ab):
    with pytest.raises(ZeroDivisionError), ImplScope(ab, "b"):
        _ = 1 / 0
    assert ab.current() == "a"


@pytest.mark.parametrize("inside", ["activate", "restore", "previous again", "unregister own"])
def test_the_scope_undoes_what_the_block_did(ab, kernels, inside):
    ab.register("c", register_fn=kernels.installer("c"))
    with ImplScope(ab, "b"):
        if inside == "activate":
            ab.activate("c")
        elif inside == "restore":
            ab.restore()
        elif inside == "previous again":
            ab.activate("a")
        else:
            ab.unregister("b")
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_one_scope_may_be_nested_in_itself(ab):
    scope = ImplScope(ab, "b")
    with scope:
        ab.restore()
        with scope:
            assert ab.current() == "b"
        assert ab.current() is None
    assert ab.current() == "a"


@pytest.mark.parametrize("entries", [0, 1])
def test_leaving_more_often_than_entering_is_an_error_that_changes_nothing(ab, kernels, entries):
    scope = ImplScope(ab, "b")
    for _ in range(entries):
        with scope:
            pass
    removals = list(kernels.removals)
    with pytest.raises(RuntimeError, match=r"'b': it was left as often as it was entered.*'a' is"):
        scope.__exit__(None, None, None)
    assert (ab.current(), kernels.removals) == ("a", removals)
    with scope:
        assert ab.current() == "b"


def test_a_scope_that_cannot_be_entered_changes_nothing(ab, kernels):
    with pytest.raises(UnknownImplError), ImplScope(ab, "c"):
        pass
    assert (ab.current(), kernels.removals) == ("a", [])


def test_a_scope_whose_entry_fails_afterwards_goes_back(registry, kernels):
    registry.register("s", register_fn=kernels.installer_with_stuck_handle("s", OSError("no")))
    registry.register("b", register_fn=kernels.installer("b"))
    registry.activate("s")
    with pytest.raises(RestoreError), ImplScope(registry, "b"):
        pass
    assert (registry.current(), kernels.running) == ("s", "s")


def test_a_scope_whose_entry_warns_an_error_goes_back(registry, kernels):
    registry.register("n", register_fn=kernels.installer_without_handle("n"))
    registry.register("b", register_fn=kernels.installer("b"))
    registry.activate("n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RegistryWarning), ImplScope(registry, "b"):
            pass
    assert (registry.current(), kernels.running) == ("n", "n")


def test_what_was_active_comes_back_although_its_name_was_registered_again(ab, kernels):
    with ImplScope(ab, "b"):
        ab.register("a", register_fn=kernels.installer("a2"))
    assert (ab.current(), kernels.running) == ("a", "a")
    ab.activate("a")
    assert (ab.current(), kernels.running) == ("a", "a2")


def test_what_the_block_registered_and_activated_under_the_name_is_left(ab, kernels):
    with ImplScope(ab, "b"):
        ab.register("a", register_fn=kernels.installer("a2"))
        ab.activate("a")
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_an_error_of_the_block_is_not_masked_by_a_warning_that_is_an_error(ab, kernels):
    ab.register("n", register_fn=kernels.installer_without_handle("n"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError) as caught, ImplScope(ab, "n"):
            _ = 1 / 0
    assert ab.current() == "a"
    assert "'n'" in caught.value.__notes__[0]


def test_the_error_of_an_entry_is_not_masked_by_a_failing_way_back(registry, kernels):
    registry.register("s", register_fn=kernels.installer_with_stuck_handle("s", OSError("no")))
    registry.register("n", register_fn=kernels.installer_without_handle("n"))
    registry.activate("s")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RestoreError) as caught, ImplScope(registry, "n"):
            pass
    assert registry.current() == "s"
    assert "Left flash attention impl 'n'" in caught.value.__notes__[0]


def test_an_entry_that_a_listener_interrupts_goes_back(ab, kernels):
    def interrupt(before, after):
        if after == "b":
            raise KeyboardInterrupt

    ab.add_listener(interrupt)
    with pytest.raises(KeyboardInterrupt), ImplScope(ab, "b"):
        pass
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_if_the_previous_implementation_was_unregistered_stock_runs_and_a_warning_says_so(
    ab, kernels
):
    with pytest.warns(RegistryWarning, match="'a'.*unregistered") as caught, ImplScope(ab, "b"):
        ab.unregister("a")
    assert (ab.current(), kernels.running) == (None, "stock")
    assert caught[0].filename == __file__


def test_if_the_previous_implementation_cannot_come_back_stock_runs(ab, kernels, fails_after):
    ab.register("c", register_fn=fails_after(1, kernels.installer("c"), OSError("gone")))
    ab.activate("c")
    with pytest.raises(OSError, match="gone"), ImplScope(ab, "b"):
        pass
    assert (ab.current(), kernels.running) == (None, "stock")


def test_if_the_previous_implementation_cannot_prepare_stock_runs(ab, kernels, fails_after):
    prepare = fails_after(1, lambda: None, OSError("gone"))
    ab.register("c", register_fn=kernels.installer("c"), prepare=prepare)
    ab.activate("c")
    with pytest.raises(OSError, match="gone"), ImplScope(ab, "b"):
        pass
    assert (ab.current(), kernels.running) == (None, "stock")


def test_everything_that_failed_on_the_way_back_is_said(ab, kernels, fails_after):
    ab.register("c", register_fn=fails_after(1, kernels.installer("c"), ValueError("gone")))
    ab.activate("c")
    ab.register("s", register_fn=kernels.installer_with_stuck_handle("s", OSError("cannot go")))
    with pytest.raises(ValueError, match="gone") as caught, ImplScope(ab, "s"):
        pass
    assert ab.current() is None
    assert len(caught.value.__notes__) == 2  # s was stuck twice: on the switch, and on giving up
    assert all("cannot go" in note for note in caught.value.__notes__)


@pytest.mark.filterwarnings("ignore::flash_attention_registry.RegistryWarning")
def test_if_neither_can_come_back_stock_runs(ab, kernels, fails_after):
    ab.register("c", register_fn=fails_after(1, kernels.installer("c"), ValueError("c is gone")))
    ab.activate("c")
    ab.register("b", register_fn=fails_after(1, kernels.installer("b"), OSError("b is gone")))
    heard = []
    scope = ImplScope(ab, "b")
    scope.__enter__()
    ab.add_listener(lambda before, after: heard.append((before, after)))
    with pytest.raises(ValueError, match="c is gone"):
        scope.__exit__(None, None, None)
    assert (ab.current(), kernels.running, heard) == (None, "stock", [("b", None)])


def test_leaving_does_not_touch_what_the_block_returned_to_itself(ab, kernels):
    with ImplScope(ab, "b"):
        ab.activate("a")
        kernels.removals.clear()
    assert (ab.current(), kernels.removals) == ("a", [])


def test_what_was_active_all_along_stays_as_it_is_although_registered_again(ab, kernels):
    with ImplScope(ab, "a"):
        ab.register("a", register_fn=kernels.installer("a2"))
    assert (ab.current(), kernels.running) == ("a", "a")


def test_a_warning_on_leaving_is_raised_where_warnings_are_errors(ab, kernels):
    ab.register("c", register_fn=kernels.installer_without_handle("c"))
    with (
        warnings.catch_warnings(),
        pytest.raises(RegistryWarning, match="cannot be removed"),
        ImplScope(ab, "c"),
    ):
        warnings.simplefilter("error")
    assert ab.current() == "a"
