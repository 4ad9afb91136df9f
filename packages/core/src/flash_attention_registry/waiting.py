"""Locks for which a hook inside `import torch` must not wait.

Who holds such a lock may be importing torch, or loading a provider that does, and so wait for the
very import that the hook is part of. The hook goes on without what it wanted; it is done by the
thread that held the lock, when it has released it.
"""

from __future__ import annotations

import _thread  # threading would double the time that importing this package takes

from flash_attention_registry.errors import FlashAttentionRegistryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Protocol

    class Lock(Protocol):
        """A lock as `_thread` makes them, reentrant or not."""

        def acquire(self, blocking: bool = True) -> bool:
            """Take it, after waiting if `blocking`; return whether it is taken."""

        def release(self) -> None:
            """Give it back."""


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
        free = self.lock.acquire(blocking=False)
        if free:
            self.lock.release()
        return free


class _Thread(_thread._local):
    """How many blocks of `WithoutWaiting` this thread is in."""

    blocks = 0


_here = _Thread()


class WithoutWaiting:
    """A context manager in which `acquire` raises rather than waits, in this thread."""

    def __enter__(self) -> None:
        """Begin."""
        _here.blocks += 1

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End."""
        _here.blocks -= 1


def acquire(lock: Lock) -> None:
    """Take a lock.

    Raises:
        BusyError: It would have to be waited for, inside of `WithoutWaiting`.
    """
    if not lock.acquire(blocking=not _here.blocks):
        raise BusyError(lock)


def do_unless_busy(action: Callable[[], object]) -> None:
    """Call `action`, or leave it to the thread that holds a lock which it needs."""
    while True:
        try:
            with WithoutWaiting():
                action()
            return
        except BusyError as error:
            if not error.is_over():
                return
