"""The barriers of the backward kernels, as a model: nobody hangs, and nobody writes what is read.

The threads that load, the consumer warp groups and the warps that take dQ away use the barriers of
`flash_attention_testkit.barriers` in the order in which backward_pipeline.cuh,
backward_by_keys.cuh, backward_wide_keys.cuh and backward_wide_queries.cuh use theirs. A product
reads its operands from where it is issued until a wait covers it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

from flash_attention_testkit.barriers import (
    Buffer,
    HangError,
    NamedBarrier,
    Position,
    Program,
    RaceError,
    Ring,
    Steps,
)

BY_KEYS, BY_GRADIENTS = 0, 1


@dataclass(frozen=True)
class Shape:
    """What of a row of the tile table the protocol depends on."""

    split: int
    q_stages: int
    do_stages: int


@dataclass(frozen=True)
class Block:
    """A block of keys: who sees it, in steps, some of which end behind a packed sequence."""

    tails: tuple[bool, ...]
    key_tail: bool

    @property
    def steps(self) -> int:
        return len(self.tails)


def cleared(content: object, by: Iterable[int]) -> object:
    """What is left of a block once those warp groups have cleared rows in it that are others'."""
    groups = frozenset(by)
    return (content, groups) if groups else content


def clear(at: Position, content: object, group: int) -> Steps:
    """Have a warp group clear rows that are others'; the other one may have done so already."""
    by_other = cleared(content, {1 - group})
    is_second = at.buffer.content == [by_other]
    at.buffer.begin_read(by_other if is_second else content)
    at.buffer.end_read()
    at.buffer.write(cleared(content, {0, 1} if is_second else {group}))
    yield


class Operand(NamedTuple):
    """A buffer, and what has to be in it."""

    buffer: Buffer
    content: object

    def read(self) -> Steps:
        return self.buffer.read(self.content)


class Products:
    """wgmma of one warp group: a group after the other, each reading until it is waited for."""

    def __init__(self) -> None:
        self.pending: list[tuple[Operand, ...]] = []

    def issue(self, *operands: Operand) -> None:
        for buffer, content in operands:
            buffer.begin_read(content)
        self.pending.append(operands)

    def wait(self, left: int) -> Steps:
        yield
        while len(self.pending) > left:
            for buffer, _ in self.pending.pop(0):
                buffer.end_read()


LAST = -1


class Model(Program):
    """One thread block: what every kernel does."""

    def __init__(self, tile_readers: int) -> None:
        super().__init__()
        self.tiles = Ring(2, tile_readers)

    def _deal_tile(self, number: int, at: Position) -> Steps:
        yield from at.wait_empty()
        at.buffer.write(number)
        at.fill()

    def _read_tile(self, at: Position) -> Generator[Any, None, int]:
        here = at.step()
        yield from here.wait_full()
        (number,) = here.buffer.content
        assert isinstance(number, int)
        yield from here.buffer.read(number)
        here.free()
        return number


