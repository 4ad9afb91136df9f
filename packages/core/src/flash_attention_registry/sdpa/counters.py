"""How many calls were served and how many went to stock, and why."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from flash_attention_registry.errors import text_of
from flash_attention_registry.fork import ForkSafeLock

from .native import NativeKernels

__all__ = [
    "DispatchCounts",
    "OpCounter",
    "OpCounts",
    "count_kernel",
    "counter_of",
    "dispatch_counts",
    "reset_dispatch_counts",
    "warn_or_log",
]

_logger = logging.getLogger("flash_attention_registry.sdpa")
_guard = ForkSafeLock()


@dataclass(frozen=True, slots=True)
class OpCounts:
    """Calls of one aten op that reached a kernel set.

    Attributes:
        served: Calls that the kernel set ran.
        declined: Calls that went to stock, by reason.
    """

    served: int = 0
    declined: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Keep a copy that nobody changes."""
        object.__setattr__(self, "declined", MappingProxyType(dict(self.declined)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the numbers: a program of many processes gathers them."""
        return OpCounts, (self.served, dict(self.declined))

    @property
    def total_declined(self) -> int:
        """Calls that went to stock, for whatever reason."""
        return sum(self.declined.values())


class DispatchCounts(Mapping[str, OpCounts]):
    """A snapshot: counts by aten op, for every op that has a router.

    Calls that find no kernel set installed are not counted.

    Attributes:
        kernels: Launches by the kernel that a provider chose, where it has a choice and tells of
            it, with its reason.
    """

    def __init__(
        self, counts: Mapping[str, OpCounts], kernels: Mapping[str, int] | None = None
    ) -> None:
        """Hold a snapshot of `counts` and `kernels`."""
        self._counts = dict(counts)
        self.kernels: Mapping[str, int] = MappingProxyType(dict(kernels or {}))

    def __reduce__(self) -> tuple[Any, ...]:
        """As `OpCounts`."""
        return DispatchCounts, (self._counts, dict(self.kernels))

    def __getitem__(self, op: str) -> OpCounts:
        """Counts of one op, by its name without `aten::`."""
        return self._counts[op]

    def __iter__(self) -> Iterator[str]:
        """Names of the ops."""
        return iter(self._counts)

    def __len__(self) -> int:
        """Number of ops."""
        return len(self._counts)

    @property
    def served(self) -> int:
        """Served calls of all ops."""
        return sum(counts.served for counts in self._counts.values())

    @property
    def declined(self) -> int:
        """Calls of all ops that went to stock."""
        return sum(counts.total_declined for counts in self._counts.values())

    def __str__(self) -> str:
        """One line per op that was called, one per reason below it."""
        lines = []
        for op, counts in self._counts.items():
            if counts.served or counts.declined:
                lines.append(f"{op}: {counts.served} served, {counts.total_declined} on stock")
                lines += [f"  {number} on stock: {why}" for why, number in counts.declined.items()]
        lines += [f"{number} by {kernel}" for kernel, number in self.kernels.items()]
        return "\n".join(lines) if lines else "no calls"


class OpCounter:
    """Counts calls of one op. Safe from any thread: adding one is no atomic step in Python."""

    __slots__ = ("_declined", "_failures", "_logged", "_native", "_served", "op")

    def __init__(self, op: str) -> None:
        """Start at zero for `op`."""
        self.op = op
        self._served = 0
        self._native: list[NativeKernels] = []
        self._declined: dict[str, int] = {}
        self._logged: set[str] = set()
        self._failures: set[tuple[str, type[Exception]]] = set()

    def count_served(self) -> None:
        """Count a call that a kernel set ran."""
        with _guard.lock:
            self._served += 1

    def include(self, native: NativeKernels) -> None:
        """Count what native kernels serve from now on, too; they count for themselves."""
        with _guard.lock:
            if native not in self._native:
                self._native.append(native)
                self._served -= native.served(self.op)

    def count_declined(self, reason: str) -> None:
        """Count a call that goes to stock, and log its reason the first time."""
        with _guard.lock:
            self._declined[reason] = self._declined.get(reason, 0) + 1
            if reason in self._logged:
                return
            self._logged.add(reason)
        _logger.info("aten::%s runs on stock: %s", self.op, reason)

    def note_failure(self, kernel_set: str, error: Exception) -> tuple[str, str | None]:
        """Take note of a kernel set that raised; to be called while its exception is handled.

        Returns:
            The reason to count, and what to warn of once the call has run on stock: None from the
            second failure of a kind on. Text only, since the exception keeps tensors alive.
        """
        kind = (kernel_set, type(error))
        with _guard.lock:
            known = kind in self._failures
            self._failures.add(kind)
        name = type(error).__name__
        text = (
            f"{kernel_set} raised {name} in aten::{self.op}, and this call ran on torch's own "
            f"kernel instead: {text_of(error)}. Further {name} there are counted by "
            "dispatch_counts() and not warned of."
        )
        return f"kernel raised {name}", None if known else text

    def counts(self) -> OpCounts:
        """The counts so far; the caller holds the lock."""
        served = self._served + self._served_natively()
        return OpCounts(served, self._declined)

    def reset(self) -> None:
        """Back to zero; the caller holds the lock. What was logged or warned of stays so."""
        self._served = -self._served_natively()
        self._declined = {}

    def _served_natively(self) -> int:
        return sum(native.served(self.op) for native in self._native)


def warn_or_log(text: str) -> None:
    """Give a `RuntimeWarning` to the caller's caller; log it where warnings are errors.

    A call that stock has run must not fail because of what is to be said about it.
    """
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    except Exception:
        _logger.warning("%s", text)


_counters: dict[str, OpCounter] = {}
_kernels: dict[str, int] = {}


def count_kernel(kernel: str) -> None:
    """Count a launch of a provider that has several kernels for a call.

    Args:
        kernel: Which it took, and why if that is not the best; one of few texts.
    """
    with _guard.lock:
        _kernels[kernel] = _kernels.get(kernel, 0) + 1


def counter_of(op: str) -> OpCounter:
    """The one counter of `op`, made at the first request."""
    with _guard.lock:
        return _counters.setdefault(op, OpCounter(op))


def dispatch_counts() -> DispatchCounts:
    """Calls served and declined since the start or the last reset, by aten op."""
    with _guard.lock:
        return DispatchCounts({op: counter.counts() for op, counter in _counters.items()}, _kernels)


def reset_dispatch_counts() -> None:
    """Set every count to zero."""
    with _guard.lock:
        _kernels.clear()
        for counter in _counters.values():
            counter.reset()
