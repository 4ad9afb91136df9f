"""What is put right in a forked child, where only the thread that forked exists."""

from __future__ import annotations

import _thread  # threading would double the time that importing this package takes
import os
from _weakrefset import WeakSet  # all of weakref would take twice as long to import


class ForkSensitive:
    """The base of objects whose locks or state another thread may have been about to change."""

    def __init__(self) -> None:
        """Call `renew` now, and again in every child that this process forks."""
        self.renew()
        _alive.add(self)

    def renew(self) -> None:
        """Make free locks, and forget what another thread had begun."""
        raise NotImplementedError(f"{type(self).__name__} must define renew()")


class ForkSafeLock(ForkSensitive):
    """Keeps a plain lock, for `with guard.lock:`, that is new and free in a forked child.

    It is no context manager itself: the block must release the lock that it acquired, also where
    it was forked inside, and the interpreter's own lock is the fastest.

    Attributes:
        lock: The lock of this process.
    """

    lock: _thread.LockType

    def renew(self) -> None:
        """Make a free lock."""
        self.lock = _thread.allocate_lock()


_alive: WeakSet[ForkSensitive] = WeakSet()


def _renew_all() -> None:
    for owner in list(_alive):
        owner.renew()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_renew_all)
