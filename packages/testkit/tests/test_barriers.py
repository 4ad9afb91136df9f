"""The model of a kernel's barriers says what goes wrong, and only that."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flash_attention_testkit import barriers
from flash_attention_testkit.barriers import (
    Barrier,
    Buffer,
    HangError,
    NamedBarrier,
    Position,
    Program,
    RaceError,
    Ring,
    Steps,
)

SEEDS = range(100)


class TwoStages(Program):
    """A producer and two consumers, which see the same blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = Ring(slots=2, readers=2)
        self.seen: list[int] = []
        self.start("producer", self.producer())
        for who in range(2):
            self.start(f"consumer {who}", self.consumer())

    def producer(self) -> Steps:
        at = Position(self.keys)
        for tile in range(5):
            yield from self.load(at.step(), tile)

    def consumer(self) -> Steps:
        at = Position(self.keys)
        for tile in range(5):
            here = at.step()
            yield from here.take(tile)
            yield from self.multiply(here)
            self.seen.append(tile)

    def multiply(self, here: Position) -> Steps:
        yield
        here.give()


class FreesFirst(TwoStages):
    def multiply(self, here: Position) -> Steps:
        here.free()
        yield
        here.buffer.end_read()


class FreesNever(TwoStages):
    def multiply(self, here: Position) -> Steps:
        yield
        here.buffer.end_read()


class DoesNotWait(TwoStages):
    def consumer(self) -> Steps:
        at = Position(self.keys)
        for tile in range(5):
            at.buffer.begin_read(tile)
            yield
            at.step().give()


def outcomes(make: Callable[[], Program]) -> set[type[Exception]]:
    found: set[type[Exception]] = set()
    for seed in SEEDS:
        try:
            make().run(seed)
        except (HangError, RaceError) as error:
            found.add(type(error))
    return found


def test_a_right_protocol_comes_to_its_end_in_any_order() -> None:
    for seed in SEEDS:
        program = TwoStages()
        program.run(seed)
        assert sorted(program.seen) == sorted(2 * list(range(5)))


def test_orders_differ_by_their_seed_alone() -> None:
    def order(seed: int) -> list[int]:
        program = TwoStages()
        program.run(seed)
        return program.seen

    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in SEEDS}) > 10


@pytest.mark.parametrize(
    ("make", "error"),
    [(FreesFirst, RaceError), (FreesNever, HangError), (DoesNotWait, RaceError)],
)
def test_a_planted_mistake_is_found(make: Callable[[], Program], error: type[Exception]) -> None:
    assert error in outcomes(make)


def test_who_waits_is_said() -> None:
    with pytest.raises(HangError, match="all wait: producer, consumer 0, consumer 1"):
        FreesNever().run(0)


def is_ready(steps: Steps) -> bool:
    condition = next(steps)
    assert condition is not None
    return condition()


def test_a_phase_takes_all_arrivals() -> None:
    barrier = Barrier(arrivals=2)
    assert not is_ready(barrier.wait(0))
    barrier.arrive()
    assert not is_ready(barrier.wait(0))
    barrier.arrive()
    assert is_ready(barrier.wait(0))
    assert not is_ready(barrier.wait(1))


def test_two_parties_meet_at_a_named_barrier_and_one_may_not_wait() -> None:
    barrier = NamedBarrier()
    first = barrier.sync("first")
    assert not is_ready(first)
    with pytest.raises(RaceError, match="first arrives twice"):
        barrier.arrive("first")
    waiting = barrier.sync("third")
    assert is_ready(waiting)


def test_all_parts_of_a_buffer_must_hold_what_is_read() -> None:
    buffer = Buffer(parts=2)
    buffer.write("dS")
    with pytest.raises(RaceError, match=r"\['dS', None\] is read for dS"):
        buffer.begin_read("dS")
    buffer.write("dS", part=1)
    buffer.begin_read("dS")
    with pytest.raises(RaceError, match="which is read"):
        buffer.write("P")
    buffer.end_read()
    buffer.write("P")


def test_a_ring_flips_its_phase_with_every_round() -> None:
    at = Position(Ring(slots=3, readers=1))
    passed = [at.step() for _ in range(7)]
    assert [here.slot for here in passed] == [0, 1, 2, 0, 1, 2, 0]
    assert [here.phase for here in passed] == [0, 0, 0, 1, 1, 1, 0]
    assert at.step(2).count == 7
    assert at.count == 9


def test_the_example_of_the_module_runs() -> None:
    """Its own text: the indented block of the docstring."""
    text = barriers.__doc__ or ""
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ") or not line]
    exec("\n".join(lines), dict(vars(barriers)))
