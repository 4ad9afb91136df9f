"""Which block sizes each kernel runs with: one table, a reason per row, a pure function to choose.

No autotuning at run time: it would stall a user's first step, break CUDA-graph capture and cost
microseconds in every call. How the rows were found is told in docs/kernels/fa4-triton-portable.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

__all__ = [
    "Architecture",
    "Kernel",
    "Tile",
    "architecture",
    "head_dim_blocks",
    "key_gradient_kernels",
    "tile",
]

Architecture: TypeAlias = Literal["ampere", "ada", "hopper", "blackwell", "interpreter"]
Kernel: TypeAlias = Literal["forward", "dq", "dkdv", "dk", "dv"]


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel is cut.

    `m` query rows by `n` keys a block, `warps` a program, `stages` of loads in flight.
    """

    m: int
    n: int
    warps: int
    stages: int


def architecture(capability: tuple[int, int] | None) -> Architecture:
    """The class of GPUs that share a table; `None` is Triton's interpreter.

    Ada stands for every part with 99 KiB of shared memory a block (compute capability 8.6, 8.9,
    12.x); an unknown newer part counts as the newest data-centre class.
    """
    if capability is None:
        return "interpreter"
    major, minor = capability
    if major == 9:
        return "hopper"
    if major == 8 and minor in (0, 7):
        return "ampere"
    if major == 8 or major == 12:
        return "ada"
    return "blackwell"


@cache
def head_dim_blocks(head_dim: int) -> tuple[int, int]:
    """Column blocks (d0, d1) that cover `head_dim`: powers of two from 16, d1 0 where d0 does.

    96 gives (64, 32), 80 (64, 16), 192 (128, 64); 120 gives (128, 0), since 64 + 64 is no less.
    """
    power = 16
    while power < head_dim:
        power *= 2
    if power == head_dim or power <= 32:
        return power, 0
    rest = 16
    while rest < head_dim - power // 2:
        rest *= 2
    return (power, 0) if rest == power // 2 else (power // 2, rest)


