"""What is put right in a forked child, where only the thread that forked exists."""

from __future__ import annotations

import os
import weakref


class ForkSensitive:
    """The base of objects whose locks or state another thread may have been about to change."""

    def __init__(self) -> None:
        """Call `renew` now, and again in every child that this process forks."""
        self.renew()
        _alive.add(self)

    def renew(self) -> None:
        """Make free locks, and forget what another thread had begun."""
        raise NotImplementedError(f"{type(self).__name__} must define renew()")


_alive: weakref.WeakSet[ForkSensitive] = weakref.WeakSet()


def _renew_all() -> None:
    for owner in list(_alive):
        owner.renew()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_renew_all)
