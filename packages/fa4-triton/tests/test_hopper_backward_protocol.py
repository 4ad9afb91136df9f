"""The barriers of the Hopper backward, as a model: nobody waits forever, nobody reads what is not
there, and nobody writes what is read.

The producer, its copies and the consumers of one program are coroutines over the barriers and
blocks of `kernels/hopper_backward.py` and `hopper_backward_wide.py`, in the order in which these
use them. Every yield is a point at which any other may run, chosen at random. A product reads its
operands from where it is issued until it is waited for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

Steps = Iterator[None]


class HangError(Exception):
    """Everybody waits."""


class RaceError(Exception):
    """A block is written while it is read, or does not hold what is read."""


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
class Block:
    """A block of shared memory: what it holds, by parts, and who reads it."""

    parts: int = 1
    holds: list[Any] = field(init=False)
    readers: int = 0

    def __post_init__(self) -> None:
        self.holds = [None] * self.parts

    def write(self, what: Any, part: int = 0) -> None:
        if self.readers:
            raise RaceError(f"{what} is written over {self.holds}, which is read")
        self.holds[part] = what

    def read(self, what: Any) -> None:
        """Begin to read all parts."""
        if self.holds != [what] * self.parts:
            raise RaceError(f"{self.holds} is there, not {what}")
        self.readers += 1

    def done(self) -> None:
        self.readers -= 1


class Ring:
    """Blocks with a full and an empty barrier each."""

    def __init__(self, slots: int, consumers: int) -> None:
        self.blocks = [Block() for _ in range(slots)]
        self.full = [Barrier(1) for _ in range(slots)]
        self.empty = [Barrier(consumers) for _ in range(slots)]


class At:
    """Where one walks in a ring."""

    def __init__(self, slots: int) -> None:
        self.slots, self.slot, self.phase = slots, 0, 0

    def step(self) -> tuple[int, int]:
        """Go on; where one was."""
        before = self.slot, self.phase
        self.slot = (self.slot + 1) % self.slots
        self.phase ^= self.slot == 0
        return before


class Program:
    """What the programs have in common. `tiles`: the steps of each."""

    def __init__(self, tiles: list[int]) -> None:
        self.tiles = tiles
        self.board = Ring(2, 3)
        self.copies: list[Steps] = []
        self.finished: list[tuple[int, str]] = []
        self.moves = 0

    def actors(self) -> list[Steps]:
        raise NotImplementedError

    def load(self, ring: Ring, slot: int, phase: int, what: Any) -> Steps:
        yield from ring.empty[slot].wait(phase ^ 1)
        self.copies.append(self.copy(ring, slot, what))

    def copy(self, ring: Ring, slot: int, what: Any) -> Steps:
        ring.blocks[slot].write("half")
        yield
        ring.blocks[slot].write(what)
        ring.full[slot].arrive()

    def take(self, ring: Ring, slot: int, phase: int, what: Any) -> Steps:
        yield from ring.full[slot].wait(phase)
        ring.blocks[slot].read(what)

    @staticmethod
    def give(ring: Ring, slot: int) -> None:
        """Stop reading, and let it be overwritten."""
        ring.blocks[slot].done()
        ring.empty[slot].arrive()

    def publish(self, at: At, what: Any) -> Steps:
        slot, phase = at.step()
        yield from self.board.empty[slot].wait(phase ^ 1)
        self.board.blocks[slot].write(what)
        self.board.full[slot].arrive()

    def published(self, at: At) -> Iterator[Any]:
        slot, phase = at.step()
        yield from self.board.full[slot].wait(phase)
        what = self.board.blocks[slot].holds[0]
        self.board.empty[slot].arrive()
        return what

    def leave(self, block: Block, what: Any) -> Steps:
        """Write a block and have the copy engine read it."""
        block.write(what)
        block.read(what)
        yield
        block.done()

    def run(self, seed: int) -> None:
        order = random.Random(seed)
        running = self.actors()
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
                idle = 0
                continue
            idle = 0 if self.state() != before else idle + 1
            if idle > 1000 * len(running):
                raise HangError

    def state(self) -> Any:
        rings = [ring for ring in vars(self).values() if isinstance(ring, Ring)]
        bars = [bar for ring in rings for bar in (*ring.full, *ring.empty)]
        bars += [*vars(self).get("ds_full", ()), *vars(self).get("p_full", ())]
        blocks = [block for ring in rings for block in ring.blocks]
        return (
            [(bar.phase, bar.pending) for bar in bars],
            [(list(block.holds), block.readers) for block in blocks],
            len(self.copies),
            self.moves,
        )


class ByKeys(Program):
    """`hopper_backward_kernel` and, as `own_dq`, `hopper_wide_dkdv_kernel`."""

    def __init__(self, tiles: list[int], q_stages: int, do_stages: int, sharing: int) -> None:
        super().__init__(tiles)
        self.k, self.v = Ring(1, sharing), Ring(1, sharing)
        self.q, self.do = Ring(q_stages, 2), Ring(do_stages, 2)

    def producers(self) -> list[Steps]:
        return [
            self.producer(self.k, self.q, deals=True),
            self.producer(self.v, self.do, deals=False),
        ]

    def producer(self, keys: Ring, rows: Ring, deals: bool) -> Steps:
        at, key_at, board = At(len(rows.full)), At(1), At(2)
        number = -1
        while True:
            if deals:
                number += 1
                last = number == len(self.tiles)
                yield from self.publish(board, None if last else number)
                if last:
                    return
            else:
                number = yield from self.published(board)
                if number is None:
                    return
            yield from self.load(keys, *key_at.step(), number)
            for step in range(self.tiles[number]):
                yield from self.load(rows, *at.step(), (number, step))
            yield


class Fused(ByKeys):
    """Two consumers with half of the keys each."""

    def __init__(self, tiles: list[int], q_stages: int, do_stages: int) -> None:
        super().__init__(tiles, q_stages, do_stages, sharing=2)
        self.ds = [Block(parts=2) for _ in range(2)]
        self.ds_full = [Barrier(2) for _ in range(2)]
        self.stages = [Block() for _ in range(2)]

    def actors(self) -> list[Steps]:
        return [*self.producers(), self.consumer(0), self.consumer(1)]

    def consumer(self, who: int) -> Steps:
        q, do, ds = At(len(self.q.full)), At(len(self.do.full)), At(2)
        keys, board = At(1), At(2)
        stage = self.stages[who]
        while (number := (yield from self.published(board))) is not None:
            key_slot, key_phase = keys.step()
            yield from self.take(self.k, key_slot, key_phase, number)
            q_before = None
            ds_before = None
            for step in range(self.tiles[number]):
                what = (number, step)
                q_slot, q_phase = q.step()
                yield from self.take(self.q, q_slot, q_phase, what)
                if step:
                    yield from self.dq_and_dk(number, step - 1, ds_before, q_before, stage)
                else:
                    yield from self.take(self.v, key_slot, key_phase, number)
                do_slot, do_phase = do.step()
                yield from self.take(self.do, do_slot, do_phase, what)
                yield  # dP
                ds_slot, ds_phase = ds.step()
                self.ds[ds_slot].write(what, who)
                self.ds_full[ds_slot].arrive()
                yield  # dV
                self.give(self.do, do_slot)
                q_before, ds_before = q_slot, (ds_slot, ds_phase)
            yield from self.dq_and_dk(number, self.tiles[number] - 1, ds_before, q_before, stage)
            self.give(self.k, key_slot)
            self.give(self.v, key_slot)
            for _ in range(2):
                yield from self.leave(stage, "dV, dK")
            self.finished.append((number, str(who)))
            self.moves += 1

    def dq_and_dk(self, number: int, step: int, ds: Any, q_slot: Any, stage: Block) -> Steps:
        slot, phase = ds
        yield from self.ds_full[slot].wait(phase)
        self.ds[slot].read((number, step))
        yield  # dQ
        self.ds[slot].done()
        yield from self.leave(stage, "dQ")
        yield  # dK
        self.give(self.q, q_slot)


class Divided(ByKeys):
    """One consumer for dV, the other for dK."""

    def __init__(self, tiles: list[int]) -> None:
        super().__init__(tiles, 2, 2, sharing=1)
        self.p = [Block() for _ in range(2)]
        self.p_full = [Barrier(1) for _ in range(2)]

    def actors(self) -> list[Steps]:
        return [*self.producers(), self.values(), self.keys()]

    def make_p(self, slot: int, phase: int, what: Any) -> Steps:
        del phase
        self.p[slot].write(what)
        self.p_full[slot].arrive()
        yield

    def take_p(self, slot: int, phase: int, what: Any) -> Steps:
        yield from self.p_full[slot].wait(phase)
        self.p[slot].read(what)
        yield
        self.p[slot].done()

    def values(self) -> Steps:
        """S and P, dV."""
        yield from self.consume(self.k, self.q, self.do, self.make_p, release_after_p=False)

    def keys(self) -> Steps:
        """The scores' gradients dP and dS, dK."""
        yield from self.consume(self.v, self.do, self.q, self.take_p, release_after_p=True)

    def consume(
        self,
        own: Ring,
        scored: Ring,
        multiplied: Ring,
        between: Callable[[int, int, Any], Steps],
        release_after_p: bool,
    ) -> Steps:
        at, keys, board = At(2), At(1), At(2)
        while (number := (yield from self.published(board))) is not None:
            key_slot, key_phase = keys.step()
            yield from self.take(own, key_slot, key_phase, number)
            before = None
            for step in range(self.tiles[number]):
                what = (number, step)
                slot, phase = at.step()
                yield from self.take(scored, slot, phase, what)
                if before is not None:
                    yield from self.take(multiplied, *before, (number, step - 1))
                yield  # scores
                if not release_after_p:
                    self.give(scored, slot)
                yield from between(slot, phase, what)
                if release_after_p:
                    self.give(scored, slot)
                yield  # the gradient
                if before is not None:
                    self.give(multiplied, before[0])
                before = (slot, phase)
            assert before is not None
            yield from self.take(multiplied, *before, (number, self.tiles[number] - 1))
            yield
            self.give(multiplied, before[0])
            own.blocks[key_slot].done()
            yield from self.leave(own.blocks[key_slot], "gradient")
            own.empty[key_slot].arrive()
            self.finished.append((number, "keys" if release_after_p else "values"))
            self.moves += 1