class ThreadBlock(Model):
    """One thread block at work on blocks of keys; `flaw` names what it does wrong."""

    def __init__(self, shape: Shape, blocks: list[Block], flaw: str = "") -> None:
        has_takers = shape.split != BY_GRADIENTS
        # Read by the consumers, by who loads dO and by who takes dQ away.
        super().__init__(tile_readers=5 if has_takers else 3)
        self.shape, self.blocks, self.flaw = shape, blocks, flaw
        self.q = Ring(shape.q_stages, 2)
        self.grad_out = Ring(shape.do_stages, 2)
        sharers = 2 if has_takers else 1
        self.k, self.v = Ring(1, sharers), Ring(1, sharers)
        # By keys: each warp group writes half of a dS.
        one_ds = flaw == "has one dS"
        self.ds_ring = Ring(2, readers=2, writers=2)
        self.ds_ring.buffers = [Buffer(2)] * 2 if one_ds else [Buffer(2) for _ in range(2)]
        self.p_ring = Ring(shape.q_stages, readers=1)  # by gradients
        self.dq = [Buffer() for _ in range(2)]
        self.all_cleared = NamedBarrier()
        self.dq_full, self.dq_empty = ([NamedBarrier() for _ in range(2)] for _ in range(2))
        self.added: list[object] = []
        self.start("loads K and Q", self.load_queries())
        self.start("loads V and dO", self.load_gradients())
        if shape.split == BY_GRADIENTS:
            self.start("computes dV", self.compute_dv())
            self.start("computes dK", self.compute_dk())
        else:
            for group in range(2):
                self.start(f"consumer {group}", self.consume_by_keys(group))
                self.start(f"takes dQ of {group} away", self.take_dq_away(group))

    # ---- who loads

    def _load_tile(self, number: int, keys: Position, queries: Position) -> Steps:
        steps = self.blocks[number].steps
        if steps:
            yield from self.load(keys.step(), number)
        for step in range(steps):
            yield from self.load(queries.step(), (number, step))

    def load_queries(self) -> Steps:
        tile_at, k, q = Position(self.tiles), Position(self.k), Position(self.q)
        for number in [*range(len(self.blocks)), LAST]:
            yield from self._deal_tile(number, tile_at.step())
            if number != LAST:
                yield from self._load_tile(number, k, q)

    def load_gradients(self) -> Steps:
        tile_at, v, grad_out = Position(self.tiles), Position(self.v), Position(self.grad_out)
        while (number := (yield from self._read_tile(tile_at))) != LAST:
            yield from self._load_tile(number, v, grad_out)

    def take_dq_away(self, group: int) -> Steps:
        tile_at, source = Position(self.tiles), self.dq[group]
        while (number := (yield from self._read_tile(tile_at))) != LAST:
            for step in range(self.blocks[number].steps):
                self.dq_empty[group].arrive("taker")
                yield from self.dq_full[group].sync("taker")
                content = (number, step)
                if self.flaw == "lets go of dQ before it is read":
                    self.start("reads dQ late", source.read(content))
                    continue
                yield from source.read(content)
                self.added.append((group, content))

    # ---- what all consumers do

    def _keys(self, at: Position, number: int, by: Iterable[int] = ()) -> Operand:
        return Operand(at.buffer, cleared(number, by if self.blocks[number].key_tail else ()))

    def _rows(self, at: Position, number: int, step: int, by: Iterable[int]) -> Operand:
        tail = self.blocks[number].tails[step]
        return Operand(at.buffer, cleared((number, step), by if tail else ()))

    def _hand_over_dq(self, group: int, number: int, step: int) -> Steps:
        yield from self.dq_empty[group].sync("owner")
        self.dq[group].write((number, step))
        yield
        self.dq_full[group].arrive("owner")

    def _end_tile(self, *rings: Position) -> None:
        for at in rings:
            at.step().free()

    # ---- backward_by_keys.cuh

    def consume_by_keys(self, group: int) -> Steps:
        tile_at, products = Position(self.tiles), Products()
        both = {0, 1}
        q, grad_out = Position(self.q), Position(self.grad_out)
        k, v = Position(self.k), Position(self.v)
        ds = Position(self.ds_ring)

        def rows(at: Position, step: int) -> Operand:
            return self._rows(at, number, step, both)

        def clear_tail(at: Position, content: object, tail: bool) -> Steps:
            if tail:
                yield from clear(at, content, group)
                if self.flaw != "reads what the other clears":
                    yield from self.all_cleared.sync(group)

        def issue_s(step: int) -> Steps:
            yield from q.wait_full()
            yield from clear_tail(q, (number, step), block.tails[step])
            products.issue(self._keys(k, number, both), rows(q, step))

        def issue_dq_dk(at: Position, step: int) -> Steps:
            here = ds.step()
            if self.flaw != "does not wait for the other's dS":
                yield from here.wait_full()
            products.issue(Operand(here.buffer, (number, step)), self._keys(k, number, both))
            products.issue(rows(at, step))

        def issue_dp_dv(step: int) -> Steps:
            yield from grad_out.wait_full()
            yield from clear_tail(grad_out, (number, step), block.tails[step])
            products.issue(self._keys(v, number), rows(grad_out, step))
            products.issue(rows(grad_out, step))
            yield from products.wait(1)

        def make_ds(step: int) -> Steps:
            yield from rows(grad_out, step).read()  # delta lies beside dO
            ds.buffer.write((number, step), group)
            ds.fill()
            yield from products.wait(0)
            grad_out.step().free()

        while (number := (yield from self._read_tile(tile_at))) != LAST:
            block = self.blocks[number]
            if not block.steps:
                continue
            yield from k.wait_full()
            yield from clear_tail(k, number, block.key_tail)
            yield from issue_s(0)
            yield from v.wait_full()
            yield from products.wait(0)
            yield from rows(q, 0).read()  # lse lies beside Q
            yield from issue_dp_dv(0)
            yield from make_ds(0)
            for step in range(1, block.steps):
                before = q.step()
                if self.flaw == "frees Q before dK":
                    before.free()
                yield from issue_s(step)
                yield from issue_dq_dk(before, step - 1)
                yield from products.wait(2)
                yield from rows(q, step).read()
                yield from products.wait(1)
                yield from self._hand_over_dq(group, number, step - 1)
                yield from issue_dp_dv(step)
                if self.flaw != "frees Q before dK":
                    before.free()
                yield from make_ds(step)
            yield from issue_dq_dk(q, block.steps - 1)
            if self.flaw == "frees K before dQ":
                self._end_tile(k, v)
            yield from products.wait(0)
            yield from self._hand_over_dq(group, number, block.steps - 1)
            self._end_tile(*((q,) if self.flaw == "frees K before dQ" else (q, k, v)))

    # ---- backward_wide_keys.cuh

    def compute_dv(self) -> Steps:
        tile_at, products = Position(self.tiles), Products()
        q, grad_out, p = Position(self.q), Position(self.grad_out), Position(self.p_ring)
        k = Position(self.k)

        def rows(at: Position, step: int) -> Operand:
            return self._rows(at, number, step, {0})

        def clear_tails(step: int) -> Steps:
            if block.tails[step]:
                yield from grad_out.wait_full()
                for at in (q, grad_out):
                    yield from clear(at, (number, step), group=0)

        def issue_s(step: int) -> Steps:
            yield from q.wait_full()
            yield from clear_tails(step)
            products.issue(self._keys(k, number), rows(q, step))

        def make_p(step: int) -> Steps:
            yield from rows(q, step).read()  # lse lies beside Q
            q.step().free()
            here = p.step()
            if self.flaw == "hands P over before it is whole":
                here.fill()
            here.buffer.write(None)
            yield
            here.buffer.write((number, step))
            if self.flaw != "hands P over before it is whole":
                here.fill()

        def issue_dv(at: Position, step: int) -> Steps:
            yield from at.wait_full()
            products.issue(rows(at, step))

        def finish_dv(at: Position) -> Steps:
            if self.flaw == "frees dO before dV":
                at.free()
            yield from products.wait(0)
            if self.flaw != "frees dO before dV":
                at.free()

        while (number := (yield from self._read_tile(tile_at))) != LAST:
            block = self.blocks[number]
            if not block.steps:
                continue
            yield from k.wait_full()
            yield from issue_s(0)
            yield from products.wait(0)
            yield from make_p(0)
            for step in range(1, block.steps):
                before = grad_out.step()
                yield from issue_s(step)
                yield from issue_dv(before, step - 1)
                if self.flaw == "frees K before S" and step == block.steps - 1:
                    k.step().free()
                yield from products.wait(1)
                yield from make_p(step)
                yield from finish_dv(before)
            if self.flaw != "frees K before S" or block.steps == 1:
                k.step().free()
            yield from issue_dv(grad_out, block.steps - 1)
            yield from finish_dv(grad_out.step())

    def compute_dk(self) -> Steps:
        tile_at, products = Position(self.tiles), Products()
        q, grad_out, p = Position(self.q), Position(self.grad_out), Position(self.p_ring)
        v = Position(self.v)

        def rows(at: Position, step: int) -> Operand:
            return self._rows(at, number, step, {0})

        while (number := (yield from self._read_tile(tile_at))) != LAST:
            block = self.blocks[number]
            if not block.steps:
                continue
            yield from v.wait_full()
            for step in range(block.steps):
                if block.tails[step] and self.flaw != "reads what the other clears":
                    yield from p.wait_full()
                yield from grad_out.wait_full()
                products.issue(self._keys(v, number), rows(grad_out, step))
                if self.flaw == "frees V before dP" and step == block.steps - 1:
                    v.step().free()
                yield from q.wait_full()
                if self.flaw != "does not wait for P":
                    yield from p.wait_full()
                if self.flaw == "frees Q before it has read P":
                    q.free()
                yield from Operand(p.buffer, (number, step)).read()
                yield from products.wait(0)
                yield from rows(grad_out, step).read()  # delta lies beside dO
                grad_out.step().free()
                products.issue(rows(q, step))
                if self.flaw == "frees Q before dK":
                    q.free()
                yield from products.wait(0)
                if not self.flaw.startswith("frees Q"):
                    q.free()
                q.step()
                p.step()
            if self.flaw != "frees V before dP":
                v.step().free()


