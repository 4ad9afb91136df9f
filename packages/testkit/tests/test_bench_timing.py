"""Turns rotate, times are each contestant's own, and who fails drops out with a reason."""

from __future__ import annotations

import contextlib

import pytest
import torch

from flash_attention_testkit.bench import timing
from flash_attention_testkit.bench.timing import (
    FEWEST_ROUNDS,
    MOST_CALLS,
    Contestant,
    CudaClock,
    HostClock,
    Spread,
    Turn,
    host_microseconds,
    interleaved,
    order,
    plan,
)


class FakeClock:
    """Time passes only inside of `spend`, and nothing is spent on clearing the cache."""

    clear_ms = 0.0

    def __init__(self) -> None:
        self.now = 0.0

    def spend(self, ms: float) -> None:
        self.now += ms

    def turn(self, run, calls: int, clears: int = 1) -> Turn:
        begin = self.now
        for _ in range(calls):
            run()
        ms = (self.now - begin) / calls
        return Turn(ms, ms * 1e3)


def test_in_two_rounds_everybody_has_the_same_place_and_the_next_two_begin_with_the_next() -> None:
    rounds = ["".join(order("abc", turn)) for turn in range(6)]
    assert rounds == ["abc", "cba", "bca", "acb", "cab", "bac"]
    assert order([], 3) == []


def test_contestants_take_turns_inside_of_their_own_scope() -> None:
    clock, log, inside = FakeClock(), [], []

    @contextlib.contextmanager
    def scope(name):
        inside.append(name)
        yield
        inside.pop()

    def run(name, ms):
        assert inside == [name]
        log.append(name)
        clock.spend(ms)

    contestants = {
        name: Contestant(lambda n=name, t=ms: run(n, t), lambda n=name: scope(n))
        for name, ms in (("a", 100.0), ("b", 200.0))
    }
    turns, failed = interleaved(contestants, clock, 0.0)
    assert turns == {"a": [Turn(100.0, 1e5)] * 4, "b": [Turn(200.0, 2e5)] * 4}
    assert failed == {}
    # Three runs each to compile and estimate, a round that does not count, and those that do.
    assert "".join(log) == "aaabbb" + "ab" + "abbabaab"


@pytest.mark.parametrize("good_runs", [0, 1, 4, 6])
def test_who_fails_at_any_time_drops_out_and_the_others_go_on(good_runs: int) -> None:
    clock, runs = FakeClock(), []

    def fail() -> None:
        runs.append(1)
        clock.spend(50.0)
        if len(runs) > good_runs:
            raise RuntimeError("no such kernel")

    contestants = {"bad": Contestant(fail), "good": Contestant(lambda: clock.spend(50.0))}
    turns, failed = interleaved(contestants, clock, 0.0)
    assert [turn.ms for turn in turns.pop("good")] == [50.0] * FEWEST_ROUNDS
    assert turns == {}
    assert failed == {"bad": "no such kernel"}
    assert len(runs) == good_runs + 1


def test_a_reason_may_end_everything() -> None:
    def fail() -> None:
        raise RuntimeError("first")

    def why(error: Exception) -> str:
        raise KeyError("second") from error

    with pytest.raises(KeyError, match="second"):
        interleaved({"bad": Contestant(fail)}, FakeClock(), 0.0, why)


def test_a_budget_makes_an_even_number_of_rounds_and_turns_of_equal_length() -> None:
    estimates = {"slow": Turn(20.0, 50.0), "fast": Turn(1.0, 50.0)}
    planned = plan(estimates, clear_ms=1.0, budget_s=1.5)
    assert planned.calls == {"slow": 6, "fast": 62}
    assert planned.clears == 1
    assert planned.rounds == 6  # of 250 ms each
    assert plan(estimates, 1.0, 0.0).rounds == FEWEST_ROUNDS


@pytest.mark.parametrize(("ms", "calls"), [(0.0, MOST_CALLS), (0.001, MOST_CALLS), (500.0, 1)])
def test_a_turn_has_at_least_one_call_and_no_more_than_the_queue_takes(ms, calls) -> None:
    assert plan({"a": Turn(ms, 1.0)}, 0.0, 0.0).calls == {"a": calls}


@pytest.mark.parametrize(
    ("estimate", "clears"),
    [
        (Turn(1.0, 50.0), 1),  # the device's own time
        (Turn(0.03, 50.0), 1),  # 62 us of head start
        (Turn(0.2, 200.0), 3),  # in the host's time, since the device waited for it
    ],
)
def test_the_cache_is_cleared_until_the_host_is_ahead_of_the_device(estimate, clears) -> None:
    others = {"a": Turn(1.0, 50.0), "b": estimate}
    assert plan(others, clear_ms=0.1, budget_s=0.0).clears == clears


def test_a_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_host_time_is_of_one_call_and_begins_with_an_empty_queue(monkeypatch) -> None:
    now, log = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def call() -> None:
        log.append("call")
        now[0] += 3e-6

    assert host_microseconds(call, lambda: log.append("drain"), 2, 1) == pytest.approx(3.0)
    assert log == ["drain", "call", "call"] * 2 + ["drain"]
    turn = HostClock().turn(call, 4)
    assert (turn.ms, turn.host_us) == (pytest.approx(3e-3), pytest.approx(3.0))


class Device:
    """Stands in for `torch.cuda`: a queue that runs while the host is in `synchronize`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.queue = 0.0, []
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                device.queue.append((self, 0.0))

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Buffer:
            def zero_(self) -> None:
                device.queue.append((None, 0.125))

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch, "empty", lambda *_, **__: Buffer())

    def synchronize(self) -> None:
        for event, ms in self.queue:
            self.now += ms
            if event is not None:
                event.at = self.now
        self.queue.clear()


def test_a_call_on_the_gpu_lies_between_its_events_and_clearing_the_cache_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(monkeypatch)
    clock = CudaClock()
    assert clock.clear_ms == 0.125
    turn = clock.turn(lambda: device.queue.append((None, 2.0)), 10, clears=3)
    assert turn.ms == 2.0
    assert device.now == 20 * 0.25 + 10 * (3 * 0.125 + 2.0)


def test_the_first_third_of_a_turn_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    clock, times = CudaClock(), iter([9.0] * 3 + [1.0] * 3 + [1.5] + [2.0] * 3)
    turn = clock.turn(lambda: device.queue.append((None, next(times))), 10)
    assert turn.ms == 1.5


def test_events_suffice_for_the_longest_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    device, calls = Device(monkeypatch), []
    CudaClock().turn(lambda: calls.append(1), MOST_CALLS)
    assert len(calls) == MOST_CALLS
    assert device.queue == []
    assert timing.CACHE_BYTES >= 128 << 20  # more than the cache of any GPU so far
