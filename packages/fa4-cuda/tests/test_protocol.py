"""The barriers of the forward kernel, as a model: nobody waits for someone who waits for him.

And nobody multiplies a block that is not yet there, or that the next one has already replaced.

The producer and the consumer warp groups of one thread block use the barriers of
`flash_attention_testkit.barriers` in the order in which producer.cuh and consumer.cuh use those of
pipeline.cuh. A product reads its operands from where it is issued until it is waited for.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import pytest

from flash_attention_testkit.barriers import (
    HangError,
    NamedBarrier,
    Position,
    Program,
    Ring,
    Steps,
)

FULL, CAUSAL, WINDOW = 0, 1, 2
WORK_SLOTS = 4


@dataclass(frozen=True)
class Blocks:
    """ConsumerBlocks: what a warp group computes, and skips on either side."""

    begin: int
    end: int
    skip_first: int
    skip_last: int


@dataclass(frozen=True)
class Tile:
    begin: int
    end: int
    consumers: tuple[Blocks, ...]


@dataclass(frozen=True)
class Shape:
    """What of a row of the tile table the protocol depends on."""

    warpgroups: int
    q_stages: int
    kv_stages: int
    block_n: int
    q_in_registers: bool = False


def tiles_of(shape: Shape, mask: int, seq_q: int, seq_k: int, left: int, right: int) -> list[Tile]:
    """The tiles of one head, as BlockRange and ConsumerBlocks cut them."""

    def block_range(first: int, last: int) -> tuple[int, int]:
        offset = seq_k - seq_q
        low = max(0, first + offset - left) if mask == WINDOW else 0
        high = seq_k if mask == FULL else min(seq_k, last + offset + right + 1)
        begin = low // shape.block_n
        return begin, max(begin + 1, -(-max(high, 0) // shape.block_n))

    tiles = []
    rows = 64 * shape.warpgroups
    for row in reversed(range(0, seq_q, rows)):
        last = min(row + rows, seq_q) - 1
        begin, end = block_range(row, last)
        consumers = []
        for group in range(shape.warpgroups):
            first = row + 64 * group
            if first > last:
                my_begin, my_end = end - 1, end
            else:
                my_begin, my_end = block_range(first, min(first + 63, last))
                my_end = max(min(my_end, end), begin + 1, end - (shape.kv_stages - 1))
                my_begin = max(min(my_begin, my_end - 1), begin)
            consumers.append(Blocks(my_begin, my_end, end - my_end, my_begin - begin))
        tiles.append(Tile(begin, end, tuple(consumers)))
    return tiles


class ThreadBlock(Program):
    """One thread block at work on a list of tiles."""

    def __init__(self, shape: Shape, tiles: list[Tile], *, asks_early: bool = False) -> None:
        super().__init__()
        self.shape, self.tiles, self.asks_early = shape, tiles, asks_early
        self.k = Ring(shape.kv_stages, shape.warpgroups)
        self.v = Ring(shape.kv_stages, shape.warpgroups)
        self.q = [Ring(shape.q_stages, 1) for _ in range(shape.warpgroups)]
        self.work = Ring(WORK_SLOTS, shape.warpgroups)
        self.turns = [NamedBarrier() for _ in range(shape.warpgroups)]
        self.start("producer", self.producer())
        for group in range(shape.warpgroups):
            self.start(f"consumer {group}", self.consumer(group))

    def publish(self, at: Position, number: int) -> Steps:
        yield from at.wait_empty()
        at.buffer.write(number)
        at.fill()

    def producer(self) -> Steps:
        k, v, work = Position(self.k), Position(self.v), Position(self.work)
        q = [Position(ring) for ring in self.q]
        for number, tile in enumerate(self.tiles):
            yield from self.publish(work.step(), number)
            if self.shape.q_stages == 1:
                yield from self.load(k.step(), (number, tile.end - 1))
            for slab in q:
                yield from self.load(slab.step(), number)
            if self.shape.q_stages != 1:
                yield from self.load(k.step(), (number, tile.end - 1))
            for block in reversed(range(tile.begin + 1, tile.end)):
                yield from self.load(k.step(), (number, block - 1))
                yield from self.load(v.step(), (number, block))
            yield from self.load(v.step(), (number, tile.begin))
        yield from self.publish(work.step(), len(self.tiles))  # there are no more

    def pass_turn(self, group: int) -> None:
        self.turns[(group + 1) % self.shape.warpgroups].arrive(group)

    def take_turn(self, group: int) -> Steps:
        yield from self.turns[group].sync(group)
        self.pass_turn(group)

    def pass_by(self, at: Position) -> Steps:
        """A block that only other consumers need."""
        yield from at.wait_full()
        at.free()

    def first_scores(
        self, number: int, group: int, q: Position, k: Position
    ) -> Generator[Any, None, tuple[Position, Position]]:
        """Issue those of a tile; where their Q and K are."""
        mine, query = self.tiles[number].consumers[group], q.step()
        yield from query.take(number)
        for _ in range(mine.skip_first):
            yield from self.pass_by(k.step())
        keys = k.step()
        yield from keys.take((number, mine.end - 1))
        if self.shape.q_in_registers:
            yield
            query.give()
        return query, keys

    def consumer(self, group: int) -> Steps:
        k, v, work = Position(self.k), Position(self.v), Position(self.work)
        q = Position(self.q[group])

        def free_scored(block: int) -> None:
            keys.give()
            if not self.shape.q_in_registers and block == mine.begin:
                query.give()

        if group == self.shape.warpgroups - 1:
            self.pass_turn(group)
        dealt = work.step()
        yield from dealt.take(0)
        query, keys = yield from self.first_scores(0, group, q, k)
        for number, tile in enumerate(self.tiles):
            mine = tile.consumers[group]
            yield  # the first scores
            free_scored(mine.end - 1)
            for _ in range(mine.skip_first):
                yield from self.pass_by(v.step())
                yield from self.take_turn(group)
            for block in reversed(range(mine.begin, mine.end - 1)):
                keys, values = k.step(), v.step()
                yield from keys.take((number, block))
                yield from self.turns[group].sync(group)
                yield from values.take((number, block + 1))
                self.pass_turn(group)
                yield  # the scores
                free_scored(block)
                yield  # the output
                values.give()
            if self.asks_early:
                yield from work.wait_full()
            values = v.step()
            yield from values.take((number, mine.begin))
            yield from self.take_turn(group)
            if mine.skip_last:
                yield  # the output
                values.give()
                for _ in range(mine.skip_last):
                    yield from self.pass_by(k.step())
                    yield from self.take_turn(group)
                    yield from self.pass_by(v.step())
            done, dealt = dealt, work.step()
            yield from dealt.take(number + 1)
            if number + 1 < len(self.tiles):
                query, keys = yield from self.first_scores(number + 1, group, q, k)
            yield  # the output
            if not mine.skip_last:
                values.give()
            done.give()


def random_tiles(shape: Shape, mask: int, chance: random.Random) -> list[Tile]:
    tiles: list[Tile] = []
    for _ in range(chance.randint(1, 3)):
        tiles += tiles_of(
            shape,
            mask,
            seq_q=chance.choice([1, 50, 64, 100, 300, 512]),
            seq_k=chance.choice([0, 1, 100, 128, 300, 1500]),
            left=chance.choice([0, 10, 200, 1000]),
            right=chance.choice([0, 0, 50]),
        )
    chance.shuffle(tiles)
    return tiles[:6]


def test_no_tile_of_the_table_can_hang(planner: Any) -> None:
    for row, tile in enumerate(planner.tiles()):
        for trial in range(12):
            chance = random.Random(1000 * row + trial)
            shape = Shape(
                warpgroups=tile.block_m // 64,
                q_stages=tile.q_stages,
                kv_stages=tile.kv_stages,
                block_n=tile.block_n,
                q_in_registers=bool(trial % 2),
            )
            tiles = random_tiles(shape, tile.mask, chance)
            ThreadBlock(shape, tiles).run(trial)


@pytest.mark.parametrize("mask", [FULL, CAUSAL, WINDOW])
def test_rows_that_need_few_blocks_cannot_hang(mask: int) -> None:
    for trial in range(40):
        chance = random.Random(trial)
        shape = Shape(
            warpgroups=chance.choice([2, 3]),
            q_stages=chance.choice([1, 2]),
            kv_stages=chance.choice([2, 3, 4]),
            block_n=chance.choice([64, 80, 128]),
            q_in_registers=chance.random() < 0.5,
        )
        tiles = random_tiles(shape, mask, chance)
        ThreadBlock(shape, tiles).run(trial)


def test_asking_for_the_next_tile_before_the_last_turn_hangs() -> None:
    # What the kernel once did: the model must be able to say so.
    shape = Shape(warpgroups=3, q_stages=2, kv_stages=3, block_n=128)
    tiles = tiles_of(shape, FULL, seq_q=512, seq_k=512, left=0, right=0)
    with pytest.raises(HangError):
        ThreadBlock(shape, tiles, asks_early=True).run(0)
    ThreadBlock(shape, tiles).run(0)