@dataclass(frozen=True)
class Rows:
    """A block of queries: the keys that it sees, in blocks, and of those each warp group's rows."""

    blocks: int
    own: tuple[tuple[int, int], tuple[int, int]]  # [begin, end); none if they are the same
    tail: bool  # the last of the blocks ends behind a packed sequence


class QueryThreadBlock(Model):
    """One thread block of dQ's own kernel, backward_wide_queries.cuh."""

    def __init__(self, k_stages: int, v_stages: int, work: list[Rows], flaw: str = "") -> None:
        super().__init__(tile_readers=3)  # the consumers, and who loads dO
        self.work, self.flaw = work, flaw
        self.k, self.v = Ring(k_stages, 2), Ring(v_stages, 2)
        self.q, self.grad_out = ([Ring(1, 1) for _ in range(2)] for _ in range(2))
        self.all_cleared = NamedBarrier()
        self.done: list[object] = []
        self.start("loads K and Q", self.load_queries())
        self.start("loads V and dO", self.load_gradients())
        for group in range(2):
            self.start(f"consumer {group}", self.compute_dq(group))

    def _load_tile(self, number: int, keys: Position, slabs: list[Position]) -> Steps:
        for block in range(self.work[number].blocks):
            yield from self.load(keys.step(), (number, block))
            if block == 0:
                for slab in slabs:
                    yield from self.load(slab.step(), number)

    def load_queries(self) -> Steps:
        tile_at, k, slabs = Position(self.tiles), Position(self.k), [Position(q) for q in self.q]
        for number in [*range(len(self.work)), LAST]:
            yield from self._deal_tile(number, tile_at.step())
            if number != LAST:
                yield from self._load_tile(number, k, slabs)

    def load_gradients(self) -> Steps:
        tile_at, v = Position(self.tiles), Position(self.v)
        slabs = [Position(grad_out) for grad_out in self.grad_out]
        while (number := (yield from self._read_tile(tile_at))) != LAST:
            yield from self._load_tile(number, v, slabs)

    def compute_dq(self, group: int) -> Steps:
        tile_at, products = Position(self.tiles), Products()
        k, v = Position(self.k), Position(self.v)
        q, grad_out = Position(self.q[group]), Position(self.grad_out[group])

        def keys(at: Position, block: int) -> Operand:
            is_cleared = rows.tail and block == rows.blocks - 1
            return Operand(at.buffer, cleared((number, block), {0, 1} if is_cleared else ()))

        def wait_for_k(block: int, *, passing: bool = False) -> Steps:
            yield from k.wait_full()
            if rows.tail and block == rows.blocks - 1:
                if passing and self.flaw == "does not clear what it passes by":
                    return
                yield from clear(k, (number, block), group)
                if self.flaw != "reads what the other clears":
                    yield from self.all_cleared.sync(group)

        def pass_by(begin: int, end: int) -> Steps:
            for block in range(begin, end):
                if self.flaw != "passes by what is not there yet":
                    yield from wait_for_k(block, passing=True)
                k.step().free()
                if self.flaw != "passes by what is not there yet":
                    yield from v.wait_full()
                v.step().free()

        def slab(at: Position) -> Operand:
            return Operand(at.buffer, number)

        def make_ds() -> Steps:
            v.step().free()
            yield from slab(grad_out).read()  # delta lies beside dO

        def issue_dp(block: int) -> Steps:
            yield from v.wait_full()
            products.issue(slab(grad_out), Operand(v.buffer, (number, block)))
            if self.flaw == "frees dO before dP" and block == rows.own[group][1] - 1:
                grad_out.free()

        while (number := (yield from self._read_tile(tile_at))) != LAST:
            rows = self.work[number]
            begin, end = rows.own[group]
            if begin == end:
                yield from pass_by(0, rows.blocks)
                if rows.blocks:
                    yield from q.wait_full()
                    yield from grad_out.wait_full()
            else:
                yield from pass_by(0, begin)
                yield from wait_for_k(begin)
                yield from q.wait_full()
                products.issue(slab(q), keys(k, begin))
                yield from grad_out.wait_full()
                yield from products.wait(0)
                yield from slab(q).read()  # lse lies beside Q
                yield from issue_dp(begin)
                yield from products.wait(0)
                yield from make_ds()
                for block in range(begin + 1, end):
                    before = k.step()
                    yield from wait_for_k(block)
                    products.issue(slab(q), keys(k, block))
                    products.issue(keys(before, block - 1))
                    if self.flaw == "frees K before dQ":
                        before.free()
                    yield from products.wait(1)
                    yield from slab(q).read()
                    yield from issue_dp(block)
                    yield from products.wait(1)
                    if self.flaw != "frees K before dQ":
                        before.free()
                    if self.flaw == "frees V before dP":
                        v.step().free()
                        yield from products.wait(0)
                    else:
                        yield from products.wait(0)
                        yield from make_ds()
            if rows.blocks:
                q.step().free()
                here = grad_out.step()
                if self.flaw != "frees dO before dP":
                    here.free()
            if begin != end:
                products.issue(keys(k, end - 1))
                yield from products.wait(0)
                k.step().free()
                yield from pass_by(end, rows.blocks)
            self.done.append((number, group))


