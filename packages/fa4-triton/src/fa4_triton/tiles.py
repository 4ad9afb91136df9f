"""Which block sizes each kernel runs with: one table, one reason per row, chosen by a pure function.

No autotuning at run time: it would stall a user's first step, break CUDA-graph capture and cost microseconds in every
call. The rows were chosen by sweeps (docs/kernels/fa4-triton-portable.md has them).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

__all__ = ["Architecture", "Tile", "architecture", "head_dim_blocks", "tile"]

Architecture: TypeAlias = Literal["ampere", "ada", "hopper", "blackwell", "interpreter"]
Kernel: TypeAlias = Literal["forward", "dq", "dkdv", "dk", "dv"]


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel is cut: `m` query rows by `n` keys a block, `warps` a program, `stages` of loads in flight."""

    m: int
    n: int
    warps: int
    stages: int


def architecture(capability: tuple[int, int] | None) -> Architecture:
    """The class of GPUs that share a table; `None` is Triton's interpreter.

    Ada stands for every part with 99 KiB of shared memory a block (compute capability 8.6, 8.9, 12.x); an unknown
    newer part counts as the newest data-centre class.
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
    """Column blocks (d0, d1), powers of two from 16, that cover `head_dim`; d1 is 0 where one block does.

    96 gives (64, 32), 80 gives (64, 16), 192 gives (128, 64); 120 gives (128, 0), since 64 + 64 is no less.
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


# Widest head dim (d0 + d1) a row serves -> tile. A reason per row.
_TABLE: dict[tuple[Architecture, Kernel], tuple[tuple[int, Tile], ...]] = {
    ("hopper", "forward"): (
        (128, Tile(64, 64, 4, 3)),
        (256, Tile(128, 64, 8, 2)),
    ),
    ("hopper", "dq"): (
        (64, Tile(64, 64, 4, 3)),
        (128, Tile(128, 64, 8, 3)),
        (256, Tile(128, 32, 8, 3)),
    ),
    ("hopper", "dkdv"): (
        (64, Tile(64, 64, 4, 3)),
        (128, Tile(32, 64, 4, 3)),
    ),
    ("hopper", "dk"): ((256, Tile(32, 128, 8, 2)),),
    ("hopper", "dv"): ((256, Tile(64, 128, 8, 2)),),
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
    """One kernel for dK and dV together, or one each where both accumulators do not fit the registers."""
    widest = _TABLE[arch, "dkdv"][-1][0]
    return ("dkdv",) if sum(head_dim_blocks(head_dim)) <= widest else ("dk", "dv")
