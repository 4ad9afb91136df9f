"""The clock, the order of turns, and what is made of the times.

Cards run at their power cap, so whoever is timed first runs cooler: contestants take turns in
rounds, and the order rotates from round to round.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = [
    "Clock",
    "Contestant",
    "CudaClock",
    "HostClock",
    "Spread",
    "host_microseconds",
    "interleaved",
    "order",
    "repeats_for",
]

BUDGET_MS = 25.0
"""About how long one turn lasts: long against the clock's step, short against warming up."""


class Clock(Protocol):
    """What tells the time on a device."""

    def milliseconds(self, run: Callable[[], Any], repeats: int) -> float:
        """Mean time of one run, over `repeats` in a row."""

    def drain(self) -> None:
        """Return once the device has nothing left to do."""


class CudaClock:
    """Time on the GPU, between two events on the current stream."""

    def milliseconds(self, run: Callable[[], Any], repeats: int) -> float:
        """See `Clock`."""
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        elapsed: float = begin.elapsed_time(end)
        return elapsed / repeats

    def drain(self) -> None:
        """See `Clock`."""
        import torch

        torch.cuda.synchronize()


class HostClock:
    """Time on the host, for calls that return when they are done."""

    def milliseconds(self, run: Callable[[], Any], repeats: int) -> float:
        """See `Clock`."""
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats * 1e3

    def drain(self) -> None:
        """Nothing runs after a call here."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """Something to be timed.

    Attributes:
        run: One call.
        scope: Makes a context in which `run` runs on the implementation meant.
    """

    run: Callable[[], Any]
    scope: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more; quartiles lie between the smallest and the greatest."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def order(names: Sequence[str], turn: int) -> list[str]:
    """Who runs after whom in round `turn`: each round begins with the next one."""
    first = turn % len(names) if names else 0
    return [*names[first:], *names[:first]]


def repeats_for(milliseconds: float) -> int:
    """How many runs make one turn of about `BUDGET_MS`: 3 to 100."""
    return max(3, min(100, round(BUDGET_MS / max(milliseconds, 1e-6))))


def interleaved(
    contestants: Mapping[str, Contestant],
    clock: Clock,
    rounds: int,
    repeats: Callable[[float], int] = repeats_for,
    why: Callable[[Exception], str] = str,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time every contestant once a round.

    Args:
        contestants: By name.
        clock: Of their device.
        rounds: How many turns each has, after one to warm up.
        repeats: Runs in a turn, from the milliseconds of one run.
        why: The reason to give for an exception.

    Returns:
        Milliseconds by name, one per round; and the reasons of those that failed, in the warm-up
        or later. A contestant that failed has no times.
    """
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    counts: dict[str, int] = {}
    for name, contestant in contestants.items():
        try:
            with contestant.scope():
                clock.milliseconds(contestant.run, 3)
                counts[name] = repeats(clock.milliseconds(contestant.run, 3))
            times[name] = []
        except Exception as error:
            failed[name] = why(error)
    running = list(times)
    for turn in range(rounds):
        for name in order(running, turn):
            if name in failed:
                continue
            contestant = contestants[name]
            try:
                with contestant.scope():
                    times[name].append(clock.milliseconds(contestant.run, counts[name]))
            except Exception as error:
                failed[name] = why(error)
                del times[name]
    return times, failed


def host_microseconds(run: Callable[[], Any], clock: Clock, calls: int, batches: int = 7) -> float:
    """Median over batches of the host's time for one call, the device drained between them.

    The first batch warms up. `calls` must be few enough for the device's queue, or the host's
    time becomes the device's.
    """
    taken = []
    for _ in range(batches + 1):
        clock.drain()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        taken.append((time.perf_counter() - begin) / calls * 1e6)
    clock.drain()
    return statistics.median(taken[1:])
