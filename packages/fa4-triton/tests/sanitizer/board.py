"""The Hopper kernels' board alone, in order and reported by racecheck all the same.

    compute-sanitizer --tool racecheck python packages/fa4-triton/tests/sanitizer/board.py

One warp waits until the word is free, writes it and arrives; a warp group waits, reads it and
arrives, a hundred times. The sum is right, and racecheck (CUDA 13.0, Triton 3.6) reports the write
against the read: it does not see the order that mbarriers make where one thread arrives for many.
It reports the two accesses by which Triton hands work over to its warp groups as well.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

ROUNDS = 100


@gluon.jit
def writer(word, full, empty, rounds):
    """Write 0, 1, 2 ... ."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    phase = 0
    for i in range(rounds):
        mbarrier.wait(empty, phase ^ 1)
        word.store(gl.full([1], 0, gl.int32, layout) + i)
        mbarrier.arrive(full, count=1)
        phase ^= 1


@gluon.jit
def reader(word, full, empty, rounds, out):
    """Add up what is read."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    phase = 0
    total = 0
    for _ in range(rounds):
        mbarrier.wait(full, phase)
        total += gl.max(word.load(layout), 0)
        mbarrier.arrive(empty, count=1)
        phase ^= 1
    gl.store(out, total)


@gluon.jit
def board(out, rounds):
    """One warp group that reads and one warp that writes."""
    word = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    barriers = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = barriers.index(0)
    empty = barriers.index(1)
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    gl.warp_specialize(
        [
            (reader, (word, full, empty, rounds, out)),
            (writer, (word, full, empty, rounds)),
        ],
        [1],
        [24],
    )


def main() -> None:
    """Run it."""
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    board[(1,)](out, ROUNDS, num_warps=4)
    found = out.item()
    assert found == sum(range(ROUNDS)), found
    print(f"the sum is right: {found}")


if __name__ == "__main__":
    main()
