"""Which calls the Hopper kernels serve, and how: one table and pure functions, testable anywhere.

The Hopper kernels are written in Gluon, which is part of Triton but no stable part of it: they run
with versions of Triton that they were tested with. Whatever they do not serve runs on the portable
kernels, for a reason that `Choice` holds. How the rows of the table were found is told in
docs/kernels/fa4-triton.md.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, NamedTuple, TypeAlias

from fa4_triton.hopper_backward import BackwardTile, tile_of
from fa4_triton.plan import Device, Request, Strides, section_of, sizes_of
from fa4_triton.tiles import Architecture

__all__ = [
    "Choice",
    "Direction",
    "HopperPlan",
    "HopperTile",
    "Situation",
    "Worth",
    "choose",
    "plan_hopper_forward",
    "situation_of",
    "why_no_gluon",
    "why_not_this_call",
    "why_untested",
]

Direction: TypeAlias = Literal["forward", "backward"]
Scale: TypeAlias = Literal["positive", "small", "negative"]
"""A call's scale: over `SMALLEST_SCALE`, not over it, or below zero."""
Asked: TypeAlias = Literal["fastest", "hopper", "portable"]
"""Whether one kind of kernel is to serve all that it can, be it slower."""
Mask: TypeAlias = Literal["none", "causal", "window"]

TESTED_TRITON = ("3.6.",)
"""Beginnings of the versions of Triton whose Gluon these kernels were tested with."""


KERNELS = "FA4_TRITON_KERNELS"
"""Environment variable: `portable`, or `hopper` for whatever the Hopper kernels can serve, be it
slower there. For tests, and to find out whose a wrong result is."""


def asked_for() -> Asked:
    """What the environment asks for.

    Raises:
        ValueError: `KERNELS` has a value that is not known.
    """
    value = os.environ.get(KERNELS, "").strip().lower()
    if not value:
        return "fastest"
    if value not in ("hopper", "portable"):
        raise ValueError(
            f"{KERNELS} is {value!r}, which names no kernels; unset it, or set it to 'hopper' or "
            "'portable', before Python starts"
        )
    return "hopper" if value == "hopper" else "portable"


class Situation(NamedTuple):
    """What of a call, a device and an installation decides between the kernels."""

    architecture: Architecture
    triton: str  # its version
    gluon: str | None  # why Gluon cannot be used, None if it can
    head_dim: int
    dtype: str  # "fp16" or "bf16"
    mask: Mask
    direction: Direction
    varlen: bool
    asked: Asked = "fastest"
    deterministic: bool = False  # backward: gradients are to repeat bit for bit


@dataclass(frozen=True, slots=True)
class HopperTile:
    """How the Hopper forward is cut.

    Attributes:
        m: Query rows of a tile, 64 a consumer.
        n: Keys of a block.
        d: Columns; the head dim is padded to it.
        stages: Blocks of keys, and as many of values, in shared memory.
        drawn: Programs draw their tiles from a counter; else tiles are dealt to them in turn.
        own_o: The output has shared memory of its own; else it leaves through the query's.
    """

    m: int
    n: int
    d: int
    stages: int
    drawn: bool
    own_o: bool


class Worth(NamedTuple):
    """From how many pairs of a row and a key on the Hopper forward is the faster one.

    Its programs take longer to begin and its tiles are larger than the portable kernel's.
    """

    head: int  # of one head of the longest sequence
    call: int  # in all, of a window those that it spans


@dataclass(frozen=True, slots=True)
class Choice:
    """Which kernel serves a situation.

    Attributes:
        tiles: (most query rows of a sequence, tile) of the forward, the shortest first; empty: the
            portable kernel serves.
        worth: Smaller forwards go to the portable kernel all the same.
        reason: Why the portable one does; None if the Hopper one does.
        backward: The tile of the backward, where that is asked for.
    """

    tiles: tuple[tuple[int, HopperTile], ...]
    worth: Worth
    reason: str | None
    backward: BackwardTile | None = None

    def tile(self, seq_len_q: int) -> HopperTile:
        """The tile for sequences of so many query rows."""
        return next(tile for longest, tile in self.tiles if seq_len_q <= longest)

    def why_too_small(self, request: Request) -> str | None:
        """Why the portable kernel is faster at a request, or None."""
        size = sizes_of(request)
        span = size.seq_len_k
        if size.left is not None:
            span = min(span, size.left + (size.right or 0) + 1)
        rows = size.batch * size.seq_len_q
        if request.packed is not None:
            rows = min(rows, request.query_shape[0])
        if size.seq_len_q < FEWEST_ROWS:
            return f"fewer than {FEWEST_ROWS} queries: most of a tile would be empty"
        if size.seq_len_q * size.seq_len_k < self.worth.head:
            return f"less than {self.worth.head} pairs of a row and a key in a head"
        if rows * size.heads * span < self.worth.call:
            return f"less than {self.worth.call >> 20} * 2^20 pairs of a row and a key"
        return None


ANY = 1 << 31
"""More rows than any sequence has."""

ALWAYS = Worth(0, 0)

