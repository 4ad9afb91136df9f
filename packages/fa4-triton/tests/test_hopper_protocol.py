"""The barriers of the Hopper forward, as a model: nobody waits forever, nobody reads a wrong block.

The producer, its copies and the consumers of one program use the barriers of
`flash_attention_testkit.barriers` in the order in which `kernels/hopper_forward.py` uses those of
`kernels/hopper.py`. A product reads its operands from where it is issued until it is waited for.
"""

from __future__ import annotations

import random
from typing import Any, TypeAlias

import pytest

from fa4_triton.hopper import Situation, choose
from flash_attention_testkit.barriers import (
    Barrier,
    HangError,
    NamedBarrier,
    Position,
    Program,
    RaceError,
    Ring,
    Steps,
)

Tile: TypeAlias = tuple[tuple[int, int], ...]
"""Of each consumer, how many blocks come before those that it sees, and how many it sees.

All that any of them sees are brought.
"""


def brought(tile: Tile) -> int:
    return max(passed + seen for passed, seen in tile)


class Forward(Program):
    """One producer, its copies, and the consumers."""

    def __init__(self, tiles: list[Tile], stages: int, own_o: bool) -> None:
        super().__init__()
        self.tiles, self.own_o = tiles, own_o
        self.consumers = len(tiles[0])
        self.k, self.v = Ring(stages, self.consumers), Ring(stages, self.consumers)
        self.q = Ring(self.consumers, 1)  # a slot a consumer
        self.board = Ring(2, self.consumers)
        self.turns = [NamedBarrier() for _ in range(self.consumers)]
        self.done: list[tuple[int, int]] = []
        self.start("producer", self.producer())
        for who in range(self.consumers):
            self.start(f"consumer {who}", self.consumer(who))

    def publish(self, at: Position, number: int | None) -> Steps:
        here = at.step()
        yield from here.wait_empty()
        here.buffer.write(number)
        here.fill()

    def producer(self) -> Steps:
        k, v, q = Position(self.k), Position(self.v), Position(self.q)
        board = Position(self.board)
        for number, tile in enumerate(self.tiles):
            yield from self.publish(board, number)
            for index in range(brought(tile)):
                yield from self.load(k.step(), (number, index))
                if index == 0:
                    for who in range(self.consumers):
                        yield from self.load(q.step(), (number, who))
                yield from self.load(v.step(), (number, index))
            yield  # the counter
        yield from self.publish(board, None)

    def pass_turn(self, who: int) -> None:
        self.turns[(who + 1) % self.consumers].arrive(who)

    def scores(self, keys: Position) -> Steps:
        """What is left of S once it is issued."""
        yield
        keys.give()

    def pass_by(self, who: int, k: Position, v: Position, what: Any) -> Steps:
        """A block that only other consumers see."""
        yield from self.turns[who].sync(who)
        self.pass_turn(who)
        for at in (k.step(), v.step()):
            yield from at.take(what)
            at.give()

    def consumer(self, who: int) -> Steps:
        if who == self.consumers - 1:
            self.pass_turn(who)
        k, v, q = Position(self.k), Position(self.v), Position(self.q, who)
        board = Position(self.board)
        while True:
            here = board.step()
            yield from here.wait_full()
            (number,) = here.buffer.content
            here.free()
            if number is None:
                return
            assert isinstance(number, int)
            passed, seen = self.tiles[number][who]
            for index in range(passed):
                yield from self.pass_by(who, k, v, (number, index))
            index = passed
            query, keys = q.step(self.consumers), k.step()
            yield from query.take((number, who))
            yield from keys.take((number, index))
            yield from self.turns[who].sync(who)
            self.pass_turn(who)
            yield from self.scores(keys)
            for _ in range(seen - 1):
                keys, values = k.step(), v.step()
                yield from keys.take((number, index + 1))
                yield from self.turns[who].sync(who)
                yield from values.take((number, index))
                self.pass_turn(who)
                yield from self.scores(keys)
                yield  # P V
                values.give()
                index += 1
            if self.own_o:
                query.give()
            values = v.step()
            yield from values.take((number, index))
            yield  # P V
            values.give()
            for index in range(passed + seen, brought(self.tiles[number])):
                yield from self.pass_by(who, k, v, (number, index))
            if not self.own_o:  # the output leaves through Q's block
                query.buffer.end_read()
                query.buffer.write("output")
                yield from query.buffer.read("output")
                query.free()
            self.done.append((number, who))


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
        program = Forward(tiles, stages, own_o)
        program.run(seed)
        everything = [(number, who) for number in range(len(tiles)) for who in range(consumers)]
        assert sorted(program.done) == everything, (seed, tiles)


def outcome(kind: type[Forward]) -> set[type[Exception]]:
    """What goes wrong in some schedule."""
    found: set[type[Exception]] = set()
    for seed in range(50):
        try:
            kind([((0, 5), (0, 5))] * 2, 2, True).run(seed)
        except (HangError, RaceError) as error:
            found.add(type(error))
    return found


def test_the_model_finds_a_consumer_that_keeps_a_block() -> None:
    class Forgetful(Forward):
        def __init__(self, tiles: list[Tile], stages: int, own_o: bool) -> None:
            super().__init__(tiles, stages, own_o)
            self.v.empty[0] = Barrier(self.consumers + 1)

    assert outcome(Forgetful) == {HangError}


def test_the_model_finds_a_block_that_is_released_too_early() -> None:
    class Hasty(Forward):
        def scores(self, keys: Position) -> Steps:
            keys.free()
            yield
            keys.buffer.end_read()

    assert RaceError in outcome(Hasty)


def test_the_model_finds_a_turn_that_is_not_passed() -> None:
    class Greedy(Forward):
        def pass_turn(self, who: int) -> None:
            if who == 1:
                super().pass_turn(who)

    assert outcome(Greedy) == {HangError}
