"""From what a call looks like to how its kernels are launched: pure functions, testable anywhere.

A plan depends on shapes, strides, alignment, masking and the device, never on addresses or data,
so plans are cached and a repeated call pays for one dictionary look-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from fa4_triton.tiles import Architecture, Kernel, Tile, head_dim_blocks, tile

if TYPE_CHECKING:
    from flash_attention_registry.sdpa import AttentionCall

__all__ = [
    "Constants",
    "Device",
    "Plan",
    "Request",
    "Sizes",
    "Strides",
    "plan_key_gradients",
    "plan_queries",
    "request_of",
    "section_of",
    "sizes_of",
]

Strides: TypeAlias = tuple[int, ...]


class Device(NamedTuple):
    """What plans need to know of a device."""

    architecture: Architecture
    l2_bytes: int
    multiprocessors: int


class Packed(NamedTuple):
    """Sizes of a packed batch that its tensors' shapes do not tell."""

    sequences: int
    longest_query: int
    longest_key: int


class Request(NamedTuple):
    """What of a call decides its plans."""

    query_shape: tuple[int, ...]  # [B, Sq, Hq, D] or [Tq, Hq, D]
    key_shape: tuple[int, ...]  # [B, Sk, Hkv, D] or [Tk, Hkv, D]
    causal: bool
    window_left: int | None
    window_right: int | None
    packed: Packed | None


def request_of(call: AttentionCall) -> Request:
    """Read a request off a call.

    A caller may say that a packed sequence is longer than it is: no more than all rows count.
    """
    offsets = call.cu_seqlens_query
    packed = None
    if offsets is not None:
        packed = Packed(
            offsets.shape[0] - 1,
            min(call.max_seqlen_query, call.query.shape[0]),
            min(call.max_seqlen_key, call.key.shape[0]),
        )
    return Request(
        call.query.shape, call.key.shape, call.causal, call.window_left, call.window_right, packed
    )


class Constants(NamedTuple):
    """What a kernel is compiled for, beside its tile and the tensors' dtype.

    The last three fields matter to one kernel each; the others leave them at their default.
    """

    d0: int
    d1: int
    head_dim: int
    has_left: bool
    has_right: bool
    varlen: bool
    unit: int  # strides are multiples of this many elements: 8 (16 bytes) or 1
    wide: bool  # a tile may span 2^31 elements: offsets within it need 64 bits
    alignment: int  # bit i: tensor i starts at a multiple of 16 bytes
    negative_scale: bool = False  # forward
    mha: bool = False  # dkdv: one query head a key head
    gradients: Kernel = "dkdv"  # dkdv: which gradients it computes


@dataclass(frozen=True, slots=True)
class Plan:
    """How one kernel is launched.

    Attributes:
        tile: Block sizes.
        constants: What it is compiled for.
        programs: The grid, one-dimensional.
        scalars: Its int arguments, strides and sizes, in the kernel's order.
    """

    tile: Tile
    constants: Constants
    programs: int
    scalars: tuple[int, ...]


class Sizes(NamedTuple):
    """What a request amounts to."""

    batch: int
    heads: int
    heads_kv: int
    head_dim: int
    seq_len_q: int  # of each sequence, or of the longest of a packed batch
    seq_len_k: int
    left: int | None
    right: int | None

    @property
    def has_pairs(self) -> bool:
        """Whether there is a query and a key in some sequence."""
        return 0 not in self[:6]


def sizes_of(request: Request) -> Sizes:
    """Sizes of a request; None for a window's bound that hides nothing."""
    heads, head_dim = request.query_shape[-2:]
    batch, seq_len_q, seq_len_k = request.packed or (
        request.query_shape[0],
        request.query_shape[1],
        request.key_shape[1],
    )
    left = request.window_left
    right = 0 if request.causal else request.window_right
    # A window as wide as both sequences hides nothing, and might not fit the kernels' int32.
    widest = seq_len_q + seq_len_k
    return Sizes(
        batch,
        heads,
        request.key_shape[-2],
        head_dim,
        seq_len_q,
        seq_len_k,
        None if left is None or left >= widest else left,
        None if right is None or right >= widest else right,
    )