# (narrowest, widest) head dim and mask -> tiles by the number of query rows, and the reason; and
# from where on they are worth it, found on shapes from 1 x 8 heads of 256 rows to 8192 rows.
_FORWARD: dict[tuple[int, int, Mask], tuple[tuple[tuple[int, HopperTile], ...], Worth]] = {
    # Three consumers hide more of the exponentials, which take as long as the products here.
    (40, 64, "none"): (
        ((ANY, HopperTile(192, 128, 64, 3, drawn=False, own_o=True)),),
        Worth(head=1 << 18, call=64 << 20),
    ),
    (40, 64, "causal"): (
        (
            # Fewer keys in vain: 0.89 against 0.73 of cuDNN's speed at 1024, 0.98 against 0.96 at
            # 4096.
            (4096, HopperTile(128, 128, 64, 3, drawn=True, own_o=True)),
            (ANY, HopperTile(192, 128, 64, 3, drawn=True, own_o=True)),
        ),
        Worth(head=1 << 14, call=32 << 20),
    ),
    # Fewer rows than of a full mask: what a tile sees beyond its rows' windows is in vain.
    (40, 64, "window"): (
        ((ANY, HopperTile(128, 128, 64, 3, drawn=True, own_o=True)),),
        Worth(head=1 << 14, call=32 << 20),
    ),
    (72, 128, "none"): (
        ((ANY, HopperTile(128, 128, 128, 2, drawn=False, own_o=True)),),
        Worth(head=1 << 14, call=0),
    ),
    (72, 128, "causal"): (
        ((ANY, HopperTile(128, 128, 128, 2, drawn=True, own_o=True)),),
        Worth(head=1 << 14, call=12 << 20),
    ),
    (72, 128, "window"): (
        ((ANY, HopperTile(128, 128, 128, 2, drawn=True, own_o=True)),),
        Worth(head=1 << 14, call=12 << 20),
    ),
    # 128 keys do not fit, nor does an output of its own.
    (136, 256, "none"): (
        ((ANY, HopperTile(128, 64, 256, 2, drawn=False, own_o=False)),),
        ALWAYS,
    ),
    (136, 256, "causal"): (
        ((ANY, HopperTile(128, 64, 256, 2, drawn=True, own_o=False)),),
        ALWAYS,
    ),
    (136, 256, "window"): (
        ((ANY, HopperTile(128, 64, 256, 2, drawn=True, own_o=False)),),
        ALWAYS,
    ),
}


@cache
def choose(situation: Situation) -> Choice:
    """The kernel for a situation."""
    reason = _why_portable(situation)
    if reason is None and situation.direction == "backward":
        return _choose_backward(situation)
    if reason is None:
        for (narrowest, widest, mask), (tiles, worth) in _FORWARD.items():
            if narrowest <= situation.head_dim <= widest and mask == situation.mask:
                if situation.varlen:  # tiles of sequences of different lengths cannot be dealt
                    tiles = tuple((rows, replace(tile, drawn=True)) for rows, tile in tiles)
                return Choice(tiles, worth, None)
        reason = _why_padding(situation.head_dim)
    return Choice((), ALWAYS, reason)


def _choose_backward(situation: Situation) -> Choice:
    tile = tile_of(situation.head_dim)
    reason = None
    if situation.varlen:
        reason = "packed sequences"
    elif situation.mask == "window":
        reason = "a window"
    elif tile is None:
        reason = _why_padding(situation.head_dim)
    elif situation.deterministic and not tile.own_dq:
        reason = "deterministic gradients: the Hopper kernel adds to dQ in any order"
    return Choice((), ALWAYS, reason, tile if reason is None else None)


def _why_padding(head_dim: int) -> str:
    return f"head_dim {head_dim} would be padded to more than half as much again"


def _why_portable(situation: Situation) -> str | None:
    if situation.architecture != "hopper":
        return f"the Hopper kernels do not run on {situation.architecture}"
    untested = why_untested(situation.triton, situation.gluon)
    if untested is not None:
        return untested
    if situation.asked == "portable":
        return f"{KERNELS} asks for it"
    return None


def why_untested(triton: str, gluon: str | None) -> str | None:
    """Why no call of this installation goes to the Hopper kernels, or None.

    Args:
        triton: Triton's version.
        gluon: What `why_no_gluon` gives.
    """
    if not triton.startswith(TESTED_TRITON):
        tested = " and ".join(version + "x" for version in TESTED_TRITON)
        return f"the Hopper kernels were tested with Triton {tested} only, and this is {triton}"
    if gluon is not None:
        return f"Triton's Gluon cannot be used: {gluon}"
    return None


@cache
def why_no_gluon() -> str | None:
    """Why the Hopper kernels cannot be imported, or None."""
    try:
        importlib.import_module("fa4_triton.hopper_launch")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def situation_of(
    request: Request,
    device: Device,
    dtype: str,
    direction: Direction,
    *,
    triton: str,
    gluon: str | None,
    asked: Asked,
    deterministic: bool = False,
) -> Situation:
    """The situation of a request."""
    return Situation(
        device.architecture,
        triton,
        gluon,
        request.query_shape[-1],
        dtype,
        _mask_of(request),
        direction,
        request.packed is not None,
        asked,
        deterministic,
    )


