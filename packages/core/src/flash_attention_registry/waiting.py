"""Locks for which a hook inside `import torch` must not wait.

Who holds such a lock may be importing torch, or loading a provider that does, and so wait for the
very import that the hook is part of. The hook goes on without what it wanted; it is done by the
thread that held the lock, when it has released it.
"""

from __future__ import annotations

import _thread  # threading would double the time that importing this package takes

from flash_attention_registry.errors import FlashAttentionRegistryError
from flash_attention_registry.indivisible import call_and_finish

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from flash_attention_registry.lock import Lock

    T = TypeVar("T")


class BusyError(FlashAttentionRegistryError):
    """Another thread holds a lock for which this one must not wait.

    Attributes:
        lock: That lock.
    """

    def __init__(self, lock: Lock) -> None:
        """Keep the lock."""
        super().__init__("another thread is changing the registry or loading a provider")
        self.lock = lock

    def is_over(self) -> bool:
        """Return whether the lock is free by now, so that it is worth another try."""
        return self.lock.is_free()


class _Thread(_thread._local):
    """Whether this thread may wait for a lock."""

    may_wait = True


_here = _Thread()


def may_wait() -> bool:
    """Return whether the calling thread may wait for a lock, or has to raise `BusyError`."""
    return _here.may_wait


def without_waiting(action: Callable[[], T]) -> T:
    """Return `action()`, in which this thread waits for no `Lock`.

    Raises:
        BusyError: It would have to.
    """
    before = _here.may_wait

    def forbidding() -> T:
        _here.may_wait = False
        return action()

    return call_and_finish(forbidding, lambda: setattr(_here, "may_wait", before))


def do_unless_busy(action: Callable[[], object]) -> None:
    """Call `action`, or leave it to the thread that holds a lock which it needs."""
    while True:
        try:
            without_waiting(action)
            return
        except BusyError as error:
            if not error.is_over():
                return
