"""The barriers of the forward kernel, as a model: nobody waits for someone who waits for him.

And nobody multiplies a block that is not yet there, or that the next one has already replaced.

The producer and the consumer warp groups of one thread block are coroutines over the barriers of
pipeline.cuh, in the order in which producer.cuh and consumer.cuh use them. They yield while they
wait and are resumed in random order. A run that gets stuck is a deadlock on the GPU, where it would
be a hang without a word.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

FULL, CAUSAL, WINDOW = 0, 1, 2
WORK_SLOTS = 4

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
    """Named barrier of two warp groups: one syncs, the other arrives."""

    arrived: int = 0
    completed: int = 0

    def arrive(self) -> None:
        self.arrived += 1
        if self.arrived == 2:
            self.arrived = 0
            self.completed += 1

    def sync(self) -> Steps:
        before = self.completed
        self.arrive()
        while self.completed == before:
            yield


class Ring:
    """Buffers with a full and an empty barrier each."""

    def __init__(self, stages: int, readers: int) -> None:
        self.stages = stages
        self.full = [Barrier(1) for _ in range(stages)]
        self.empty = [Barrier(readers) for _ in range(stages)]
        self.holds: list[object] = [None] * stages


class Position:
    """RingPosition, with the waits and arrivals at it."""

    def __init__(self, ring: Ring) -> None:
        self.ring, self.count = ring, 0

    @property
    def stage(self) -> int:
        return self.count % self.ring.stages

    @property
    def phase(self) -> int:
        return self.count // self.ring.stages & 1

    def wait_full(self) -> Steps:
        return self.ring.full[self.stage].wait(self.phase)

    def free(self) -> None:
        self.ring.empty[self.stage].arrive()
        self.count += 1

    def load(self, what: object) -> Steps:
        yield from self.ring.empty[self.stage].wait(self.phase ^ 1)
        self.ring.holds[self.stage] = what
        yield
        self.ring.full[self.stage].arrive()
        self.count += 1

    def is_read(self, what: object) -> None:
        assert self.ring.holds[self.stage] == what


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


class ThreadBlock:
    """One thread block at work on a list of tiles."""

    def __init__(self, shape: Shape, tiles: list[Tile], *, asks_early: bool = False) -> None:
        self.shape, self.tiles, self.asks_early = shape, tiles, asks_early
        self.k = Ring(shape.kv_stages, shape.warpgroups)
        self.v = Ring(shape.kv_stages, shape.warpgroups)
        self.q = [Ring(shape.q_stages, 1) for _ in range(shape.warpgroups)]
        self.work = Ring(WORK_SLOTS, shape.warpgroups)
        self.turns = [Turn() for _ in range(shape.warpgroups)]
        self.published: list[Tile | None] = []

    def producer(self) -> Steps:
        k, v, work = Position(self.k), Position(self.v), Position(self.work)
        q = [Position(ring) for ring in self.q]
        for number, tile in enumerate([*self.tiles, None]):
            self.published.append(tile)
            yield from work.load(number)
            if tile is None:
                return
            if self.shape.q_stages == 1:
                yield from k.load((number, tile.end - 1))
            for slab in q:
                yield from slab.load(number)
            if self.shape.q_stages != 1:
                yield from k.load((number, tile.end - 1))
            for block in reversed(range(tile.begin + 1, tile.end)):
                yield from k.load((number, block - 1))
                yield from v.load((number, block))
            yield from v.load((number, tile.begin))

    def consumer(self, group: int) -> Steps:
        k, v, work = Position(self.k), Position(self.v), Position(self.work)
        q = Position(self.q[group])
        following = self.turns[(group + 1) % self.shape.warpgroups]

        def wait_q() -> Steps:
            yield from q.wait_full()
            if self.shape.q_in_registers:
                yield
                q.is_read(number)
                q.ring.empty[q.stage].arrive()

        def wait_first_k(skip: int) -> Steps:
            yield from k.wait_full()
            for _ in range(skip):
                k.free()
                yield from k.wait_full()

        def scores_read(block: int) -> None:
            k.is_read((number, block))
            work.is_read(number)
            if not self.shape.q_in_registers:
                q.is_read(number)

        def free_q_after(block: int) -> None:
            if not self.shape.q_in_registers and block == mine.begin:
                q.ring.empty[q.stage].arrive()

        number = 0
        if group == self.shape.warpgroups - 1:
            following.arrive()
        yield from work.wait_full()
        tile = self.published[0]
        if tile is None:
            return
        yield from wait_q()
        yield from wait_first_k(tile.consumers[group].skip_first)
        while True:
            mine = tile.consumers[group]
            yield  # the first scores
            scores_read(mine.end - 1)
            k.free()
            free_q_after(mine.end - 1)
            for _ in range(mine.skip_first):
                yield from v.wait_full()
                v.free()
                yield from self.turns[group].sync()
                following.arrive()
            for block in reversed(range(mine.begin, mine.end - 1)):
                yield from k.wait_full()
                yield from self.turns[group].sync()
                yield from v.wait_full()
                following.arrive()
                v.is_read((number, block + 1))
                yield  # the scores
                scores_read(block)
                k.free()
                free_q_after(block)
                yield  # the output
                v.is_read((number, block + 1))
                v.free()
            if self.asks_early:
                work.count += 1
                yield from work.wait_full()
                work.count -= 1
            yield from v.wait_full()
            yield from self.turns[group].sync()
            following.arrive()
            v.is_read((number, mine.begin))
            if mine.skip_last:
                yield  # the output
                v.is_read((number, mine.begin))
                v.free()
                for _ in range(mine.skip_last):
                    yield from k.wait_full()
                    k.free()
                    yield from self.turns[group].sync()
                    following.arrive()
                    yield from v.wait_full()
                    v.free()
            q.count += 1
            stored = work.stage
            work.count += 1
            number += 1
            yield from work.wait_full()
            following_tile = self.published[work.count]
            if following_tile is not None:
                yield from wait_q()
                yield from wait_first_k(following_tile.consumers[group].skip_first)
            yield  # the output
            if not mine.skip_last:
                v.is_read((number - 1, mine.begin))
                v.free()
            assert self.work.holds[stored] == number - 1
            self.work.empty[stored].arrive()
            if following_tile is None:
                return
            tile = following_tile

    def finishes(self, seed: int) -> bool:
        """Whether everyone comes to an end under one random schedule."""
        schedule = random.Random(seed)
        actors = [self.producer(), *(self.consumer(g) for g in range(self.shape.warpgroups))]
        idle = 0
        while actors:
            before = self._state()
            actor = schedule.choice(actors)
            try:
                next(actor)
            except StopIteration:
                actors.remove(actor)
                idle = 0
                continue
            idle = idle + 1 if self._state() == before else 0
            # A coroutine passes few points without touching a barrier: so long a rest is for ever.
            if idle > 400:
                return False
        return True

    def _state(self) -> int:
        rings = [self.k, self.v, self.work, *self.q]
        barriers = [b for ring in rings for b in (*ring.full, *ring.empty)]
        return hash(
            (
                tuple((b.pending, b.phase) for b in barriers),
                tuple((t.arrived, t.completed) for t in self.turns),
            )
        )


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
            assert ThreadBlock(shape, tiles).finishes(trial), (row, trial, tiles)


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
        assert ThreadBlock(shape, tiles).finishes(trial), (shape, tiles)


def test_asking_for_the_next_tile_before_the_last_turn_hangs() -> None:
    # What the kernel once did: the model must be able to say so.
    shape = Shape(warpgroups=3, q_stages=2, kv_stages=3, block_n=128)
    tiles = tiles_of(shape, FULL, seq_q=512, seq_k=512, left=0, right=0)
    assert not ThreadBlock(shape, tiles, asks_early=True).finishes(0)
    assert ThreadBlock(shape, tiles).finishes(0)