def _mask_of(request: Request) -> Mask:
    size = sizes_of(request)
    if size.left is not None or (size.right is not None and not request.causal):
        return "window"
    return "none" if size.right is None else "causal"


SMALLEST_SCALE = 1e-30
"""The kernels scale what is masked, -inf, which a scale that rounds to zero would make NaN."""


def why_not_this_call(
    request: Request,
    strides: tuple[Strides, ...],
    alignment: int,
    scale: Scale,
) -> str | None:
    """Why a call that the table gives to the Hopper forward cannot go there, or None.

    Args:
        request: What.
        strides: Of query, key, value and out.
        alignment: Bit i: tensor i starts at a multiple of 16 bytes.
        scale: The call's.
    """
    if scale != "positive":
        return "a scale that is zero, or nearly, or negative"
    if not sizes_of(request).has_pairs:
        return "no queries or no keys"
    if alignment & 0b1111 != 0b1111:
        return "a tensor does not start at a multiple of 16 bytes"
    for shape, given in zip(_shapes(request), strides, strict=True):
        used = [stride for size, stride in zip(shape, given[:-1], strict=False) if size > 1]
        if 0 in used:
            return "an expanded dimension"
        if any(stride % 8 or stride < 0 for stride in used):
            return "strides that are no multiples of 16 bytes"
        if any(stride >= 1 << 39 for stride in used):
            return "strides of a tebibyte or more"
    return None


FEWEST_ROWS = 64
"""Query rows of a consumer. One row of 8192 keys: 200 us here, 148 us on the portable kernel."""


class Tensor4(NamedTuple):
    """One tensor as TMA sees it."""

    shape: tuple[int, ...]  # [B, H, S, D], packed [1, H, T, D]
    strides: tuple[int, ...]
    block: tuple[int, ...]  # [1, 1, rows, D of the tile]


@dataclass(frozen=True, slots=True, eq=False)
class HopperPlan:
    """How the Hopper forward is launched. A key of caches, by identity.

    Attributes:
        tile: How it is cut.
        mask: How it is masked.
        varlen: Whether sequences are packed.
        tail: Whether the last block of keys may not be full, where nothing else masks it.
        programs: The grid, one-dimensional.
        tensors: Query, key, value and out.
        scalars: The int arguments, in the kernel's order.
    """

    tile: HopperTile
    mask: Mask
    varlen: bool
    tail: bool
    programs: int
    tensors: tuple[Tensor4, Tensor4, Tensor4, Tensor4]
    scalars: tuple[int, ...]


SIDE_BY_SIDE = 16
"""Heads that go side by side, at most: more begin with a long tile each, all from memory."""


def plan_hopper_forward(
    device: Device, request: Request, strides: tuple[Strides, ...], tile: HopperTile
) -> HopperPlan:
    """Plan a forward for which `why_not_this_call` gives None.

    Args:
        device: Where.
        request: What.
        strides: Of query, key, value and out.
        tile: How it is cut.
    """
    size = sizes_of(request)
    mask = _mask_of(request)
    varlen = request.packed is not None
    everything = size.seq_len_q + size.seq_len_k
    group = size.heads // size.heads_kv
    blocks = -(-size.seq_len_q // tile.m)
    heads_total = size.batch * size.heads
    tiles = blocks * heads_total
    section = section_of(heads_total, group, size.seq_len_k * size.head_dim, device)
    query, key, value, out = (
        _tensor(shape, given, rows, tile.d)
        for shape, given, rows in zip(
            _shapes(request), strides, (64, tile.n, tile.n, 64), strict=True
        )
    )
    return HopperPlan(
        tile,
        mask,
        varlen,
        tail=mask == "none" and (varlen or size.seq_len_k % tile.n != 0),
        programs=min(device.multiprocessors, tiles),
        tensors=(query, key, value, out),
        scalars=(
            size.heads,
            group,
            heads_total,
            request.query_shape[-3],
            request.key_shape[-3],
            everything if size.left is None else size.left,
            everything if size.right is None else size.right,
            tiles,
            blocks,
            min(section, max(group, SIDE_BY_SIDE)),
        ),
    )


def _shapes(request: Request) -> tuple[tuple[int, ...], ...]:
    return request.query_shape, request.key_shape, request.key_shape, request.query_shape


def _tensor(shape: tuple[int, ...], strides: Strides, rows: int, columns: int) -> Tensor4:
    if len(shape) == 3:  # packed: one long sequence
        shape, strides = (1, *shape), (0, *strides)
    batch, seq_len, heads, head_dim = shape
    # A dimension of size 1 may have any stride in torch; TMA wants one that is valid.
    used = [stride if size > 1 else head_dim for size, stride in zip(shape, strides, strict=True)]
    return Tensor4(
        (batch, heads, seq_len, head_dim),
        (used[0], used[2], used[1], 1),
        (1, 1, rows, columns),
    )