class ByRows(Program):
    """`hopper_wide_dq_kernel`."""

    def __init__(self, tiles: list[int]) -> None:
        super().__init__(tiles)
        self.board = Ring(2, 2)
        self.q, self.do = Ring(2, 1), Ring(2, 1)  # a slot a consumer
        self.k, self.v = Ring(2, 2), Ring(1, 2)

    def actors(self) -> list[Steps]:
        return [self.producer(), self.consumer(0), self.consumer(1)]

    def producer(self) -> Steps:
        k, v, board = At(2), At(1), At(2)
        rows_phase = 0
        for number, blocks in enumerate(self.tiles):
            yield from self.publish(board, number)
            for index in range(blocks):
                yield from self.load(self.k, *k.step(), (number, index))
                if index == 0:
                    for who in range(2):
                        yield from self.load(self.q, who, rows_phase, number)
                yield from self.load(self.v, *v.step(), (number, index))
                if index == 0:
                    for who in range(2):
                        yield from self.load(self.do, who, rows_phase, number)
            rows_phase ^= 1
            yield
        yield from self.publish(board, None)

    def consumer(self, who: int) -> Steps:
        k, v, board = At(2), At(1), At(2)
        rows_phase = 0
        while (number := (yield from self.published(board))) is not None:
            before = None
            for index in range(self.tiles[number]):
                k_slot, k_phase = k.step()
                yield from self.take(self.k, k_slot, k_phase, (number, index))
                if index == 0:
                    yield from self.take(self.q, who, rows_phase, number)
                yield  # S
                v_slot, v_phase = v.step()
                yield from self.take(self.v, v_slot, v_phase, (number, index))
                if index == 0:
                    yield from self.take(self.do, who, rows_phase, number)
                yield  # dQ of the block before
                if before is not None:
                    self.give(self.k, before)
                yield  # dP
                self.give(self.v, v_slot)
                before = k_slot
            self.give(self.do, who)
            yield
            self.give(self.k, before)
            self.q.blocks[who].done()
            yield from self.leave(self.q.blocks[who], "dQ")
            self.q.empty[who].arrive()
            rows_phase ^= 1
            self.finished.append((number, str(who)))
            self.moves += 1


