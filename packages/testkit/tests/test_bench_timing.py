"""Turns rotate, times are each contestant's own, and who fails drops out with a reason."""

from __future__ import annotations

import contextlib

import pytest

from flash_attention_testkit.bench.timing import (
    Contestant,
    HostClock,
    Spread,
    host_microseconds,
    interleaved,
    order,
    repeats_for,
)


class FakeClock:
    """Time passes only inside of `spend`."""

    def __init__(self) -> None:
        self.now = 0.0

    def spend(self, ms: float) -> None:
        self.now += ms

    def milliseconds(self, run, repeats: int) -> float:
        begin = self.now
        for _ in range(repeats):
            run()
        return (self.now - begin) / repeats

    def drain(self) -> None:
        pass


def test_each_round_begins_with_the_next_contestant() -> None:
    rounds = [order(["a", "b", "c"], turn) for turn in range(4)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
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
        for name, ms in (("a", 1.0), ("b", 2.0))
    }
    times, failed = interleaved(contestants, clock, 3, lambda _ms: 1)
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert failed == {}
    assert "".join(log[-6:]) == "abbaab"


@pytest.mark.parametrize("good_runs", [0, 7])  # in the warm-up, which is 6 runs, and in a round
def test_who_fails_drops_out_and_the_others_go_on(good_runs: int) -> None:
    clock, runs = FakeClock(), []

    def fail() -> None:
        runs.append(1)
        clock.spend(1.0)
        if len(runs) > good_runs:
            raise RuntimeError("no such kernel")

    contestants = {"bad": Contestant(fail), "good": Contestant(lambda: clock.spend(5.0))}
    times, failed = interleaved(contestants, clock, 4, lambda _ms: 1)
    assert times == {"good": [5.0] * 4}
    assert failed == {"bad": "no such kernel"}


@pytest.mark.parametrize(("ms", "repeats"), [(0.0, 100), (0.1, 100), (5.0, 5), (100.0, 3)])
def test_a_turn_lasts_about_as_long_for_slow_and_fast(ms: float, repeats: int) -> None:
    assert repeats_for(ms) == repeats


def test_a_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_host_time_is_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += 3e-6

    assert host_microseconds(call, FakeClock(), calls=10) == pytest.approx(3.0)
    assert HostClock().milliseconds(call, 4) == pytest.approx(3e-3)
