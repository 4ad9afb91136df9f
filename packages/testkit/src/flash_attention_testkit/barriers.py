"""A kernel's barriers, as a model: nobody waits forever, and nobody writes what another reads.

Warps that copy and warps that multiply agree by barriers in shared memory who may write a block and
who may read it. A mistake there is a hang without a word, or a wrong number now and then. So write
every warp as a generator that does to these barriers and buffers what the kernel does to its own,
in the same order, and let `Program.run` interleave them at random under a few hundred seeds; no GPU
is needed. A generator yields wherever another thread may come between: None, or the condition that
it waits for.

    class TwoStages(Program):
        def __init__(self, tiles: int) -> None:
            super().__init__()
            self.tiles, self.keys = tiles, Ring(slots=2, readers=1)
            self.start("producer", self.producer())
            self.start("consumer", self.consumer())

        def producer(self) -> Steps:
            at = Position(self.keys)
            for tile in range(self.tiles):
                yield from self.load(at.step(), tile)

        def consumer(self) -> Steps:
            at = Position(self.keys)
            for tile in range(self.tiles):
                here = at.step()
                yield from here.take(tile)
                yield  # the product is under way
                here.give()

    for seed in range(200):
        TwoStages(tiles=5).run(seed)

That a model can tell is worth a test, too: one with a planted mistake has to raise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

__all__ = [
    "Barrier",
    "Buffer",
    "HangError",
    "NamedBarrier",
    "Position",
    "Program",
    "RaceError",
    "Ring",
    "Steps",
]

Steps: TypeAlias = Iterator["Callable[[], bool] | None"]
"""What a thread does. It yields None where others may run, or what has to be true for it to go on.
"""


class HangError(Exception):
    """Everybody waits."""


class RaceError(Exception):
    """A buffer is written while it is read, or does not hold what is read."""


@dataclass
class Barrier:
    """mbarrier: its phase flips when all arrivals are in.

    Attributes:
        arrivals: How many complete a phase.
    """

    arrivals: int
    pending: int = field(init=False)
    phase: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Expect the first phase's arrivals."""
        self.pending = self.arrivals

    def arrive(self) -> None:
        """One arrival."""
        self.pending -= 1
        if self.pending == 0:
            self.pending = self.arrivals
            self.phase ^= 1

    def wait(self, parity: int) -> Steps:
        """Until the phase of that parity is complete, as `mbarrier.try_wait.parity` does."""
        yield lambda: self.phase != parity


class NamedBarrier:
    """`bar.sync` and `bar.arrive` of two parties: each waits for the other, or lets it know."""

    def __init__(self) -> None:
        """Nobody has arrived."""
        self._arrived: set[object] = set()
        self._completed = 0

    def arrive(self, who: object) -> None:
        """Let the other party know.

        Raises:
            RaceError: `who` has arrived already, and the other party has not.
        """
        if who in self._arrived:
            raise RaceError(f"{who} arrives twice at one barrier")
        self._arrived.add(who)
        if len(self._arrived) == 2:
            self._arrived.clear()
            self._completed += 1

    def sync(self, who: object) -> Steps:
        """Arrive, and wait for the other party."""
        before = self._completed
        self.arrive(who)
        yield lambda: self._completed != before


