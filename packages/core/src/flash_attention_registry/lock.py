"""One transition at a time: the lock, who holds it, and what is said when it is released."""

from __future__ import annotations

import _thread  # threading would double the time that importing this package takes

from flash_attention_registry.errors import ReentrantTransitionError, add_error
from flash_attention_registry.fork import ForkSensitive
from flash_attention_registry.waiting import acquire
from flash_attention_registry.warn import warn_caller

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Protocol

    class Around(Protocol):
        """What happens inside of the lock before and after each transition."""

        def begin(self, turn: Turn) -> None:
            """Prepare; `turn` takes warnings and errors to be raised in the end."""

        def end(self) -> None:
            """Finish, also after an error."""

        def released(self) -> None:
            """Do what had to wait for the lock to be free."""


class TransitionLock(ForkSensitive):
    """The lock round every change of a registry.

    Other threads wait for it; the thread that holds it is refused with
    `ReentrantTransitionError`, where a plain lock would hang and a reentrant one would let a
    half-made change be changed again. In a forked child it is new and free: the thread that held
    it does not exist there.
    """

    def renew(self) -> None:
        """Make a free lock that nobody holds."""
        self._lock = _thread.allocate_lock()
        self._owner: int | None = None
        self._doing = ""

    def refuse_reentry(self, wanted: str) -> None:
        """Raise if the calling thread is inside a transition.

        Args:
            wanted: What the caller wants to do, as in "activate 'fa4-triton'".

        Raises:
            ReentrantTransitionError: The calling thread holds the lock.
        """
        if self.is_mine():
            raise ReentrantTransitionError(
                f"Cannot {wanted}: this thread is in the middle of another transition "
                f"({self._doing}). A register_fn, prepare, remove, availability or recommended "
                f"callable, or a transition listener, must not change or load the registry; "
                f"do it after that call has returned."
            )

    def is_mine(self) -> bool:
        """Return whether the calling thread is inside a transition."""
        return self._owner == _thread.get_ident()

    def hold(self, doing: str, around: Around | None = None) -> Turn:
        """Return a context manager that holds the lock while `doing` is done.

        Args:
            doing: What is done, for messages.
            around: What is to happen right after the lock is taken, and right before and right
                after it is released.
        """
        return Turn(self, doing, around)

    def _acquire(self, doing: str) -> _thread.LockType:
        self.refuse_reentry(doing)
        lock = self._lock
        acquire(lock)
        self._owner = _thread.get_ident()
        self._doing = doing
        return lock

    def _release(self, lock: _thread.LockType) -> None:
        self._owner = None
        lock.release()  # the one that was acquired: after a fork inside the turn, another is in use


class Turn:
    """One holding of the lock, and what has to be said once it is free again.

    Warnings wait until then because a filter may turn them into exceptions, which must not
    interrupt a transition half way. One exception leaves a turn: an interrupt before an error,
    an error before a warning that a filter made an exception. The others become its notes.
    """

    def __init__(self, lock: TransitionLock, doing: str, around: Around | None) -> None:
        """Remember what to hold; nothing is acquired before the block is entered."""
        self._transition_lock = lock
        self._doing = doing
        self._around = around
        self._warnings: list[str] = []
        self._errors: list[BaseException] = []

    def warn(self, text: str) -> None:
        """Give a `RegistryWarning` when the turn is over."""
        self._warnings.append(text)

    def raise_after(self, error: BaseException) -> None:
        """Raise `error` when the turn is over; if the turn itself raises, it is a note of that.

        An error that is no `Exception`, such as `KeyboardInterrupt`, is raised all the same.
        """
        self._errors.append(error)

    def __enter__(self) -> Turn:
        """Acquire the lock.

        Raises:
            ReentrantTransitionError: The calling thread holds it already.
        """
        self._held = self._transition_lock._acquire(self._doing)
        if self._around is not None:
            try:
                self._around.begin(self)
            except BaseException:
                self._transition_lock._release(self._held)
                raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the lock, then warn, then raise what was to be raised afterwards."""
        try:
            if self._around is not None:
                self._around.end()
        finally:
            self._transition_lock._release(self._held)
        errors = [*self._errors]
        if self._around is not None:
            try:
                self._around.released()
            except BaseException as error:
                errors.append(error)
        for text in self._warnings:
            try:
                warn_caller(text)
            except Exception as error:
                errors.append(error)
        first = exc if exc is not None else next(iter(errors), None)
        if first is None:
            return
        if isinstance(first, Exception):
            first = next((one for one in errors if not isinstance(one, Exception)), first)
        for other in errors:
            if other is not first:
                add_error(first, other)
        if first is not exc:
            raise first
