"""How the Hopper backward is cut, and launched: one table and pure functions, testable anywhere.

Up to head dim 128 one kernel computes all three gradients and adds dQ to fp32 sums; beyond, dK and
dV have one kernel and dQ another. How the rows of the table were found is told in
docs/kernels/fa4-triton.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from fa4_triton.plan import Device, Request, Sizes, Strides, sizes_of
from fa4_triton.tiles import head_dim_blocks

__all__ = [
    "OPERANDS",
    "BackwardKernel",
    "BackwardTile",
    "HopperBackwardPlan",
    "KernelPlan",
    "View",
    "plan_hopper_backward",
    "tile_of",
    "why_not_this_backward",
]

BackwardKernel: TypeAlias = Literal["prepare", "fused", "dkdv", "dq", "finish", "repair"]
"""`fused` gives all gradients, dQ as sums that `finish` rounds."""


@dataclass(frozen=True, slots=True)
class BackwardTile:
    """How the Hopper backward is cut.

    Attributes:
        m: Query rows of a block.
        n: Keys of a tile, or of a block where dQ has its own kernel.
        d: Columns; the head dim is padded to it.
        q_stages: Blocks of Q in shared memory.
        do_stages: Blocks of dO.
        own_dq: dQ has a kernel of its own, and gradients repeat bit for bit.
    """

    m: int
    n: int
    d: int
    q_stages: int
    do_stages: int
    own_dq: bool


_TILES: dict[tuple[int, int], tuple[int, int, int, int, int, bool]] = {
    # (narrowest, widest) head dim -> m, n, d, stages of Q, stages of dO, dQ by its own kernel
    # Scores of 128 queries fit beside dK and dV, and what is read from shared memory serves twice
    # as many products as with 64.
    (40, 64): (128, 128, 64, 3, 2, False),
    (72, 128): (64, 128, 128, 3, 2, False),
    # dK and dV of 64 keys fill the registers; sums of dQ would take as many bytes as with 128.
    (136, 256): (64, 64, 256, 2, 2, True),
}


def tile_of(head_dim: int) -> BackwardTile | None:
    """The tile for a head dim; None if it would be padded to more than half as much again."""
    for (narrowest, widest), (m, n, d, q_stages, do_stages, own_dq) in _TILES.items():
        if narrowest <= head_dim <= widest:
            return BackwardTile(m, n, d, q_stages, do_stages, own_dq)
    return None


UNIT = 64
"""Rows that workspaces are counted in."""

LINE = 256
"""Elements of a line of the sums of dQ."""

OPERANDS = (
    *("query", "key", "value", "grad_out", "out", "lse", "dq", "dk", "dv"),
    *("negative_lse", "delta", "sums", "counters"),
)
"""What kernels take, by the numbers that `KernelPlan` counts in; the last four are workspaces."""

_GIVEN = OPERANDS.index("negative_lse")
_LIKE_KEY = ("key", "value", "dk", "dv")


class View(NamedTuple):
    """An operand as TMA sees it."""

    operand: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class KernelPlan:
    """How one kernel is launched. A key of caches, by identity.

    Its arguments are views, addresses, floats, ints and constants, in this order.

    Attributes:
        kernel: Which.
        programs: The grid, one-dimensional.
        views: Operands that come as tensor maps.
        addresses: Operands that come as addresses.
        floats: How many of (scale, scale * log2(e)) it takes.
        ints: Its int arguments, in the kernel's order.
        constants: What it is compiled for.
    """

    kernel: BackwardKernel
    programs: int
    views: tuple[View, ...]
    addresses: tuple[int, ...]
    floats: int
    ints: tuple[int, ...]
    constants: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class HopperBackwardPlan:
    """How a backward is launched.

    Attributes:
        kernels: One after the other.
        workspace: fp32 elements, of which the last two are int32 counters.
        offsets: Where the operands from "negative_lse" on begin in it, in elements.
    """

    kernels: tuple[KernelPlan, ...]
    workspace: int
    offsets: tuple[int, ...]


class BackwardConstants(NamedTuple):
    """What the Gluon kernels are compiled for."""

    tile: BackwardTile
    causal: bool
    tail: bool  # the last block of keys is not full, where nothing else masks it


def why_not_this_backward(
    request: Request, strides: tuple[Strides, ...], alignment: int, small_scale: bool
) -> str | None:
    """Why a dense call that the table gives to the Hopper backward cannot go there, or None.

    Args:
        request: What.
        strides: Of query, key, value, grad_out, out, dq, dk and dv, [B, S, H, D].
        alignment: Bit i: tensor i starts at a multiple of 16 bytes.
        small_scale: Whether the scale is too small, or negative.
    """
    if small_scale:
        return "a scale that is zero, or nearly, or negative"
    if not sizes_of(request).has_pairs:
        return "no queries or no keys"
    if alignment & 0xFF != 0xFF:
        return "a tensor does not start at a multiple of 16 bytes"
    like_q, like_k = request.query_shape, request.key_shape
    shapes = (like_q, like_k, like_k, like_q, like_q, like_q, like_k, like_k)
    for shape, given in zip(shapes, strides, strict=True):
        used = [stride for size, stride in zip(shape, given[:-1], strict=False) if size > 1]
        if 0 in used:
            return "an expanded dimension"
        if any(stride % 8 or stride < 0 for stride in used):
            return "strides that are no multiples of 16 bytes"
        if any(stride >= 1 << 39 for stride in used):
            return "strides of a tebibyte or more"
    batch, rows, heads, _ = request.query_shape
    if batch * heads * (rows + 127) * 2 >= 1 << 31:
        return "row statistics of 2^30 rows or more"
    return None


def plan_hopper_backward(
    device: Device, request: Request, strides: tuple[Strides, ...], tile: BackwardTile
) -> HopperBackwardPlan:
    """Plan a backward for which `why_not_this_backward` gives None.

    Args:
        device: Where.
        request: What.
        strides: As there.
        tile: How it is cut.
    """
    size = sizes_of(request)
    given = dict(
        zip(
            ("query", "key", "value", "grad_out", "out", "dq", "dk", "dv"),
            strides,
            strict=True,
        )
    )
    units = -(-size.seq_len_q // tile.m) * tile.m // UNIT
    rows = size.batch * size.heads * units * UNIT
    sums = 0 if tile.own_dq else rows * tile.d
    planner = _Planner(device, size, given, tile, units, rows)
    kernels = [planner.prepare()]
    if tile.own_dq:
        kernels += [planner.dkdv(), planner.dq()]
    else:
        kernels += [planner.fused(), planner.finish()]
    if planner.causal:
        kernels.append(planner.repair())
    return HopperBackwardPlan(
        tuple(kernels), 2 * rows + sums + 2, (0, rows, 2 * rows, 2 * rows + sums)
    )


@dataclass(frozen=True, slots=True)
class _Planner:
    """What the kernels of one backward share."""

    device: Device
    size: Sizes
    strides: dict[str, Strides]
    tile: BackwardTile
    units: int  # of rows a head has in the workspaces
    rows: int  # of the workspaces

    @property
    def causal(self) -> bool:
        return self.size.right is not None

    @property
    def group(self) -> int:
        return self.size.heads // self.size.heads_kv

    def prepare(self) -> KernelPlan:
        size = self.size
        return KernelPlan(
            "prepare",
            size.batch * size.heads * self.units,
            (),
            _numbers("grad_out", "out", "lse", "negative_lse", "delta", "sums", "counters"),
            0,
            (
                *self._in_units("grad_out", "out"),
                size.heads,
                size.seq_len_q,
                self.units,
                size.head_dim // 8,
            ),
            (self.tile.d, not self.tile.own_dq),
        )

    def fused(self) -> KernelPlan:
        tile = self.tile
        views = (
            *self._views(tile.m, "query"),
            *self._views(tile.n, "key", "value"),
            *self._views(tile.m, "grad_out"),
            *self._views(64, "dk", "dv"),
            *self._stats(tile.m),
            View(
                OPERANDS.index("sums"),
                (self.rows * tile.d // LINE, LINE),
                (LINE, 1),
                (16, LINE),
            ),
        )
        return self._by_keys("fused", views)

    def dkdv(self) -> KernelPlan:
        tile = self.tile
        views = (
            *self._views(tile.m, "query"),
            *self._views(tile.n, "key", "value"),
            *self._views(tile.m, "grad_out"),
            *self._views(tile.n, "dk", "dv"),
            *self._stats(tile.m),
        )
        return self._by_keys("dkdv", views)

    def _by_keys(self, kernel: BackwardKernel, views: tuple[View, ...]) -> KernelPlan:
        """A kernel whose programs each own a block of keys."""
        size, tile = self.size, self.tile
        blocks = -(-size.seq_len_k // tile.n)
        heads = size.batch * size.heads_kv
        shared = size.seq_len_q * self.group * tile.d
        return KernelPlan(
            kernel,
            min(self.device.multiprocessors, blocks * heads),
            views,
            _numbers("counters"),
            2,
            (
                size.heads,
                self.group,
                heads,
                size.seq_len_q,
                size.seq_len_k,
                blocks * heads,
                blocks,
                self._section(heads, shared),
                self.units,
            ),
            (self._constants(),),
        )

    def dq(self) -> KernelPlan:
        size, tile = self.size, self.tile
        blocks = -(-size.seq_len_q // (2 * UNIT))
        heads = size.batch * size.heads
        return KernelPlan(
            "dq",
            min(self.device.multiprocessors, blocks * heads),
            (
                *self._views(UNIT, "query"),
                *self._views(tile.n, "key", "value"),
                *self._views(UNIT, "grad_out", "dq"),
            ),
            _numbers("negative_lse", "delta", "counters"),
            2,
            (
                size.heads,
                self.group,
                heads,
                size.seq_len_q,
                size.seq_len_k,
                blocks * heads,
                blocks,
                # Heads of a group share keys.
                min(
                    heads,
                    self.group * self._section(size.batch * size.heads_kv, size.seq_len_k * tile.d),
                ),
                self.units,
            ),
            (self._constants(),),
        )

    def finish(self) -> KernelPlan:
        size = self.size
        return KernelPlan(
            "finish",
            size.batch * size.heads * self.units,
            (),
            _numbers("dq", "sums", "counters"),
            1,
            (
                *self._in_units("dq"),
                size.heads,
                size.seq_len_q,
                self.units,
                size.head_dim // 8,
            ),
            (self.tile.d, self.causal),
        )

    def repair(self) -> KernelPlan:
        size = self.size
        return KernelPlan(
            "repair",
            self.device.multiprocessors,
            (),
            _numbers("query", "key", "value", "grad_out", "dq", "lse", "delta", "counters"),
            1,
            (
                *self._in_units("query", "key", "value", "grad_out", "dq"),
                size.heads,
                self.group,
                size.batch * size.heads,
                size.seq_len_q,
                size.seq_len_k,
                self.units,
            ),
            (*head_dim_blocks(size.head_dim), size.head_dim),
        )

    def _constants(self) -> BackwardConstants:
        tail = not self.causal and self.size.seq_len_k % self.tile.n != 0
        return BackwardConstants(self.tile, self.causal, tail)

    def _section(self, heads: int, elements: int) -> int:
        """How many of `heads` go side by side, that each share two operands of `elements`.

        Under a mask the longest tiles of several heads go first, as many as have what their tiles
        share, and sums as large as that, in the L2 cache. Without one tiles are equal, and those of
        one head follow each other: at S = 1024, several heads side by side took their sums of dQ
        from memory.
        """
        if not self.causal:
            return 1
        fitting = self.device.l2_bytes * 2 // 3 // max(1, 8 * elements)
        return min(heads, MOST_SIDE_BY_SIDE, max(1, fitting))

    def _in_units(self, *names: str) -> tuple[int, ...]:
        """Batch, head and row strides in units of 16 bytes; 0 along a dimension of size 1."""
        found: list[int] = []
        for name in names:
            shape = self._shape(name)
            batch, row, head, _ = (
                0 if count == 1 else stride
                for count, stride in zip(shape, self.strides[name], strict=True)
            )
            found += [batch // 8, head // 8, row // 8]
        return tuple(found)

    def _shape(self, name: str) -> tuple[int, int, int, int]:
        """[B, S, H, D] of an operand."""
        size = self.size
        if name in _LIKE_KEY:
            return size.batch, size.seq_len_k, size.heads_kv, size.head_dim
        return size.batch, size.seq_len_q, size.heads, size.head_dim

    def _views(self, rows: int, *names: str) -> tuple[View, ...]:
        """Operands [B, H, S, D] in blocks of `rows`."""
        views = []
        for name in names:
            shape = self._shape(name)
            batch, seq_len, heads, head_dim = shape
            # A dimension of size 1 may have any stride in torch; TMA wants one that is valid.
            used = [
                stride if count > 1 else head_dim
                for count, stride in zip(shape, self.strides[name], strict=True)
            ]
            views.append(
                View(
                    OPERANDS.index(name),
                    (batch, heads, seq_len, head_dim),
                    (used[0], used[2], used[1], 1),
                    (1, 1, rows, self.tile.d),
                )
            )
        return tuple(views)

    def _stats(self, rows: int) -> tuple[View, ...]:
        """Row statistics in blocks of `rows`."""
        names = ("negative_lse", "delta")
        return tuple(View(OPERANDS.index(name), (self.rows,), (1,), (rows,)) for name in names)


MOST_SIDE_BY_SIDE = 16
"""Heads side by side under a mask, at most: more begin with a long tile each, all from memory."""


def _numbers(*names: str) -> tuple[int, ...]:
    return tuple(OPERANDS.index(name) for name in names)
