"""The barriers of the Hopper backward, as a model: nobody waits forever, nobody reads what is not
there, and nobody writes what is read.

The producers, their copies and the consumers of one program use the barriers of
`flash_attention_testkit.barriers` in the order in which those of `kernels/hopper_backward.py` and
`hopper_backward_wide.py` use theirs. A product reads its operands from where it is issued until it
is waited for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from typing import Any

import pytest

from flash_attention_testkit.barriers import (
    Barrier,
    Buffer,
    HangError,
    Position,
    Program,
    RaceError,
    Ring,
    Steps,
)


class OneProgram(Program):
    """What the kernels have in common. `tiles`: the steps of each."""

    def __init__(self, tiles: list[int], readers_of_board: int) -> None:
        super().__init__()
        self.tiles = tiles
        self.board = Ring(2, readers_of_board)
        self.finished: list[tuple[int, str]] = []

    def publish(self, at: Position, number: int | None) -> Steps:
        here = at.step()
        yield from here.wait_empty()
        here.buffer.write(number)
        here.fill()

    def published(self, at: Position) -> Generator[Any, None, Any]:
        here = at.step()
        yield from here.wait_full()
        (number,) = here.buffer.content
        here.free()
        return number

    def leave(self, buffer: Buffer, what: str) -> Steps:
        """Write a block and have the copy engine read it."""
        buffer.write(what)
        yield from buffer.read(what)


class ByKeys(OneProgram):
    """`hopper_backward_kernel` and, as `own_dq`, `hopper_wide_dkdv_kernel`."""

    def __init__(self, tiles: list[int], q_stages: int, do_stages: int, sharing: int) -> None:
        super().__init__(tiles, 3)
        self.k, self.v = Ring(1, sharing), Ring(1, sharing)
        self.q, self.do = Ring(q_stages, 2), Ring(do_stages, 2)
        self.start("producer of K and Q", self.producer(self.k, self.q, deals=True))
        self.start("producer of V and dO", self.producer(self.v, self.do, deals=False))

    def producer(self, keys: Ring, rows: Ring, deals: bool) -> Steps:
        at, key_at, board = Position(rows), Position(keys), Position(self.board)
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
            yield from self.load(key_at.step(), number)
            for step in range(self.tiles[number]):
                yield from self.load(at.step(), (number, step))
            yield  # the counter


class Fused(ByKeys):
    """Two consumers with half of the keys each."""

    def __init__(self, tiles: list[int], q_stages: int, do_stages: int) -> None:
        super().__init__(tiles, q_stages, do_stages, sharing=2)
        # Who writes dS knows by its own dQ that a slot is free: nobody waits for an empty one.
        self.ds = Ring(2, readers=2, writers=2)
        self.ds.buffers = [Buffer(parts=2) for _ in range(2)]
        self.stages = [Buffer() for _ in range(2)]
        for who in range(2):
            self.start(f"consumer {who}", self.consumer(who))

    def consumer(self, who: int) -> Steps:
        q, do, ds = Position(self.q), Position(self.do), Position(self.ds)
        k, v, board = Position(self.k), Position(self.v), Position(self.board)
        stage = self.stages[who]
        while (number := (yield from self.published(board))) is not None:
            keys, values = k.step(), v.step()
            yield from keys.take(number)
            before: tuple[Position, Position] | None = None
            for step in range(self.tiles[number]):
                q_here = q.step()
                yield from q_here.take((number, step))
                if before is None:
                    yield from values.take(number)
                else:
                    yield from self.dq_and_dk((number, step - 1), *before, stage)
                do_here = do.step()
                yield from do_here.take((number, step))
                yield  # dP
                ds_here = ds.step()
                ds_here.buffer.write((number, step), who)
                ds_here.fill()
                yield  # dV
                do_here.give()
                before = ds_here, q_here
            assert before is not None
            yield from self.dq_and_dk((number, self.tiles[number] - 1), *before, stage)
            keys.give()
            values.give()
            for gradient in ("dV", "dK"):
                yield from self.leave(stage, gradient)
            self.finished.append((number, str(who)))

    def dq_and_dk(self, what: tuple[int, int], ds: Position, q: Position, stage: Buffer) -> Steps:
        yield from ds.wait_full()
        yield from ds.buffer.read(what)  # dQ
        yield from self.leave(stage, "dQ")
        yield  # dK
        q.give()


class Divided(ByKeys):
    """One consumer for dV, the other for dK."""

    def __init__(self, tiles: list[int]) -> None:
        super().__init__(tiles, 2, 2, sharing=1)
        # Who writes P knows by Q, of which there are as many slots, that one is free.
        self.p = Ring(2, readers=1)
        self.start("consumer of S", self.values())
        self.start("consumer of dP", self.keys())

    def make_p(self, at: Position, what: Any) -> Steps:
        at.buffer.write(what)
        at.fill()
        yield

    def take_p(self, at: Position, what: Any) -> Steps:
        yield from at.wait_full()
        yield from at.buffer.read(what)

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
        between: Callable[[Position, Any], Steps],
        release_after_p: bool,
    ) -> Steps:
        scored_at, multiplied_at, p_at = Position(scored), Position(multiplied), Position(self.p)
        own_at, board = Position(own), Position(self.board)
        while (number := (yield from self.published(board))) is not None:
            mine = own_at.step()
            yield from mine.take(number)
            before = None
            for step in range(self.tiles[number]):
                here = scored_at.step()
                yield from here.take((number, step))
                if before is not None:
                    yield from before.take((number, step - 1))
                yield  # scores
                if not release_after_p:
                    here.give()
                yield from between(p_at.step(), (number, step))
                if release_after_p:
                    here.give()
                yield  # the gradient
                if before is not None:
                    before.give()
                before = multiplied_at.step()
            assert before is not None
            yield from before.take((number, self.tiles[number] - 1))
            yield
            before.give()
            mine.buffer.end_read()
            yield from self.leave(mine.buffer, "gradient")
            mine.free()
            self.finished.append((number, "keys" if release_after_p else "values"))


class ByRows(OneProgram):
    """`hopper_wide_dq_kernel`."""

    def __init__(self, tiles: list[int]) -> None:
        super().__init__(tiles, 2)
        self.q, self.do = Ring(2, 1), Ring(2, 1)  # a slot a consumer
        self.k, self.v = Ring(2, 2), Ring(1, 2)
        self.start("producer", self.producer())
        for who in range(2):
            self.start(f"consumer {who}", self.consumer(who))

    def producer(self) -> Steps:
        k, v, board = Position(self.k), Position(self.v), Position(self.board)
        q, do = Position(self.q), Position(self.do)
        for number, blocks in enumerate(self.tiles):
            yield from self.publish(board, number)
            for index in range(blocks):
                yield from self.load(k.step(), (number, index))
                if index == 0:
                    for _ in range(2):
                        yield from self.load(q.step(), number)
                yield from self.load(v.step(), (number, index))
                if index == 0:
                    for _ in range(2):
                        yield from self.load(do.step(), number)
            yield  # the counter
        yield from self.publish(board, None)

    def consumer(self, who: int) -> Steps:
        k, v, board = Position(self.k), Position(self.v), Position(self.board)
        q, do = Position(self.q, who), Position(self.do, who)
        while (number := (yield from self.published(board))) is not None:
            q_here, do_here = q.step(2), do.step(2)
            before = None
            for index in range(self.tiles[number]):
                k_here, v_here = k.step(), v.step()
                yield from k_here.take((number, index))
                if index == 0:
                    yield from q_here.take(number)
                yield  # S
                yield from v_here.take((number, index))
                if index == 0:
                    yield from do_here.take(number)
                yield  # dQ of the block before
                if before is not None:
                    before.give()
                yield  # dP
                v_here.give()
                before = k_here
            assert before is not None
            do_here.give()
            yield
            before.give()
            q_here.buffer.end_read()
            yield from self.leave(q_here.buffer, "dQ")
            q_here.free()
            self.finished.append((number, str(who)))


PROGRAMS: dict[str, Callable[[list[int]], OneProgram]] = {
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
    make: Callable[[list[int]], OneProgram],
) -> None:
    for seed in range(150):
        tiles = tiles_of(seed)
        program = make(tiles)
        program.run(seed)
        assert sorted(number for number, _ in program.finished) == sorted(
            2 * list(range(len(tiles)))
        )


def outcome(make: Callable[[list[int]], OneProgram]) -> set[type[Exception]]:
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
            self.ds.buffers[1] = self.ds.buffers[0]

    assert RaceError in outcome(OnePlace)


def test_the_model_finds_a_q_that_is_released_before_dk() -> None:
    class Hasty(Fused):
        def dq_and_dk(
            self, what: tuple[int, int], ds: Position, q: Position, stage: Buffer
        ) -> Steps:
            q.free()
            yield from ds.wait_full()
            yield
            q.buffer.end_read()

    assert RaceError in outcome(lambda tiles: Hasty(tiles, 3, 2))


def test_the_model_finds_a_gradient_that_is_kept() -> None:
    class Keeping(Fused):
        def __init__(self, tiles: list[int]) -> None:
            super().__init__(tiles, 3, 2)
            self.do.empty = [Barrier(3) for _ in self.do.empty]

    assert HangError in outcome(Keeping)


def test_the_model_finds_one_place_for_p_instead_of_two() -> None:
    class OnePlace(Divided):
        def __init__(self, tiles: list[int]) -> None:
            super().__init__(tiles)
            self.p.buffers[1] = self.p.buffers[0]

    assert RaceError in outcome(OnePlace)


def test_the_model_finds_a_q_that_is_released_before_p_is_read() -> None:
    class Hasty(Divided):
        def take_p(self, at: Position, what: Any) -> Steps:
            self.q.empty[at.slot].arrive()
            yield from super().take_p(at, what)

    assert RaceError in outcome(Hasty)


def test_the_model_finds_keys_that_come_while_dv_leaves() -> None:
    class Early(Divided):
        def leave(self, buffer: Buffer, what: str) -> Steps:
            self.k.empty[0].arrive()
            yield from super().leave(buffer, what)

    assert outcome(Early)