# Widest head dim (d0 + d1) a row serves -> tile, and the reason.
#
# "Times" are shares of FlashAttention-2's, measured on an H200. Rows without times are for parts
# that are not measured: the largest tile that fits shared memory without spilling registers, as
# tests/resources.py finds it, but a few bytes that tests/test_resources.py lists.
_TABLE: dict[tuple[Architecture, Kernel], tuple[tuple[int, Tile], ...]] = {
    ("ampere", "forward"): (
        (64, Tile(128, 64, 4, 3)),  # two programs an SM, 32 rows a warp
        (96, Tile(64, 64, 4, 3)),  # two programs an SM
        (128, Tile(64, 64, 4, 2)),  # two programs an SM; a third stage leaves room for one
        (192, Tile(128, 32, 8, 3)),  # 64 keys spill
        (256, Tile(64, 64, 8, 2)),  # 128 rows spill, and so do 4 warps
    ),
    ("ampere", "dq"): (
        (96, Tile(64, 64, 4, 2)),  # two programs an SM
        (128, Tile(128, 32, 8, 2)),  # 64 keys spill
        (192, Tile(64, 16, 4, 2)),  # two programs an SM; 32 keys spill
        (256, Tile(64, 64, 8, 2)),  # 128 rows spill
    ),
    ("ampere", "dkdv"): (
        (64, Tile(32, 128, 8, 3)),  # 64 rows spill
        (96, Tile(32, 128, 8, 2)),  # 64 rows spill, and so does a third stage
        (128, Tile(64, 64, 8, 2)),  # 128 keys spill
    ),
    ("ampere", "dk"): (
        (192, Tile(32, 128, 8, 3)),  # 64 rows spill
        (256, Tile(64, 64, 8, 2)),  # 128 keys spill
    ),
    ("ampere", "dv"): ((256, Tile(32, 128, 8, 3)),),  # 64 rows spill
    ("ada", "forward"): (
        (64, Tile(64, 64, 4, 3)),  # two programs an SM
        (96, Tile(128, 32, 8, 2)),  # 64 keys spill under a window
        (128, Tile(128, 64, 8, 2)),  # 4 warps spill
        (192, Tile(128, 16, 8, 2)),  # 32 keys spill
        (256, Tile(64, 32, 8, 2)),  # 64 keys do not fit
    ),
    ("ada", "dq"): (
        (64, Tile(64, 64, 4, 3)),  # two programs an SM
        (128, Tile(128, 32, 8, 2)),  # 64 keys spill, at 96 under a window
        (192, Tile(64, 32, 8, 3)),  # two stages spill, for once
        (256, Tile(64, 16, 8, 2)),  # 32 keys miss the limit by a kibibyte
    ),
    ("ada", "dkdv"): (
        (64, Tile(32, 128, 8, 3)),  # 64 rows spill
        (80, Tile(32, 128, 8, 2)),  # 64 rows spill
        (96, Tile(16, 128, 8, 2)),  # 32 rows spill
        (128, Tile(64, 64, 8, 2)),  # 128 keys spill
    ),
    ("ada", "dk"): (
        (192, Tile(32, 64, 8, 3)),  # two stages spill, for once
        (256, Tile(16, 64, 8, 2)),  # 32 rows miss the limit by a kibibyte
    ),
    ("ada", "dv"): (
        (192, Tile(32, 128, 8, 3)),  # 64 rows spill
        (256, Tile(32, 64, 8, 2)),  # larger ones do not fit
    ),
    ("hopper", "forward"): (
        (128, Tile(64, 64, 4, 3)),  # times 0.65-0.69 at 64, 0.66-0.77 at 128; two programs an SM
        (256, Tile(128, 64, 8, 2)),  # times 0.61-0.71
    ),
    ("hopper", "dq"): (
        (64, Tile(64, 64, 4, 3)),  # times 0.27-0.29
        (128, Tile(128, 64, 8, 3)),  # times 0.29-0.34
        (256, Tile(128, 32, 8, 3)),  # times 0.26-0.30
    ),
    ("hopper", "dkdv"): (
        (64, Tile(64, 64, 4, 3)),  # times 0.52-0.54
        (128, Tile(32, 64, 4, 3)),  # times 0.46-0.48
    ),
    ("hopper", "dk"): ((256, Tile(32, 128, 8, 2)),),  # times 0.38-0.43
    ("hopper", "dv"): ((256, Tile(64, 128, 8, 2)),),  # times 0.24-0.29; both at once 0.73-0.83
    ("blackwell", "forward"): (
        (64, Tile(128, 64, 4, 3)),  # two programs an SM
        (128, Tile(128, 64, 8, 3)),  # 128 keys spill under a window
        (256, Tile(128, 64, 8, 2)),  # 128 keys do not fit
    ),
    ("blackwell", "dq"): (
        (64, Tile(128, 64, 4, 3)),  # two programs an SM
        (128, Tile(128, 64, 8, 3)),  # 128 keys spill
        (256, Tile(128, 32, 8, 2)),  # 64 keys do not fit at 256
    ),
    ("blackwell", "dkdv"): (
        (64, Tile(64, 128, 8, 3)),  # 4 warps spill
        (128, Tile(64, 128, 8, 2)),  # 128 rows do not fit
    ),
    ("blackwell", "dk"): ((256, Tile(32, 128, 8, 2)),),  # 64 rows do not fit
    ("blackwell", "dv"): ((256, Tile(64, 128, 8, 2)),),  # a third stage does not fit
    # No reason but to be small: NumPy computes a tile at a time.
    ("interpreter", "forward"): ((256, Tile(64, 64, 4, 1)),),
    ("interpreter", "dq"): ((256, Tile(64, 64, 4, 1)),),
    ("interpreter", "dkdv"): ((128, Tile(64, 64, 4, 1)),),
    ("interpreter", "dk"): ((256, Tile(64, 64, 4, 1)),),
    ("interpreter", "dv"): ((256, Tile(64, 64, 4, 1)),),
}


@cache
def tile(arch: Architecture, kernel: Kernel, head_dim: int) -> Tile:
    """The tile for one kernel, architecture class and head dim (8 to 256)."""
    width = sum(head_dim_blocks(head_dim))
    for widest, choice in _TABLE[arch, kernel]:
        if width <= widest:
            return choice
    raise ValueError(
        f"head_dim {head_dim} is over the widest served, {_TABLE[arch, kernel][-1][0]}"
    )


@cache
def key_gradient_kernels(arch: Architecture, head_dim: int) -> tuple[Kernel, ...]:
    """One kernel for dK and dV, or one each where two accumulators do not fit the registers."""
    widest = _TABLE[arch, "dkdv"][-1][0]
    return ("dkdv",) if sum(head_dim_blocks(head_dim)) <= widest else ("dk", "dv")
