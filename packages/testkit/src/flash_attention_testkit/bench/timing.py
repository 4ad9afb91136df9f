"""The clocks, who has a turn when, and what is made of the times.

Cards run at their power cap, so whoever is timed first runs cooler: contestants take turns in
rounds, and the order changes from round to round. A call is timed by itself, with a cold cache and
with the queue of the device filled, so that the host's time is no part of it.
"""

from __future__ import annotations

import contextlib
import math
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
    "Plan",
    "Spread",
    "Turn",
    "host_microseconds",
    "interleaved",
    "order",
    "plan",
]

TURN_MS = 125.0
"""About how long a turn lasts: long against the time in which a card finds its clock rate. With
turns of 40 ms on an H100, kernels that draw much power were still running at the rate that weaker
ones before them had left behind: cuDNN's forward at head_dim 128 read up to a sixth too fast."""

SETTLING = 3
"""One part in so many of a turn's calls does not count: the first ones."""

MOST_CALLS = 150
"""In a turn. Calls and what clears the cache between them must fit into the device's queue, or the
host waits and its times mean nothing."""

FEWEST_ROUNDS = 4
"""Whatever the budget: two in each direction."""

CACHE_BYTES = 256 << 20
"""Written before each call: several times the last-level cache of any GPU."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Several calls in a row by one contestant.

    Attributes:
        ms: Median of a call's time on the device.
        host_us: Median of the host's time until a call returned.
    """

    ms: float
    host_us: float


class Clock(Protocol):
    """What tells the time on a device.

    Attributes:
        clear_ms: How long the device clears its cache before a call.
    """

    clear_ms: float

    def turn(self, run: Callable[[], Any], calls: int, clears: int = 1) -> Turn:
        """Time `calls` calls of `run`, each after clearing the cache `clears` times."""


class CudaClock:
    """Time on the current GPU, each call between two events on the current stream."""

    def __init__(self) -> None:
        """Make the buffer that is written before each call, and see how long that takes."""
        import torch

        self.clear_ms = 0.0
        self._cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
        self._events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(MOST_CALLS)
        ]
        self.clear_ms = self.turn(self._cache.zero_, 20).ms

    def turn(self, run: Callable[[], Any], calls: int, clears: int = 1) -> Turn:
        """See `Clock`."""
        import torch

        host = []
        for begin, end in self._events[:calls]:
            for _ in range(clears):
                self._cache.zero_()
            begin.record()
            called = time.perf_counter()
            run()
            host.append(time.perf_counter() - called)
            end.record()
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in self._events[:calls]]
        # The first calls ran at the clock rate that whoever had the turn before left behind, and
        # before the host was ahead of the device.
        settled = calls // SETTLING
        return Turn(statistics.median(times[settled:]), statistics.median(host[settled:]) * 1e6)


class HostClock:
    """Time on the host, for calls that return when they are done; its cache is not cleared."""

    clear_ms = 0.0

    def turn(self, run: Callable[[], Any], calls: int, clears: int = 1) -> Turn:
        """See `Clock`."""
        times = []
        for _ in range(calls):
            called = time.perf_counter()
            run()
            times.append(time.perf_counter() - called)
        median = statistics.median(times)
        return Turn(median * 1e3, median * 1e6)