PROGRAMS: dict[str, Callable[[list[int]], Program]] = {
    "fused": lambda tiles: Fused(tiles, 3, 2),
    "fused, a stage each": lambda tiles: Fused(tiles, 2, 1),
    "dK and dV": Divided,
    "dQ": ByRows,
}


def tiles_of(seed: int) -> list[int]:
    order = random.Random(seed)
    return [order.randint(1, 6) for _ in range(order.randint(1, 6))]


@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
def test_everybody_finishes_every_tile_with_the_right_blocks(
    make: Callable[[list[int]], Program],
) -> None:
    for seed in range(150):
        tiles = tiles_of(seed)
        program = make(tiles)
        program.run(seed)
        assert sorted(number for number, _ in program.finished) == sorted(
            2 * list(range(len(tiles)))
        )


def outcome(make: Callable[[list[int]], Program]) -> set[type[Exception]]:
    """What goes wrong in some schedule."""
    found = set()
    for seed in range(150):
        try:
            make(tiles_of(seed)).run(seed)
        except (HangError, RaceError) as error:
            found.add(type(error))
    return found


def test_the_model_finds_one_place_for_ds_instead_of_two() -> None:
    class OnePlace(Fused):
        def __init__(self, tiles: list[int]) -> None:
            super().__init__(tiles, 3, 2)
            self.ds[1] = self.ds[0]

    assert RaceError in outcome(OnePlace)


