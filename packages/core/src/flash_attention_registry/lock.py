"""A lock that knows who holds it, and that nobody can leave behind."""

from __future__ import annotations

import _thread  # threading would double the time that importing this package takes
import sys
from itertools import compress, starmap

from flash_attention_registry.fork import ForkSensitive
from flash_attention_registry.indivisible import call_and_finish
from flash_attention_registry.waiting import BusyError, may_wait

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")

PATIENCE = 1.0
"""Seconds of waiting after which it is looked whether whoever holds the lock is still at it."""


class Lock(ForkSensitive):
    """Held by one thread at a time, for as long as a call lasts, however that ends.

    Taking it and noting whose it is are one step, and so is giving it back: an interrupt finds it
    taken and known or not taken at all. Should several interrupts, one right after another, keep
    both of the attempts to give it back from being made, the next who asks for it takes it away. In
    a forked child it is new and free: the thread that held it does not exist there.
    """

    def renew(self) -> None:
        """Make it free."""
        self._state = _State()

    def hold(self, action: Callable[[], T]) -> T:
        """Return `action()`, during which this thread holds the lock; it may do so already.

        Raises:
            BusyError: Another thread holds it, and this one must not wait (`without_waiting`).
        """
        if self.is_mine():
            return action()
        return _hold(self, self._state, action)

    def is_mine(self) -> bool:
        """Return whether the calling thread is inside of `hold`."""
        holding = self._state.holding()
        if holding is None or holding.thread != _thread.get_ident():
            return False
        if _is_in_hold(holding.thread):
            return True
        self._state.give_back(holding)
        return False

    def is_free(self) -> bool:
        """Return whether nobody holds it."""
        return self._state.holding() is None


class _Holding:
    """One holding of a lock, by the thread that makes this object."""

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = _thread.get_ident()


class _State:
    """The lock itself, and whose it is: in a table of one or none."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._holdings: dict[_Holding, bool] = {}

    def holding(self) -> _Holding | None:
        holdings = list(self._holdings)
        return holdings[0] if holdings else None

    def take(self, holding: _Holding, seconds: float) -> bool:
        """Take the lock if it becomes free within so many seconds; return whether it did."""
        is_taken = starmap(self._lock.acquire, ((True, seconds),))
        self._holdings.update(compress(((holding, True),), is_taken))
        return self.holding() is holding

    def give_back(self, holding: _Holding) -> None:
        """Release the lock if it is held by `holding`, also if that is another thread's."""
        was_held = map(self._holdings.pop, (holding,), (False,))
        list(starmap(self._lock.release, compress(((),), was_held)))


def _hold(lock: Lock, state: _State, action: Callable[[], T]) -> T:
    """Take the lock, act, give it back; a thread holds a lock only in here."""
    # Always this state: if the action forks, the child's lock has another one.
    mine = _Holding()

    def holding() -> T:
        while not state.take(mine, PATIENCE if may_wait() else 0.0):
            if not may_wait():
                raise BusyError(lock)
            theirs = state.holding()
            if theirs is not None and not _is_in_hold(theirs.thread):
                state.give_back(theirs)
        return action()

    return call_and_finish(holding, lambda: state.give_back(mine))


def _is_in_hold(thread: int) -> bool:
    """Whether a thread, if it still runs, is inside of `_hold`, for whatever lock."""
    frame = sys._current_frames().get(thread)
    if frame is not None and "greenlet" in sys.modules:
        return True  # as far as can be told: the frames of a greenlet that waits are on no stack
    while frame is not None:
        if frame.f_code is _hold.__code__:
            return True
        frame = frame.f_back
    return False