@dataclass(frozen=True, slots=True)
class Contestant:
    """Something to be timed.

    Attributes:
        run: One call.
        scope: Makes a context in which `run` runs on the implementation meant. Entering and leaving
            it is not timed.
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


@dataclass(frozen=True, slots=True)
class Plan:
    """How a cell is measured.

    Attributes:
        calls: In a turn, by contestant.
        clears: Of the cache before each call; the same for all.
        rounds: Each contestant has one turn in each.
    """

    calls: Mapping[str, int]
    clears: int
    rounds: int


def plan(estimates: Mapping[str, Turn], clear_ms: float, budget_s: float) -> Plan:
    """Divide a budget among contestants.

    Args:
        estimates: What a call takes, by contestant; one at least.
        clear_ms: Of the clock.
        budget_s: Seconds for all rounds. There are at least `FEWEST_ROUNDS`, and always an even
            number, so that each order has its mirror image.
    """
    clears = max(_clears(estimate, clear_ms) for estimate in estimates.values())
    call_ms = {name: one.ms + clears * clear_ms for name, one in estimates.items()}
    calls = {
        name: max(1, min(MOST_CALLS, round(TURN_MS / max(ms, 1e-6))))
        for name, ms in call_ms.items()
    }
    round_ms = sum(calls[name] * ms for name, ms in call_ms.items())
    pairs = int(budget_s * 1e3 / max(round_ms, 1e-6) / 2)
    return Plan(calls, clears, max(FEWEST_ROUNDS, 2 * pairs))


def _clears(estimate: Turn, clear_ms: float) -> int:
    """How often the cache is cleared before a call, so that the device is busy until it is queued.

    Otherwise a call that takes the host longer than the device would be told in the host's time.
    An estimate that is twice the host's time is surely the device's own.
    """
    if clear_ms == 0 or estimate.ms * 1e3 >= 2 * estimate.host_us:
        return 1
    return min(20, max(1, math.ceil(1.25 * estimate.host_us / (clear_ms * 1e3))))


def order(names: Sequence[str], turn: int) -> list[str]:
    """Who runs after whom in round `turn`.

    Every two rounds begin with the next one, and the second runs backwards: in each pair everybody
    has the same place on average, and nobody always follows the same one.
    """
    first = turn // 2 % len(names) if names else 0
    rotated = [*names[first:], *names[:first]]
    return rotated[::-1] if turn % 2 else rotated


def interleaved(
    contestants: Mapping[str, Contestant],
    clock: Clock,
    budget_s: float,
    why: Callable[[Exception], str] = str,
) -> tuple[dict[str, list[Turn]], dict[str, str]]:
    """Time every contestant once a round.

    Nothing counts before everybody has run twice, which compiles and plans whatever is made at
    the first call, and had a turn in a round, which brings the card to its temperature.

    Args:
        contestants: By name.
        clock: Of their device.
        budget_s: Seconds for the rounds that count; see `plan`.
        why: The reason to give for an exception; it may raise another one to end everything.

    Returns:
        Turns by name, one a round; and the reasons of those that failed at any time. A contestant
        that failed has no turns.
    """
    failed: dict[str, str] = {}

    def turn(name: str, calls: int, clears: int) -> Turn | None:
        contestant = contestants[name]
        try:
            with contestant.scope():
                return clock.turn(contestant.run, calls, clears)
        except Exception as error:
            failed[name] = why(error)
            return None

    estimates = {}
    for name in contestants:
        if turn(name, 1, 1) is not None and (estimate := turn(name, 2, 1)) is not None:
            estimates[name] = estimate
    if not estimates:
        return {}, failed
    planned = plan(estimates, clock.clear_ms, budget_s)
    turns: dict[str, list[Turn]] = {name: [] for name in estimates}
    for number in range(-1, planned.rounds):
        for name in order(list(estimates), number):
            if name not in failed:
                taken = turn(name, planned.calls[name], planned.clears)
                if taken is not None and number >= 0:
                    turns[name].append(taken)
    return {name: taken for name, taken in turns.items() if name not in failed}, failed


def host_microseconds(
    run: Callable[[], Any], drain: Callable[[], Any], calls: int, batches: int = 15
) -> float:
    """Median over batches of the host's time for one call, the device drained between them.

    The first batch warms up.

    Args:
        run: One call.
        drain: Returns once the device has nothing left to do.
        calls: In a batch; few enough for the device's queue, or the host's time becomes the
            device's.
        batches: How many count.
    """
    taken = []
    for _ in range(batches + 1):
        drain()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        taken.append((time.perf_counter() - begin) / calls * 1e6)
    drain()
    return statistics.median(taken[1:])