def random_blocks(chance: random.Random) -> list[Block]:
    packed = chance.random() < 0.5
    blocks = []
    for _ in range(chance.choice([0, 1, 2, 4])):
        steps = chance.choice([0, 1, 2, 3, 5, 9])
        tails = tuple(packed and chance.random() < 0.4 for _ in range(steps))
        blocks.append(Block(tails, key_tail=packed and chance.random() < 0.5))
    return blocks


def random_rows(chance: random.Random) -> list[Rows]:
    def part(blocks: int) -> tuple[int, int]:
        begin = chance.randint(0, blocks)
        return begin, chance.randint(begin, blocks)

    work = []
    for _ in range(chance.choice([0, 1, 2, 4])):
        blocks = chance.choice([0, 1, 2, 3, 5, 8])
        whole = (0, blocks)
        # As under a causal mask, in a window, or behind the last query.
        own = (chance.choice([whole, part(blocks)]), chance.choice([whole, part(blocks)]))
        work.append(Rows(blocks, own, tail=blocks > 0 and chance.random() < 0.4))
    return work


def test_no_tile_of_the_table_hangs_or_races(planner: Any) -> None:
    for row, tile in enumerate(planner.backward_tiles()):
        if tile.split == BY_GRADIENTS:
            gradients_neither_hang_nor_race(tile.q_stages, tile.k_stages, tile.v_stages, trials=40)
            continue
        for trial in range(40):
            chance = random.Random(1000 * row + trial)
            blocks = random_blocks(chance)
            thread_block = ThreadBlock(Shape(BY_KEYS, tile.q_stages, tile.do_stages), blocks)
            thread_block.run(trial)
            assert len(thread_block.added) == 2 * sum(block.steps for block in blocks)


