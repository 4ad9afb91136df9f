"""The barriers of the backward kernel, as a model: nobody hangs, and nobody writes what is read.

The threads that load, the consumer warp groups and the warps that take dQ away are coroutines over
the barriers and buffers of backward_pipeline.cuh, in the order in which it, backward_by_keys.cuh
and backward_by_columns.cuh use them. Every yield is a point at which any other may run, chosen at
random. What runs for itself does so here: a copy is an actor of its own, and products read their
operands until a wait covers them.

A buffer knows what is in it: whoever reads says what he expects, and whoever writes must be alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

BY_KEYS, BY_COLUMNS = 0, 1

Steps = Iterator[bool]
"""Yields whether anything has happened since the last time."""


class HangError(Exception):
    """Everyone waits."""


class RaceError(Exception):
    """Something is written while it is read, or read while something else is there."""


def until(condition: Callable[[], bool]) -> Steps:
    moved = True
    while not condition():
        yield moved
        moved = False


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
        return until(lambda: self.phase != parity)


class NamedBarrier:
    """Of two parties, each of which may wait for the other or only let it know."""

    def __init__(self) -> None:
        self.arrived: set[object] = set()
        self.completed = 0

    def arrive(self, who: object) -> None:
        if who in self.arrived:
            raise RaceError(f"{who} arrives twice at one barrier")
        self.arrived.add(who)
        if len(self.arrived) == 2:
            self.arrived.clear()
            self.completed += 1

    def sync(self, who: object) -> Steps:
        before = self.completed
        self.arrive(who)
        return until(lambda: self.completed != before)


@dataclass
class Buffer:
    """A piece of shared memory; `content` is None while it is written."""

    name: str
    content: object = None
    cleared: set[int] = field(default_factory=set)  # by which warp groups, of rows of others
    readers: int = 0

    def _be_alone(self) -> None:
        if self.readers:
            raise RaceError(f"{self.name} is written while {self.content} is read")

    def write(self, content: object) -> None:
        self._be_alone()
        self.content, self.cleared = content, set()

    def clear(self, group: int, expected: object) -> None:
        self._be_alone()
        self._expect(expected)
        self.cleared.add(group)

    def _expect(self, expected: object) -> None:
        if self.content != expected:
            raise RaceError(f"{self.name} holds {self.content} where {expected} is read")

    def begin_read(self, expected: object, cleared_by: set[int]) -> None:
        self._expect(expected)
        if self.cleared != cleared_by:
            raise RaceError(f"{self.name} is read before rows of others are cleared")
        self.readers += 1

    def end_read(self) -> None:
        self.readers -= 1


class Ring:
    """Buffers with a full and an empty barrier each."""

    def __init__(self, name: str, stages: int, readers: int) -> None:
        self.stages = stages
        self.buffers = [Buffer(f"{name}[{i}]") for i in range(stages)]
        self.full = [Barrier(1) for _ in range(stages)]
        self.empty = [Barrier(readers) for _ in range(stages)]


@dataclass
class Position:
    """RingPosition, with the waits and arrivals at it."""

    ring: Ring
    count: int = 0

    @property
    def stage(self) -> int:
        return self.count % self.ring.stages

    @property
    def phase(self) -> int:
        return self.count // self.ring.stages & 1

    @property
    def buffer(self) -> Buffer:
        return self.ring.buffers[self.stage]

    def wait_full(self) -> Steps:
        return self.ring.full[self.stage].wait(self.phase)

    def wait_empty(self) -> Steps:
        return self.ring.empty[self.stage].wait(self.phase ^ 1)

    def fill(self) -> None:
        self.ring.full[self.stage].arrive()

    def free(self) -> None:
        self.ring.empty[self.stage].arrive()

    def before(self) -> Position:
        return Position(self.ring, self.count - 1)


@dataclass(frozen=True)
class Shape:
    """What of a row of the tile table the protocol depends on."""

    split: int
    q_stages: int
    do_stages: int
    panels: int = 2
    dq_before_p: bool = False

    @property
    def copies_dq(self) -> bool:
        return self.split == BY_KEYS


@dataclass(frozen=True)
class Block:
    """A block of keys: who sees it, in steps, some of which end behind a packed sequence."""

    tails: tuple[bool, ...]
    key_tail: bool

    @property
    def steps(self) -> int:
        return len(self.tails)


class Products:
    """wgmma of one warp group: a group after the other, each reading until it is waited for."""

    def __init__(self) -> None:
        self.pending: list[list[Buffer]] = []

    def issue(self, *operands: tuple[Buffer, object, set[int]]) -> None:
        for buffer, expected, cleared_by in operands:
            buffer.begin_read(expected, cleared_by)
        self.pending.append([buffer for buffer, _, _ in operands])

    def wait(self, left: int) -> Steps:
        yield True
        while len(self.pending) > left:
            for buffer in self.pending.pop(0):
                buffer.end_read()


class ThreadBlock:
    """One thread block at work on a block of keys; `flaw` names what it does wrong."""

    def __init__(self, shape: Shape, block: Block, flaw: str = "") -> None:
        self.shape, self.block, self.flaw = shape, block, flaw
        self.q = Ring("Q", shape.q_stages, 2)
        self.grad_out = Ring("dO", shape.do_stages, 2)
        self.k, self.v = Ring("K", 1, 2), Ring("V", 1, 2)
        # Halves by warp group of each of two dS; or P and dS.
        self.exchange = [[Buffer(f"dS[{i}] of {g}") for g in range(2)] for i in range(2)]
        self.p, self.ds = Buffer("P"), Buffer("dS")
        self.dq = [Buffer(f"dQ of {g}") for g in range(2)]
        self.scores_ready, self.ds_ready, self.all_cleared = (NamedBarrier() for _ in range(3))
        self.dq_full, self.dq_empty = ([NamedBarrier() for _ in range(2)] for _ in range(2))
        self.added: list[tuple[int, int]] = []
        self.actors: dict[str, Steps] = {}

    # ---- who loads

    def _copy(self, at: Position, content: object) -> Steps:
        at.buffer.write(None)
        yield True
        at.buffer.write(content)
        at.fill()

    def _load(self, at: Position, content: object) -> Steps:
        yield from at.wait_empty()
        copy = Position(at.ring, at.count)
        self.actors[f"copy {at.buffer.name} {content}"] = self._copy(copy, content)
        at.count += 1
        yield True

    def supply(self, keys: Ring, queries: Ring) -> Steps:
        if self.block.steps:
            yield from self._load(Position(keys), "keys")
        at = Position(queries)
        for step in range(self.block.steps):
            yield from self._load(at, step)

    def take_dq_away(self, group: int) -> Steps:
        for step in range(self.block.steps):
            self.dq_empty[group].arrive("taker")
            yield from self.dq_full[group].sync("taker")
            source = self.dq[group]
            source.begin_read(step, set())
            if self.flaw == "frees dQ before it is read":
                source.end_read()
                self.actors[f"late read of dQ {group} {step}"] = self._late_read(group, step)
                continue
            yield True
            source.end_read()
            self.added.append((group, step))

    def _late_read(self, group: int, step: int) -> Steps:
        yield True
        self.dq[group].begin_read(step, set())
        self.dq[group].end_read()
        self.added.append((group, step))

    # ---- what both splits do

    def _tail(self, step: int) -> bool:
        return self.block.tails[step]

    def _cleared(self, tail: bool, by: set[int]) -> set[int]:
        return by if tail else set()

    def _add_dq(self, group: int, step: int) -> Steps:
        if not self.shape.copies_dq:
            self.added.append((group, step))
            return
        yield from self.dq_empty[group].sync("owner")
        self.dq[group].write(step)
        yield True
        self.dq_full[group].arrive("owner")

    # ---- backward_by_keys.cuh

    def consume_by_keys(self, group: int) -> Steps:
        block, products = self.block, Products()
        if not block.steps:
            return
        both = {0, 1}
        q, grad_out = Position(self.q), Position(self.grad_out)
        k, v = Position(self.k), Position(self.v)
        place = 0
        keys_cleared = self._cleared(block.key_tail, both)

        def operand(at: Position, step: int) -> tuple[Buffer, object, set[int]]:
            return at.buffer, step, self._cleared(self._tail(step), both)

        def clear_tail(at: Position, content: object, tail: bool) -> Steps:
            if tail:
                at.buffer.clear(group, content)
                yield True
                if self.flaw != "reads what the other clears":
                    yield from self.all_cleared.sync(group)

        def issue_s(step: int) -> Steps:
            yield from q.wait_full()
            yield from clear_tail(q, step, self._tail(step))
            products.issue((k.buffer, "keys", keys_cleared), operand(q, step))

        def issue_dq_dk(at: Position, step: int) -> None:
            halves = [(half, step, set[int]()) for half in self.exchange[place]]
            products.issue(*halves, (k.buffer, "keys", keys_cleared))
            products.issue(operand(at, step))

        def issue_dp_dv(step: int) -> Steps:
            yield from grad_out.wait_full()
            yield from clear_tail(grad_out, step, self._tail(step))
            products.issue((v.buffer, "keys", set()), operand(grad_out, step))
            products.issue(operand(grad_out, step))
            yield from products.wait(1)

        def read_rows(at: Position, step: int) -> Steps:  # lse lies beside Q, delta beside dO
            buffer, expected, cleared_by = operand(at, step)
            buffer.begin_read(expected, cleared_by)
            yield True
            buffer.end_read()

        def make_ds(step: int) -> Steps:
            nonlocal place
            yield from read_rows(grad_out, step)
            if self.flaw != "has one dS":
                place ^= 1
            self.exchange[place][group].write(step)
            yield from products.wait(0)
            grad_out.free()
            grad_out.count += 1

        yield from k.wait_full()
        yield from clear_tail(k, "keys", block.key_tail)
        yield from issue_s(0)
        yield from v.wait_full()
        yield from products.wait(0)
        yield from read_rows(q, 0)
        yield from issue_dp_dv(0)
        yield from make_ds(0)
        for step in range(1, block.steps):
            q.count += 1
            if self.flaw == "frees Q before dK":
                q.before().free()
            yield from issue_s(step)
            if self.flaw != "does not wait for the other's dS":
                yield from self.ds_ready.sync(group)
            issue_dq_dk(q.before(), step - 1)
            if not self.shape.dq_before_p:
                yield from products.wait(2)
                yield from read_rows(q, step)
            yield from products.wait(1)
            yield from self._add_dq(group, step - 1)
            if self.shape.dq_before_p:
                yield from read_rows(q, step)
            yield from issue_dp_dv(step)
            if self.flaw != "frees Q before dK":
                q.before().free()
            yield from make_ds(step)
        yield from self.ds_ready.sync(group)
        issue_dq_dk(q, block.steps - 1)
        yield from products.wait(0)
        yield from self._add_dq(group, block.steps - 1)

    # ---- backward_by_columns.cuh: warp group 0 makes P, 1 makes dS

    def consume_by_columns(self, group: int) -> Steps:
        block, products = self.block, Products()
        if not block.steps:
            return
        makes_p = group == 0
        own_panels = (self.shape.panels + 1) // 2 if makes_p else self.shape.panels // 2
        q, grad_out = Position(self.q), Position(self.grad_out)
        k, v = Position(self.k), Position(self.v)
        keys_cleared = self._cleared(block.key_tail, {0})

        def q_operand(at: Position, step: int) -> tuple[Buffer, object, set[int]]:
            return at.buffer, step, self._cleared(self._tail(step), {0})

        def do_operand(step: int) -> tuple[Buffer, object, set[int]]:
            return grad_out.buffer, step, self._cleared(self._tail(step), {1})

        def clear_tail(at: Position, content: object, tail: bool) -> None:
            if tail:
                at.buffer.clear(group, content)

        def issue_s(step: int) -> Steps:
            yield from q.wait_full()
            clear_tail(q, step, self._tail(step))
            yield True
            products.issue((k.buffer, "keys", keys_cleared), q_operand(q, step))

        def issue_dp(step: int) -> Steps:
            yield from grad_out.wait_full()
            clear_tail(grad_out, step, self._tail(step))
            yield True
            products.issue((v.buffer, "keys", set()), do_operand(step))

        def read_rows(operand: tuple[Buffer, object, set[int]]) -> Steps:
            buffer, expected, cleared_by = operand  # lse lies beside Q, delta beside dO
            buffer.begin_read(expected, cleared_by)
            yield True
            buffer.end_read()

        def make_p(step: int) -> Steps:
            yield from read_rows(q_operand(q, step))
            self.p.write(step)

        def multiply_dv(step: int) -> Steps:
            yield from self.scores_ready.sync(group)
            yield from grad_out.wait_full()
            products.issue((self.p, step, set()), do_operand(step))
            if not makes_p:
                self.p.begin_read(step, set())
                yield True
                self.p.end_read()
                yield from products.wait(1)
                yield from read_rows(do_operand(step))
                self.ds.write(step)
            yield from products.wait(0)
            grad_out.free()
            grad_out.count += 1

        def issue_dq_dk(at: Position, step: int) -> Steps:
            yield from self.ds_ready.sync(group)
            yield from at.wait_full()
            issue_dq_panel(step)
            products.issue((self.ds, step, set()), q_operand(at, step))

        def issue_dq_panel(step: int) -> None:
            products.issue((self.ds, step, set()), (k.buffer, "keys", keys_cleared))

        def add_first(step: int) -> Steps:
            yield from products.wait(1)
            yield from self._add_dq(group, step)
            if own_panels > 1:
                issue_dq_panel(step)

        def add_second(step: int) -> Steps:
            if own_panels > 1:
                yield from self._add_dq(group, step)

        yield from k.wait_full()
        yield from v.wait_full()
        if makes_p:
            clear_tail(k, "keys", block.key_tail)
            yield from issue_s(0)
            yield from products.wait(0)
            yield from make_p(0)
        else:
            yield from issue_dp(0)
        yield from multiply_dv(0)
        for step in range(1, block.steps):
            q.count += 1
            if makes_p:
                yield from issue_s(step)
                if self.flaw == "makes P before the other has read the last":
                    yield from products.wait(0)
                    yield from make_p(step)
            yield from issue_dq_dk(q.before(), step - 1)
            if self.flaw == "frees Q before dK":
                q.before().free()
            yield from add_first(step - 1)
            if makes_p:
                if self.flaw != "makes P before the other has read the last":
                    yield from make_p(step)
                yield from products.wait(0)
            else:
                yield from issue_dp(step)
                yield from products.wait(1)
            yield from add_second(step - 1)
            if self.flaw != "frees Q before dK":
                q.before().free()
            yield from multiply_dv(step)
        yield from issue_dq_dk(q, block.steps - 1)
        yield from add_first(block.steps - 1)
        yield from products.wait(0)
        yield from add_second(block.steps - 1)

    def run(self, seed: int) -> None:
        """Until everyone has come to an end, under one random schedule."""
        consume = self.consume_by_keys if self.shape.split == BY_KEYS else self.consume_by_columns
        self.actors = {
            "loads K and Q": self.supply(self.k, self.q),
            "loads V and dO": self.supply(self.v, self.grad_out),
            "consumer 0": consume(0),
            "consumer 1": consume(1),
        }
        if self.shape.copies_dq:
            self.actors |= {f"takes dQ of {g} away": self.take_dq_away(g) for g in range(2)}
        schedule = random.Random(seed)
        waiting: set[str] = set()
        while self.actors:
            name = schedule.choice(sorted(self.actors.keys() - waiting))
            try:
                moved = next(self.actors[name])
            except StopIteration:
                del self.actors[name]
                moved = True
            if moved:
                waiting.clear()
            else:
                waiting.add(name)
            if self.actors and self.actors.keys() <= waiting:
                raise HangError(", ".join(sorted(waiting)))


def random_block(chance: random.Random) -> Block:
    steps = chance.choice([0, 1, 2, 3, 5, 9])
    packed = chance.random() < 0.5
    tails = tuple(packed and chance.random() < 0.4 for _ in range(steps))
    return Block(tails, key_tail=packed and chance.random() < 0.5)


def shape_of(tile: Any) -> Shape:
    panels = -(-tile.head_dim // 64)
    return Shape(tile.split, tile.q_stages, tile.do_stages, panels, bool(tile.dq_before_p))


def test_no_tile_of_the_table_hangs_or_races(planner: Any) -> None:
    for row, tile in enumerate(planner.backward_tiles()):
        shape = shape_of(tile)
        for trial in range(60):
            block = random_block(random.Random(1000 * row + trial))
            thread_block = ThreadBlock(shape, block)
            thread_block.run(trial)
            panels = tile.head_dim // 64 if shape.split == BY_COLUMNS else 2
            assert len(thread_block.added) == panels * block.steps


@pytest.mark.parametrize("split", [BY_KEYS, BY_COLUMNS])
def test_other_stages_neither_hang_nor_race(split: int) -> None:
    for trial in range(200):
        chance = random.Random(trial)
        shape = Shape(
            split,
            q_stages=chance.choice([2, 3, 4]),
            do_stages=chance.choice([1, 2, 3]),
            panels=chance.choice([3, 4]),
            dq_before_p=chance.random() < 0.5,
        )
        ThreadBlock(shape, random_block(chance)).run(trial)


@pytest.mark.parametrize("split", [BY_KEYS, BY_COLUMNS])
def test_one_stage_of_q_hangs(split: int) -> None:
    # Scores of the next step are asked for before dK of this one lets go of its Q.
    block = Block(tails=(False, False), key_tail=False)
    with pytest.raises(HangError):
        ThreadBlock(Shape(split, q_stages=1, do_stages=2, panels=4), block).run(0)


@pytest.mark.parametrize(
    ("split", "flaw"),
    [
        (BY_KEYS, "has one dS"),
        (BY_KEYS, "does not wait for the other's dS"),
        (BY_KEYS, "frees Q before dK"),
        (BY_KEYS, "reads what the other clears"),
        (BY_KEYS, "frees dQ before it is read"),
        (BY_COLUMNS, "frees Q before dK"),
        (BY_COLUMNS, "makes P before the other has read the last"),
    ],
)
def test_the_model_tells_what_would_go_wrong(split: int, flaw: str) -> None:
    shape = Shape(split, q_stages=2, do_stages=2, panels=4)
    block = Block(tails=(False, True, False, True, False, False), key_tail=True)
    for seed in range(100):
        try:
            ThreadBlock(shape, block, flaw).run(seed)
        except RaceError:
            return
    pytest.fail("nothing was found")
