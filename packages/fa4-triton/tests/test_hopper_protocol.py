"""The barriers of the Hopper forward, as a model: nobody waits forever, nobody reads a wrong block.

The producer, its copies and the consumers of one program are coroutines over the barriers of
`kernels/hopper.py`, in the order in which `kernels/hopper_forward.py` uses them. They yield while
they wait and are resumed in random order. What gets stuck here is a hang without a word on a GPU,
and what reads another block than its own is a wrong result now and then.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from fa4_triton.hopper import Situation, choose

Steps = Iterator[None]


@dataclass
class Barrier:
    """mbarrier: flips its phase when all arrivals are in."""

    arrivals: int
    pending: int = field(init=False)
    phase: int = 0

    def __post_init__(self) -> None:
        self.pending = self.arrivals

    def arrive(self) -> None:
        self.pending -= 1
        if self.pending == 0:
            self.pending = self.arrivals
            self.phase ^= 1

    def wait(self, parity: int) -> Steps:
        while self.phase == parity:
            yield


@dataclass
class Turn:
    """Named barrier of two warp groups, one of which waits."""

    arrived: bool = False
    waiting: bool = False

    def arrive(self) -> None:
        assert not self.arrived, "the turn is passed to one who has it"
        self.arrived = True

    def sync(self) -> Steps:
        while not self.arrived:
            yield
        self.arrived = False


class Ring:
    """Slots with a full and an empty barrier each."""

    def __init__(self, slots: int, consumers: int) -> None:
        self.full = [Barrier(1) for _ in range(slots)]
        self.empty = [Barrier(consumers) for _ in range(slots)]
        self.held: list[Any] = [None] * slots


@dataclass
class At:
    """Where one walks in a ring."""

    slots: int
    slot: int = 0
    phase: int = 0

    def step(self) -> None:
        self.slot += 1
        if self.slot == self.slots:
            self.slot, self.phase = 0, self.phase ^ 1

    def copy(self) -> At:
        return At(self.slots, self.slot, self.phase)


# A tile: of each consumer, how many blocks come before those that it sees, and how many it sees.
# All that any of them sees are brought.
Tile = tuple[tuple[int, int], ...]


def brought(tile: Tile) -> int:
    return max(passed + seen for passed, seen in tile)


class Program:
    """One producer, its copies, and the consumers."""

    def __init__(self, tiles: list[Tile], stages: int, own_o: bool) -> None:
        self.tiles, self.own_o = tiles, own_o
        self.consumers = len(tiles[0])
        self.k, self.v = Ring(stages, self.consumers), Ring(stages, self.consumers)
        self.q = Ring(self.consumers, 1)
        self.board = Ring(2, self.consumers)
        self.turns = [Turn() for _ in range(self.consumers)]
        self.stages = stages
        self.copies: list[Steps] = []
        self.done: list[tuple[int, int]] = []

    def load(self, ring: Ring, slot: int, phase: int, what: Any) -> Steps:
        yield from ring.empty[slot].wait(phase ^ 1)
        self.copies.append(self.copy(ring, slot, what))

    @staticmethod
    def copy(ring: Ring, slot: int, what: Any) -> Steps:
        ring.held[slot] = "half written"
        yield
        ring.held[slot] = what
        ring.full[slot].arrive()

    def publish(self, at: At, what: Any) -> Steps:
        yield from self.board.empty[at.slot].wait(at.phase ^ 1)
        self.board.held[at.slot] = what
        self.board.full[at.slot].arrive()
        at.step()

    def producer(self) -> Steps:
        at, board, q_phase = At(self.stages), At(2), 0
        for number, tile in enumerate(self.tiles):
            yield from self.publish(board, number)
            for index in range(brought(tile)):
                yield from self.load(self.k, at.slot, at.phase, (number, index))
                if index == 0:
                    for who in range(self.consumers):
                        yield from self.load(self.q, who, q_phase, (number, who))
                yield from self.load(self.v, at.slot, at.phase, (number, index))
                at.step()
            q_phase ^= 1
            yield  # the counter
        yield from self.publish(board, None)

    def take(self, ring: Ring, at: At, what: Any) -> Steps:
        yield from ring.full[at.slot].wait(at.phase)
        assert ring.held[at.slot] == what

    def release(self, ring: Ring, slot: int, what: Any) -> None:
        assert ring.held[slot] == what, "overwritten while it was read"
        ring.empty[slot].arrive()

    def pass_by(self, who: int, at: At, what: Any) -> Steps:
        """A block that only other consumers see."""
        yield from self.turns[who].sync()
        self.turns[(who + 1) % self.consumers].arrive()
        for ring in (self.k, self.v):
            yield from self.take(ring, at, what)
            self.release(ring, at.slot, what)
        at.step()

    def consumer(self, who: int) -> Steps:
        following = self.turns[(who + 1) % self.consumers]
        if who == self.consumers - 1:
            following.arrive()
        at, board, q_phase = At(self.stages), At(2), 0
        while True:
            yield from self.board.full[board.slot].wait(board.phase)
            number = self.board.held[board.slot]
            self.board.empty[board.slot].arrive()
            board.step()
            if number is None:
                return
            passed, seen = self.tiles[number][who]
            for index in range(passed):
                yield from self.pass_by(who, at, (number, index))
            index = passed
            yield from self.take(self.q, At(self.consumers, who, q_phase), (number, who))
            yield from self.take(self.k, at, (number, index))
            yield from self.turns[who].sync()
            following.arrive()
            yield  # the first scores
            self.release(self.k, at.slot, (number, index))
            for _ in range(seen - 1):
                before = at.copy()
                at.step()
                yield from self.take(self.k, at, (number, index + 1))
                yield from self.turns[who].sync()
                yield from self.take(self.v, before, (number, index))
                following.arrive()
                yield  # the scores
                self.release(self.k, at.slot, (number, index + 1))
                yield  # P V
                self.release(self.v, before.slot, (number, index))
                index += 1
            if self.own_o:
                self.release(self.q, who, (number, who))
            yield from self.take(self.v, at, (number, index))
            yield  # P V
            self.release(self.v, at.slot, (number, index))
            at.step()
            for index in range(passed + seen, brought(self.tiles[number])):
                yield from self.pass_by(who, at, (number, index))
            if not self.own_o:  # the output leaves through Q's block
                self.q.held[who] = "output"
                yield
                self.release(self.q, who, "output")
            q_phase ^= 1
            self.done.append((number, who))

    def run(self, seed: int) -> None:
        """Resume somebody at random until all are done."""
        order = random.Random(seed)
        running: list[Steps] = [self.producer(), *map(self.consumer, range(self.consumers))]
        idle = 0
        while running or self.copies:
            running += self.copies
            self.copies = []
            one = order.choice(running)
            before = self.state()
            try:
                next(one)
            except StopIteration:
                running.remove(one)
            idle = 0 if self.state() != before else idle + 1
            assert idle < 1000 * (len(running) + 1), "everybody waits"

    def state(self) -> Any:
        rings = (self.k, self.v, self.q, self.board)
        return (
            len(self.done),
            len(self.copies),
            [turn.arrived for turn in self.turns],
            [(bar.phase, bar.pending) for ring in rings for bar in (*ring.full, *ring.empty)],
            [list(ring.held) for ring in rings],
        )


def tiles_of(mask: str, consumers: int, order: random.Random) -> list[Tile]:
    count = order.randint(1, 6)
    if mask == "none":
        blocks = order.randint(1, 5)
        return [((0, blocks),) * consumers for _ in range(count)]
    # Rows of 64 on blocks of 64 or 128 keys: with each consumer the last block that is seen moves
    # on by none or one, and in a window the first one too. The last block comes first.
    found = []
    for _ in range(count):
        first, last = 0, order.randint(1, 4)
        ranges = [(first, last)]
        for _ in range(consumers - 1):
            last += order.randint(0, 1)
            if mask == "window":
                first = min(first + order.randint(0, 1), last - 1)
            ranges.append((first, last))
        end = ranges[-1][1]
        found.append(tuple((end - high, high - low) for low, high in ranges))
    return found


SHAPES = sorted(
    {
        (mask, tile.m // 64, tile.stages, tile.own_o)
        for width in (64, 128, 256)
        for mask in ("none", "causal", "window")
        for _, tile in choose(
            Situation("hopper", "3.6.0", None, width, "bf16", mask, "forward", False)
        ).tiles
    }
)


@pytest.mark.parametrize(("mask", "consumers", "stages", "own_o"), SHAPES)
def test_everybody_finishes_every_tile_with_the_right_blocks(
    mask: str, consumers: int, stages: int, own_o: bool
) -> None:
    for seed in range(150):
        tiles = tiles_of(mask, consumers, random.Random(seed))
        program = Program(tiles, stages, own_o)
        program.run(seed)
        everything = [(number, who) for number in range(len(tiles)) for who in range(consumers)]
        assert sorted(program.done) == everything, (seed, tiles)


def test_the_model_finds_a_consumer_that_keeps_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Program.release

    def forgetful(self: Program, ring: Ring, slot: int, what: Any) -> None:
        if ring is not self.v or what != (0, 1):
            kept(self, ring, slot, what)

    monkeypatch.setattr(Program, "release", forgetful)
    with pytest.raises(AssertionError, match="everybody waits"):
        Program([((0, 5), (0, 5))], 2, True).run(0)


def test_the_model_finds_a_block_that_is_released_too_early() -> None:
    class Hasty(Program):
        def take(self, ring: Ring, at: At, what: Any) -> Steps:
            yield from super().take(ring, at, what)
            if ring is self.k:
                ring.empty[at.slot].arrive()  # before it is multiplied

        def release(self, ring: Ring, slot: int, what: Any) -> None:
            assert ring.held[slot] == what, "overwritten while it was read"
            if ring is not self.k:
                ring.empty[slot].arrive()

    def run_some() -> None:
        for seed in range(50):
            Hasty([((0, 5), (0, 5))] * 2, 2, True).run(seed)

    with pytest.raises(AssertionError, match="overwritten while it was read"):
        run_some()