def gradients_neither_hang_nor_race(
    stages: int, k_stages: int, v_stages: int, *, trials: int
) -> None:
    for trial in range(trials):
        chance = random.Random(trial)
        ThreadBlock(Shape(BY_GRADIENTS, stages, stages), random_blocks(chance)).run(trial)
        work = random_rows(chance)
        thread_block = QueryThreadBlock(k_stages, v_stages, work)
        thread_block.run(trial)
        assert sorted(thread_block.done) == [(n, g) for n in range(len(work)) for g in range(2)]


@pytest.mark.parametrize(("stages", "k_stages", "v_stages"), [(2, 2, 1), (3, 3, 2), (4, 4, 3)])
def test_kernels_of_a_gradient_each_neither_hang_nor_race(
    stages: int, k_stages: int, v_stages: int
) -> None:
    gradients_neither_hang_nor_race(stages, k_stages, v_stages, trials=200)


def test_other_stages_neither_hang_nor_race() -> None:
    for trial in range(300):
        chance = random.Random(trial)
        shape = Shape(
            BY_KEYS, q_stages=chance.choice([2, 3, 4]), do_stages=chance.choice([1, 2, 3])
        )
        ThreadBlock(shape, random_blocks(chance)).run(trial)


def test_one_stage_of_q_hangs() -> None:
    # Scores of the next step are asked for before dK of this one lets go of its Q.
    block = Block(tails=(False, False), key_tail=False)
    with pytest.raises(HangError):
        ThreadBlock(Shape(BY_KEYS, q_stages=1, do_stages=2), [block]).run(0)


def test_one_stage_of_the_gradient_hangs_where_rows_of_others_are_cleared() -> None:
    # They are in the next step's Q and dO, before dV of this one lets go of its dO.
    block = Block(tails=(False, True), key_tail=False)
    with pytest.raises(HangError):
        ThreadBlock(Shape(BY_GRADIENTS, q_stages=1, do_stages=1), [block]).run(0)


def test_one_stage_of_k_hangs() -> None:
    # Scores of the next block are asked for before dQ of this one lets go of its K.
    with pytest.raises(HangError):
        QueryThreadBlock(1, 1, [Rows(2, ((0, 2), (0, 2)), tail=False)]).run(0)


