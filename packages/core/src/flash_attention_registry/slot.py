"""The one place where an implementation is active: installing, removing, putting back."""

from __future__ import annotations

import sys

from flash_attention_registry.errors import HandleError, RestoreError, add_note, describe
from flash_attention_registry.fork import ForkSensitive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from flash_attention_registry.handle import FlashAttentionHandle
    from flash_attention_registry.lock import Turn
    from flash_attention_registry.registration import Registration

    T = TypeVar("T")
    Listener = Callable[[str | None, str | None], object]


class Active:
    """An implementation whose kernels are installed; never changed, only replaced.

    Attributes:
        registration: What was registered when it was activated.
        handle: What its `register_fn` returned; None if its kernels cannot be removed.
    """

    __slots__ = ("handle", "registration")

    def __init__(self, registration: Registration, handle: FlashAttentionHandle | None) -> None:
        """Keep both."""
        self.registration = registration
        self.handle = handle


class ListenerHandle:
    """What `add_transition_listener` returns."""

    def __init__(self, listeners: dict[object, Listener]) -> None:
        """Remember where the listener was put, under this object as its key."""
        self._listeners = listeners

    def remove(self) -> None:
        """Stop calling the listener; a second call does nothing."""
        self._listeners.pop(self, None)


class Slot(ForkSensitive):
    """Holds the active implementation, or nothing: then stock kernels run.

    Its user holds the transition lock while calling `put`; `active` may be read at any time and is
    replaced only when a transition is complete.

    Attributes:
        active: The active implementation, or None.
        stuck: The handles whose `remove()` raised. They are kept because dropping the last
            reference to a library that is still installed is not safe in every provider.
        listeners: Called with the names before and after each committed transition.
    """

    def __init__(self) -> None:
        """Start with stock kernels."""
        self.active: Active | None = None
        self.stuck: tuple[FlashAttentionHandle, ...] = ()
        self.listeners: dict[object, Listener] = {}
        self._removed = False  # what `active` names is gone, and its successor not yet in place
        super().__init__()

    def renew(self) -> None:
        """Say what is true in a child that was forked between a removal and an installation."""
        if self._removed:
            self.active = None
            self._removed = False

    def add_listener(self, listener: Listener) -> ListenerHandle:
        """Call `listener` after each committed transition until the returned handle is removed."""
        handle = ListenerHandle(self.listeners)
        self.listeners[handle] = listener
        return handle

    def put(self, target: Registration | None, turn: Turn) -> None:
        """Replace what is active by `target`, or by stock kernels if it is None.

        The old one is removed before the new one is installed: not every kernel can be installed
        on top of another. If anything goes wrong the old one is installed again by its own
        `register_fn`, and the error goes on to the caller.

        Args:
            target: What to activate; nobody is asked whether it is available.
            turn: Takes the warnings, the `RestoreError` if the old one's `remove()` raised, and an
                interrupt that a listener raised.
        """
        previous = self.active
        if target is None and previous is None:
            return
        if target is not None and target.prepare is not None:
            _call_and_free_frames(target.prepare)
        removal_error = self._remove(previous, turn)
        self._removed = previous is not None and previous.handle is not None
        try:
            active = None if target is None else _install(target)
        except BaseException as error:
            if removal_error is not None:
                add_note(error, str(removal_error))
            self._put_back(previous, error, turn)
            raise
        if removal_error is not None:
            turn.raise_after(removal_error)
        _warn_of_what_stays(previous, turn)
        self._commit(active, turn)

    def adopt(self, active: Active | None, turn: Turn) -> None:
        """Commit what was installed or removed already, past this registry.

        Args:
            active: What is installed now; None if what was active before has been removed.
            turn: Takes the warnings.
        """
        if active is None:
            _warn_of_what_stays(self.active, turn)
        self._commit(active, turn)

    def remove_below(self, turn: Turn) -> None:
        """Remove what is active, on top of which something else was installed past this registry.

        Args:
            turn: Takes the `RestoreError` if its `remove()` raised.
        """
        removal_error = self._remove(self.active, turn)
        if removal_error is not None:
            turn.raise_after(removal_error)

    def _remove(self, active: Active | None, turn: Turn) -> RestoreError | None:
        """Remove `active`; return what to raise in the end if its `remove()` raised."""
        if active is None or active.handle is None:
            return None
        try:
            active.handle.remove()
        except Exception as error:
            self.stuck = (*self.stuck, active.handle)
            late = RestoreError(
                f"remove() of flash attention impl {active.registration.name!r} raised "
                f"{describe(error)}. The registry went on without it, but its kernels may still "
                f"be installed. Report this to its provider; restart the process to be rid of them."
            )
            late.__cause__ = error
            return late
        except BaseException as error:
            # An interrupt is not remove()'s own failure: it must reach the user as what it is,
            # and how far remove() had got is unknown.
            self.stuck = (*self.stuck, active.handle)
            self._put_back(active, error, turn)
            raise
        return None

    def _put_back(self, previous: Active | None, error: BaseException, turn: Turn) -> None:
        """Install `previous` again because of `error`; settle for stock if that fails too."""
        if previous is None or previous.handle is None:
            return  # nothing was removed
        try:
            self.active, self._removed = _install(previous.registration), False
        except BaseException as second:
            text = (
                f"Flash attention impl {previous.registration.name!r} could not be activated again "
                f"({describe(second)}). No implementation is active: stock kernels run."
            )
            add_note(error, text)
            turn.warn(f"{text} The transition before it failed with {describe(error)}.")
            self._commit(None, turn)

    def _commit(self, active: Active | None, turn: Turn) -> None:
        """Make `active` what everybody sees and tell every listener, whatever one raises."""
        before, after = self.name(), None if active is None else active.registration.name
        self.active, self._removed = active, False
        for listener in list(self.listeners.values()):
            try:
                listener(before, after)
            except Exception as error:
                turn.warn(
                    f"A transition listener ({listener!r}) raised {describe(error)}. The "
                    f"transition from {before!r} to {after!r} took place all the same."
                )
            except BaseException as interrupt:
                turn.raise_after(interrupt)

    def name(self) -> str | None:
        """Return the name of what is active, or None."""
        active = self.active
        return None if active is None else active.registration.name

    def still(self) -> str:
        """Return the sentence with which an error says that nothing was changed."""
        name = self.name()
        return "Stock kernels still run." if name is None else f"Still active: {name!r}."