def test_the_model_finds_a_q_that_is_released_before_dk() -> None:
    class Hasty(Fused):
        def dq_and_dk(self, number: int, step: int, ds: Any, q_slot: Any, stage: Block) -> Steps:
            self.q.empty[q_slot].arrive()
            slot, phase = ds
            yield from self.ds_full[slot].wait(phase)
            yield
            self.q.blocks[q_slot].done()

    assert RaceError in outcome(lambda tiles: Hasty(tiles, 3, 2))


def test_the_model_finds_a_gradient_that_is_kept() -> None:
    class Keeping(Fused):
        @staticmethod
        def give(ring: Ring, slot: int) -> None:
            ring.blocks[slot].done()
            if len(ring.full) != 2:  # dO
                ring.empty[slot].arrive()

    assert HangError in outcome(lambda tiles: Keeping(tiles, 3, 2))


def test_the_model_finds_one_place_for_p_instead_of_two() -> None:
    class OnePlace(Divided):
        def __init__(self, tiles: list[int]) -> None:
            super().__init__(tiles)
            self.p[1] = self.p[0]

    assert RaceError in outcome(OnePlace)


def test_the_model_finds_a_q_that_is_released_before_p_is_read() -> None:
    class Hasty(Divided):
        def take_p(self, slot: int, phase: int, what: Any) -> Steps:
            self.q.empty[slot].arrive()
            yield from super().take_p(slot, phase, what)

    assert RaceError in outcome(Hasty)


def test_the_model_finds_keys_that_come_while_dv_leaves() -> None:
    class Early(Divided):
        def leave(self, block: Block, what: Any) -> Steps:
            self.k.empty[0].arrive()
            yield from super().leave(block, what)

    assert outcome(Early)