@pytest.mark.parametrize(
    ("split", "flaw"),
    [
        (BY_KEYS, "has one dS"),
        (BY_KEYS, "does not wait for the other's dS"),
        (BY_KEYS, "frees Q before dK"),
        (BY_KEYS, "frees K before dQ"),
        (BY_KEYS, "reads what the other clears"),
        (BY_KEYS, "lets go of dQ before it is read"),
        (BY_GRADIENTS, "hands P over before it is whole"),
        (BY_GRADIENTS, "does not wait for P"),
        (BY_GRADIENTS, "reads what the other clears"),
        (BY_GRADIENTS, "frees Q before it has read P"),
        (BY_GRADIENTS, "frees Q before dK"),
        (BY_GRADIENTS, "frees dO before dV"),
        (BY_GRADIENTS, "frees K before S"),
        (BY_GRADIENTS, "frees V before dP"),
    ],
)
def test_the_model_tells_what_would_go_wrong(split: int, flaw: str) -> None:
    shape = Shape(split, q_stages=3, do_stages=3 if split == BY_GRADIENTS else 2)
    blocks = [Block((False, True, False, True, False), key_tail=True), Block((False,) * 3, False)]
    assert is_found(lambda: ThreadBlock(shape, 2 * blocks, flaw), RaceError)


@pytest.mark.parametrize(
    ("flaw", "error"),
    [
        ("frees K before dQ", RaceError),
        ("frees V before dP", RaceError),
        ("frees dO before dP", RaceError),
        ("reads what the other clears", RaceError),
        ("passes by what is not there yet", HangError),
        ("does not clear what it passes by", HangError),
    ],
)
def test_the_model_of_dq_tells_what_would_go_wrong(flaw: str, error: type[Exception]) -> None:
    causal = Rows(6, ((0, 5), (0, 6)), tail=True)
    window = Rows(5, ((0, 3), (2, 5)), tail=False)
    assert is_found(lambda: QueryThreadBlock(2, 1, 2 * [causal, window], flaw), error)


def is_found(make: Callable[[], ThreadBlock | QueryThreadBlock], error: type[Exception]) -> bool:
    """Whether some schedule leads to an error."""
    for seed in range(300):
        try:
            make().run(seed)
        except error:
            return True
    return False


def finishes_in_turns(*, resident: int, causal: bool, draws_first: bool) -> bool:
    """Whether all tiles are done where only some thread blocks fit, each leaving at its end.

    Steps of a tile wait for the turn of their block of queries, as in `run_in_turns`; tiles of
    eight heads, eight blocks of keys and of queries each, and twelve thread blocks.
    """
    heads, blocks, grid = 8, 8, 12
    turns = [[0] * blocks for _ in range(heads)]

    def steps_of(tile: int) -> list[tuple[int, int, int]]:  # head, block of queries, turn
        if not causal:
            return [(tile // blocks, m, tile % blocks) for m in range(blocks)]
        n = blocks - 1 - tile // heads  # the last block of keys of every head first
        return [(tile % heads, m, m - n) for m in range(n, blocks)]

    drawn = iter(range(0 if draws_first else grid, heads * blocks + grid))
    waiting = list(range(grid))
    running: list[list[tuple[int, int, int]]] = []
    while waiting or running:
        while waiting and len(running) < resident:
            own = waiting.pop(0)
            tile = next(drawn, heads * blocks) if draws_first else own
            running.append(steps_of(tile) if tile < heads * blocks else [])
        moved = False
        for i, steps in enumerate(running):
            while steps and turns[steps[0][0]][steps[0][1]] == steps[0][2]:
                turns[steps[0][0]][steps[0][1]] += 1
                del steps[0]
                moved = True
            if not steps:
                tile = next(drawn, heads * blocks)
                running[i] = steps_of(tile) if tile < heads * blocks else []
                moved = moved or bool(running[i])
        if any(not steps for steps in running):
            running = [steps for steps in running if steps]
            moved = True
        if not moved:
            return False
    return all(turn > 0 for head in turns for turn in head)


@pytest.mark.parametrize("causal", [False, True])
def test_turns_come_to_an_end_however_few_thread_blocks_are_resident(causal: bool) -> None:
    for resident in range(1, 13):
        assert finishes_in_turns(resident=resident, causal=causal, draws_first=True)
    # A tile of one that is not there yet would be waited for by all who are.
    assert not finishes_in_turns(resident=4, causal=causal, draws_first=False)