def plan_queries(
    kernel: Kernel,
    device: Device,
    request: Request,
    strides: tuple[Strides, ...],
    alignment: int,
    negative_scale: bool = False,
    shape: Tile | None = None,
) -> Plan:
    """Plan a kernel whose programs each own a block of query rows: `"forward"` or `"dq"`.

    Args:
        kernel: Which.
        device: Where.
        request: What.
        strides: Of the kernel's tensors in its order, as torch gives them, query and key first.
        alignment: As `Constants.alignment`.
        negative_scale: Whether the scale is below zero.
        shape: A tile to use instead of the table's; sweeps give one.
    """
    size = sizes_of(request)
    shape = shape or tile(device.architecture, kernel, size.head_dim)
    group = size.heads // size.heads_kv
    blocks = -(-size.seq_len_q // shape.m)
    heads_total = size.batch * size.heads
    unit, longest, units = _in_units(kernel, request, strides)
    constants = _constants(request, size, shape, unit, longest, alignment)
    return Plan(
        shape,
        constants._replace(negative_scale=negative_scale),
        blocks * heads_total,
        (
            *units,
            *_stats_strides(request, size),
            size.heads,
            group,
            heads_total,
            size.seq_len_q,
            size.seq_len_k,
            size.left or 0,
            size.right or 0,
            blocks,
            section_of(heads_total, group, size.seq_len_k * size.head_dim, device),
        ),
    )


def plan_key_gradients(
    kernel: Kernel,
    device: Device,
    request: Request,
    strides: tuple[Strides, ...],
    alignment: int,
    shape: Tile | None = None,
) -> Plan:
    """Plan a kernel whose programs each own a block of keys: `"dkdv"`, `"dk"` or `"dv"`.

    Arguments are those of `plan_queries`.
    """
    size = sizes_of(request)
    shape = shape or tile(device.architecture, kernel, size.head_dim)
    group = size.heads // size.heads_kv
    blocks = -(-size.seq_len_k // shape.n)
    heads_total = size.batch * size.heads_kv
    unit, longest, units = _in_units(kernel, request, strides)
    constants = _constants(request, size, shape, unit, longest, alignment)
    return Plan(
        shape,
        constants._replace(mha=group == 1, gradients=kernel),
        blocks * heads_total,
        (
            *units,
            *_stats_strides(request, size),
            size.heads_kv,
            group,
            heads_total,
            size.seq_len_q,
            size.seq_len_k,
            size.left or 0,
            size.right or 0,
            blocks,
            section_of(heads_total, 1, size.seq_len_q * size.head_dim * group, device),
        ),
    )


def _constants(
    request: Request, size: Sizes, shape: Tile, unit: int, longest: int, alignment: int
) -> Constants:
    return Constants(
        *head_dim_blocks(size.head_dim),
        head_dim=size.head_dim,
        has_left=size.left is not None,
        has_right=size.right is not None,
        varlen=request.packed is not None,
        unit=unit,
        wide=longest * max(shape.m, shape.n) >= 1 << 31,
        alignment=alignment,
    )


# Which tensors of a kernel are shaped like the query and which like the key, in its order.
_SHAPED_LIKE: dict[Kernel, str] = {
    "forward": "qkkq",
    "dq": "qkkqqq",
    "dkdv": "qkkqkk",
    "dk": "qkkqkk",
    "dv": "qkkqkk",
}


def _in_units(
    kernel: Kernel, request: Request, strides: tuple[Strides, ...]
) -> tuple[int, int, tuple[int, ...]]:
    """(unit, longest row stride in elements, batch, head and row stride of each tensor in units).

    A packed tensor has batch stride 0: its batches are rows. So has a dimension of size 1, where
    torch allows any stride.
    """
    elements: list[tuple[int, int, int]] = []
    for like, given in zip(_SHAPED_LIKE[kernel], strides, strict=True):
        shape = request.query_shape if like == "q" else request.key_shape
        used = [0 if size == 1 else stride for size, stride in zip(shape, given, strict=True)]
        batch = 0 if request.packed is not None else used[0]
        elements.append((batch, used[-2], used[-3]))
    unit = 1 if any(stride % 8 for one in elements for stride in one) else 8
    longest = max(row for _, _, row in elements)
    return unit, longest, tuple(stride // unit for one in elements for stride in one)


def _stats_strides(request: Request, size: Sizes) -> tuple[int, int]:
    """Batch and head stride of lse and delta, contiguous [B, H, S] or [H, T]."""
    if request.packed is not None:
        return 0, request.query_shape[0]
    return size.heads * size.seq_len_q, size.seq_len_q


def section_of(heads: int, sharing: int, elements: int, device: Device) -> int:
    """How many of `heads` to run side by side.

    Every `sharing` of them read the same two operands of `elements` 2-byte elements over and over;
    what is read at a time should fit half the L2 cache. The other half is for what streams through.
    """
    fitting = device.l2_bytes // 2 // max(1, 2 * 2 * elements)
    return min(heads, sharing * max(1, fitting))