def _warn_of_what_stays(left: Active | None, turn: Turn) -> None:
    """Warn if what has been left gave no handle to remove its kernels with."""
    if left is not None and left.handle is None:
        turn.warn(
            f"Left flash attention impl {left.registration.name!r}, but its register_fn "
            f"returned no handle: its kernels cannot be removed and may still run. Restart "
            f"the process to be rid of them."
        )


def _install(registration: Registration) -> Active:
    """Run the `register_fn`; if it fails nothing of what it built stays alive."""
    return _call_and_free_frames(lambda: _build(registration))


def _build(registration: Registration) -> Active:
    """Run the `register_fn` and check what it returns."""
    handle = registration.register_fn()
    if handle is not None and not callable(getattr(handle, "remove", None)):
        raise HandleError(
            f"register_fn of flash attention impl {registration.name!r} returned an object of type "
            f"{type(handle).__name__} without a callable remove(). It must return None or a handle "
            f"whose remove() uninstalls the kernels."
        )
    return Active(registration, handle)


def _call_and_free_frames(call: Callable[[], T]) -> T:
    """Call; if it raises, free the local variables of every function that has ended by that.

    A traceback keeps them alive, and with them a half-built kernel library, for as long as
    somebody keeps the exception: a notebook, pytest, or an `except` clause.
    """
    outer = sys.exc_info()[1]
    try:
        return call()
    except BaseException as error:
        _free_frames(error, outer)
        raise


def _free_frames(error: BaseException, outer: BaseException | None) -> None:
    """Clear the frames of `error` and of what led to it, up to but without `outer`.

    `outer` was being handled before the failed call began: its frames are none of our business.
    """
    import traceback  # loads much that only this rare path needs

    pending: list[BaseException | None] = [error]
    seen = {id(outer)}
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        pending += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
