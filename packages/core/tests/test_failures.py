"""Whatever goes wrong: the previous implementation works, the half-built one is gone."""

from __future__ import annotations

import gc
import warnings
import weakref
from itertools import product

import pytest

from flash_attention_registry import (
    FamilyUnavailableError,
    HandleError,
    RegistryWarning,
    RestoreError,
)


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


@pytest.mark.parametrize(
    "error", [OSError("gone"), StopIteration("gone"), KeyboardInterrupt(), SystemExit(1)]
)
def test_failed_activation_keeps_the_previous_impl_active(ab, kernels, failing, error):
    ab.register("c", register_fn=failing(error))
    with pytest.raises(type(error)) as caught:
        ab.activate("c")
    assert caught.value is error
    assert (ab.current(), kernels.installed) == ("a", ["a"])
    ab.activate("b")
    ab.restore()
    assert kernels.running == "stock"


def test_failed_activation_with_nothing_active_leaves_stock(registry, kernels, failing):
    registry.register("c", register_fn=failing(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        registry.activate("c")
    assert (registry.current(), kernels.running) == (None, "stock")


def test_a_remove_that_raises_what_ends_an_iteration_is_told_as_any_other(ab, kernels):
    stuck = kernels.installer_with_stuck_handle("c", StopIteration("none left"))
    ab.register("c", register_fn=stuck)
    ab.activate("c")
    with pytest.raises(RestoreError, match="raised StopIteration: none left"):
        ab.activate("b")
    assert ab.current() == "b"


class Half:
    """A half-built library: its kernels run for as long as it is referenced."""


@pytest.fixture
def halves():
    """Weak references to what the functions of these tests built and did not finish."""
    gc.disable()  # being freed must not depend on the collector
    yield []
    gc.enable()


def raises_directly(halves):
    library = Half()
    halves.append(weakref.ref(library))
    raise OSError("no symbol")


def raises_from_a_helper(halves):
    def helper():
        raises_directly(halves)

    try:
        helper()
    except OSError as error:
        raise RuntimeError("wrapped") from error


def raises_while_handling(halves):
    try:
        raises_directly(halves)
    except OSError:
        raises_directly(halves)


def returns_no_handle(halves):
    library = Half()
    halves.append(weakref.ref(library))
    return library


FAILURES = [raises_directly, raises_from_a_helper, raises_while_handling]


@pytest.mark.parametrize(
    ("phase", "build"),
    [*product(["prepare", "register_fn"], FAILURES), ("register_fn", returns_no_handle)],
)
def test_half_built_library_is_freed_while_the_exception_is_kept(ab, halves, phase, build):
    functions = {"register_fn": lambda: None, phase: lambda: build(halves)}
    ab.register("c", **functions)
    kept = None
    try:
        ab.activate("c")
    except Exception as error:
        kept = error
    assert kept is not None
    assert halves
    assert [reference() for reference in halves] == [None] * len(halves)


def test_half_built_libraries_of_an_exception_group_are_freed(ab, halves):
    class Group(Exception):
        exceptions: tuple[Exception, ...] = ()

    def build():
        group = Group("several")
        try:
            raises_directly(halves)
        except OSError as error:
            group.exceptions = (error.with_traceback(error.__traceback__),)
            error.__context__ = None
        raise group from None

    ab.register("c", register_fn=build)
    with pytest.raises(Group) as caught:
        ab.activate("c")
    assert caught.value.exceptions
    assert halves[0]() is None


def test_frames_of_an_exception_that_was_being_handled_are_left_alone(ab, failing):
    class Kept:
        pass

    def user_function():
        local = Kept()
        references.append(weakref.ref(local))
        raise KeyError("the user's own")

    references: list[weakref.ref[Kept]] = []
    ab.register("c", register_fn=failing(OSError("gone")))
    try:
        user_function()
    except KeyError:
        with pytest.raises(OSError, match="gone"):
            ab.activate("c")
        assert references[0]() is not None


def test_failed_rollback_ends_on_stock_and_says_so(registry, kernels, failing, fails_after):
    once = fails_after(1, kernels.installer("a"), MemoryError("full"))
    registry.register("a", register_fn=once)
    registry.register("c", register_fn=failing(OSError("gone")))
    registry.activate("a")
    seen = []
    registry.add_listener(lambda before, after: seen.append((before, after)))
    with (
        pytest.warns(RegistryWarning, match=r"'a' could not be activated again.*stock.*gone"),
        pytest.raises(OSError, match="gone") as caught,
    ):
        registry.activate("c")
    assert "MemoryError: full" in notes(caught.value)
    assert (registry.current(), kernels.running, seen) == (None, "stock", [("a", None)])


def test_failed_switch_from_a_stuck_implementation_brings_it_back(registry, kernels, failing):
    registry.register("s", register_fn=kernels.installer_with_stuck_handle("s", OSError("no")))
    registry.register("c", register_fn=failing(ValueError("gone")))
    registry.activate("s")
    with pytest.raises(ValueError, match="gone") as caught:
        registry.activate("c")
    assert "remove() of flash attention impl 's' raised OSError: no" in notes(caught.value)
    assert (registry.current(), kernels.running) == ("s", "s")
    assert len(registry.stuck_handles()) == 1


@pytest.mark.parametrize("change", ["restore", "switch"])
def test_interrupted_removal_puts_the_implementation_back(ab, kernels, change):
    interrupt = KeyboardInterrupt()

    class Interrupted:
        def remove(self):
            kernels.installed.remove("i")
            raise interrupt

    def install():
        kernels.installed.append("i")
        return Interrupted()

    ab.register("i", register_fn=install)
    ab.activate("i")
    with pytest.raises(KeyboardInterrupt) as caught:
        ab.restore() if change == "restore" else ab.activate("b")
    assert caught.value is interrupt
    assert (ab.current(), kernels.installed) == ("i", ["i"])
    assert len(ab.stuck_handles()) == 1


def test_errors_do_not_interrupt_a_transition_when_warnings_are_errors(registry, kernels):
    registry.register("n", register_fn=kernels.installer_without_handle("n"))
    registry.register("b", register_fn=kernels.installer("b"))
    registry.activate("n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RegistryWarning):
            registry.activate("b")
    assert (registry.current(), kernels.running) == ("b", "b")


def test_restore_error_is_raised_although_a_warning_is_an_error(registry, kernels):
    registry.register("s", register_fn=kernels.installer_with_stuck_handle("s", OSError("no")))
    registry.activate("s")
    registry.add_listener(lambda before, after: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RestoreError):
            registry.restore()
    assert registry.current() is None


def test_failure_is_not_masked_by_warnings_that_are_errors(registry, kernels, failing, fails_after):
    registry.register("a", register_fn=fails_after(1, kernels.installer("a"), MemoryError("full")))
    registry.register("c", register_fn=failing(OSError("gone")))
    registry.activate("a")
    registry.add_listener(lambda before, after: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match="gone") as caught:
            registry.activate("c")
    assert "'a' could not be activated again" in notes(caught.value)
    assert "ZeroDivisionError" in notes(caught.value)


def test_family_error_is_not_masked_by_warnings_that_are_errors(ab, failing):
    ab.register("c", register_fn=failing(OSError("gone")), family="FA4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FamilyUnavailableError) as caught:
            ab.activate("FA4")
    assert "Passed over 'c'" in notes(caught.value)
    assert ab.current() == "a"


@pytest.mark.parametrize(
    ("error", "other"),
    [("Left flash attention impl", "A transition listener"), ("A transition", "Left flash")],
)
def test_no_warning_is_lost_when_one_is_an_error(registry, kernels, error, other):
    registry.register("n", register_fn=kernels.installer_without_handle("n"))
    registry.activate("n")
    registry.add_listener(lambda before, after: 1 / 0)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        warnings.filterwarnings("error", error)
        with pytest.raises(RegistryWarning, match=error):
            registry.restore()
    assert [str(one.message).startswith(other) for one in given] == [True]


def test_exception_without_a_text_does_not_end_a_transition(ab):
    class Mute(Exception):
        def __str__(self):
            raise ValueError("no text")

    def listener(before, after):
        raise Mute

    ab.add_listener(listener)
    with pytest.warns(RegistryWarning, match="Mute: .its text cannot be had: ValueError"):
        ab.activate("b")
    assert ab.current() == "b"


def test_handle_whose_remove_cannot_even_be_read_is_a_failed_activation(ab, kernels):
    class Odd:
        @property
        def remove(self):
            raise AttributeError("lazily broken")

    ab.register("c", register_fn=Odd)
    with pytest.raises(HandleError):
        ab.activate("c")
    assert (ab.current(), kernels.running) == ("a", "a")