@dataclass
class Buffer:
    """A block of shared memory: what it holds, and who reads it.

    Attributes:
        parts: How many are written one by one; a reader reads all of them.
    """

    parts: int = 1
    content: list[object] = field(init=False)
    readers: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Hold nothing."""
        self.content = [None] * self.parts

    def write(self, content: object, part: int = 0) -> None:
        """Overwrite a part; None stands for what is half written.

        Raises:
            RaceError: Somebody reads.
        """
        if self.readers:
            raise RaceError(f"{content} is written over {self.content}, which is read")
        self.content[part] = content

    def begin_read(self, expected: object) -> None:
        """Read from now on, as a matrix product does until it is waited for.

        Raises:
            RaceError: Something else is there.
        """
        if self.content != [expected] * self.parts:
            raise RaceError(f"{self.content} is read for {expected}")
        self.readers += 1

    def end_read(self) -> None:
        """Have read."""
        self.readers -= 1

    def read(self, expected: object) -> Steps:
        """Read, while others run."""
        self.begin_read(expected)
        yield None
        self.end_read()


class Ring:
    """Buffers with a full and an empty barrier each, filled and emptied in turn."""

    def __init__(self, slots: int, readers: int, writers: int = 1) -> None:
        """`readers` arrivals make a slot empty, `writers` make it full."""
        self.buffers = [Buffer() for _ in range(slots)]
        self.full = [Barrier(writers) for _ in range(slots)]
        self.empty = [Barrier(readers) for _ in range(slots)]


@dataclass
class Position:
    """Where a thread is in a ring.

    Attributes:
        ring: Which.
        count: Slots that it has passed.
    """

    ring: Ring
    count: int = 0

    @property
    def slot(self) -> int:
        """The slot here."""
        return self.count % len(self.ring.buffers)

    @property
    def phase(self) -> int:
        """Of its barriers: flips with every round."""
        return self.count // len(self.ring.buffers) & 1

    @property
    def buffer(self) -> Buffer:
        """The buffer here."""
        return self.ring.buffers[self.slot]

    def step(self, slots: int = 1) -> Position:
        """Go on by so many slots; where the thread was."""
        here = Position(self.ring, self.count)
        self.count += slots
        return here

    def wait_full(self) -> Steps:
        """Until the slot is full."""
        return self.ring.full[self.slot].wait(self.phase)

    def wait_empty(self) -> Steps:
        """Until the slot is empty; at the first round it is."""
        return self.ring.empty[self.slot].wait(self.phase ^ 1)

    def fill(self) -> None:
        """Say that it is full."""
        self.ring.full[self.slot].arrive()

    def free(self) -> None:
        """Say that it may be overwritten."""
        self.ring.empty[self.slot].arrive()

    def take(self, expected: object) -> Steps:
        """Wait until the slot is full and read from then on; see `Buffer.begin_read`."""
        yield from self.wait_full()
        self.buffer.begin_read(expected)

    def give(self) -> None:
        """Stop reading, and let it be overwritten."""
        self.buffer.end_read()
        self.free()


@dataclass(eq=False)
class _Actor:
    """One of those that run side by side.

    Attributes:
        name: For messages.
        steps: What it does.
        until: What it waits for.
    """

    name: str
    steps: Steps
    until: Callable[[], bool] | None = None


class Program:
    """What runs side by side: threads, and copies, which run for themselves."""

    def __init__(self) -> None:
        """Nothing runs yet."""
        self._actors: list[_Actor] = []

    def start(self, name: str, steps: Steps) -> None:
        """Have one more run, from where `run` is now."""
        self._actors.append(_Actor(name, steps))

    def load(self, at: Position, content: object) -> Steps:
        """Wait until the slot at `at` is empty, and have a copy engine fill it."""
        yield from at.wait_empty()
        self.start(f"copy of {content}", self._copy(at, content))

    @staticmethod
    def _copy(at: Position, content: object) -> Steps:
        at.buffer.write(None)
        yield None
        at.buffer.write(content)
        at.fill()

    def run(self, seed: int) -> None:
        """Until all have come to an end, in an order that `seed` determines.

        Raises:
            HangError: All that are left wait.
            RaceError: A buffer is used in a way that another thread cannot stand.
        """
        order = random.Random(seed)
        while self._actors:
            ready = [actor for actor in self._actors if actor.until is None or actor.until()]
            if not ready:
                raise HangError(f"all wait: {', '.join(actor.name for actor in self._actors)}")
            actor = order.choice(ready)
            try:
                actor.until = next(actor.steps)
            except StopIteration:
                self._actors.remove(actor)
