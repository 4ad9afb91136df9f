"""What the kernels share: where an operand's rows lie, loading tiles, the mask, the loops' ranges.

Letters are the papers': Q K V O are operands, S = Q K^T the scores, P the probabilities, M a block
of query rows, N a block of keys, D the head dim. A head dim that is no power of two is held as two
column blocks, D0 + D1 (96 = 64 + 32, 192 = 128 + 64), so that no tile is padded to the next power
of two; D1 = 0 means one block. Columns past the head dim read as zero.

Row i sees key j when `i + shift - left <= j <= i + shift + right`, where `shift = Sk - Sq` aligns
the last query with the last key. Causal is `right = 0`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` for a kernel's entry, without specialisation on values.

    What a compiled variant depends on is then the constants, the dtypes and the alignment of the
    operands, which `fa4_triton.plan` knows, and nothing more.
    """
    scalars = ("tl.int32", "tl.int64", "tl.float32")
    arrays = ("lse", "delta", "cu_seqlens_q", "cu_seqlens_k")
    fixed = [name for name, kind in function.__annotations__.items() if kind in scalars]
    fixed += [name for name in arrays if name in function.__code__.co_varnames]
    return triton.jit(do_not_specialize=fixed)(function)


class Shape(NamedTuple):
    """What a kernel is compiled for; every field is a compile-time constant."""

    M: Any  # query rows in a block
    N: Any  # keys in a block
    D0: Any  # columns in the first block of the head dim
    D1: Any  # and in the second, 0 if there is one block
    HEAD_DIM: Any
    HAS_LEFT: Any  # a left window bounds the keys
    HAS_RIGHT: Any  # a right window or causal does


class Mask(NamedTuple):
    """Which keys the rows of one sequence see; all int32 scalars."""

    shift: Any  # seq_len_k - seq_len_q
    left: Any
    right: Any
    seq_len_q: Any
    seq_len_k: Any


class Rows(NamedTuple):
    """The rows of one operand that belong to one sequence and head."""

    pointer: Any  # to the first row
    end: Any  # rows in the sequence
    stride: Any  # elements between rows


@triton.jit
def operand(
    base,  # pointer to element [0, 0, 0, 0]
    batch,
    head,
    first,  # row of the tensor where the sequence starts
    end,
    stride_batch,  # in units of UNIT elements
    stride_head,
    stride_row,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`Rows` of one operand.

    Strides come divided by UNIT, 8 where all are multiples of 8, so that the compiler sees the
    multiplication and with it the alignment that 16-byte loads need. WIDE keeps row strides in 64
    bits, which costs registers: only strides whose tiles span 2^31 elements need it.
    """
    stride = stride_row * UNIT
    start = (batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head) * UNIT
    pointer = base + start + first.to(tl.int64) * stride
    if not WIDE:
        stride = stride.to(tl.int32)
    return Rows(pointer, end, stride)


@triton.jit
def columns(PART: tl.constexpr, shape: tl.constexpr):
    """Column indices of block PART of the head dim."""
    if PART == 1:
        return shape.D0 + tl.arange(0, shape.D1)
    else:
        return tl.arange(0, shape.D0)


@triton.jit
def load_tile(
    rows,
    row,
    COUNT: tl.constexpr,
    PART: tl.constexpr,
    shape: tl.constexpr,
    CHECK: tl.constexpr,
):
    """[COUNT, D0 or D1]: rows `row ...` of a sequence, column block PART.

    With CHECK, rows past the end of the sequence read as zero; without, they must not exist.
    """
    r = tl.arange(0, COUNT)
    c = columns(PART, shape)
    # The first row in 64 bits, the others in the stride's width: S * stride passes 2^31 long
    # before M * stride does.
    start = rows.pointer + row.to(tl.int64) * rows.stride
    pointers = start + (r[:, None] * rows.stride + c[None, :])
    if CHECK:
        inside = (row + r < rows.end)[:, None]
        if shape.D0 + shape.D1 > shape.HEAD_DIM:
            inside = inside & (c < shape.HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    elif shape.D0 + shape.D1 > shape.HEAD_DIM:
        tile = tl.load(pointers, mask=(c < shape.HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_blocks(rows, row, COUNT: tl.constexpr, shape: tl.constexpr):
    """Both column blocks, [COUNT, D0] and [COUNT, D1]; the first twice if there is no second."""
    tile0 = load_tile(rows, row, COUNT, 0, shape, True)
    if shape.D1 > 0:
        return tile0, load_tile(rows, row, COUNT, 1, shape, True)
    else:
        return tile0, tile0


@triton.jit
def store_tile(
    rows,
    row,
    tile,
    COUNT: tl.constexpr,
    PART: tl.constexpr,
    shape: tl.constexpr,
    SKIP_NAN: tl.constexpr,
):
    """Write `tile` [COUNT, D0 or D1] to rows `row ...` inside the sequence.

    With SKIP_NAN, elements that are NaN in `tile` keep what is in memory.
    """
    r = tl.arange(0, COUNT)
    c = columns(PART, shape)
    start = rows.pointer + row.to(tl.int64) * rows.stride
    pointers = start + (r[:, None] * rows.stride + c[None, :])
    inside = (row + r < rows.end)[:, None]
    if shape.D0 + shape.D1 > shape.HEAD_DIM:
        inside = inside & (c < shape.HEAD_DIM)[None, :]
    if SKIP_NAN:
        inside = inside & (tile == tile)
    tl.store(pointers, tile.to(rows.pointer.dtype.element_ty), mask=inside)


@triton.jit
def sequence(cu_seqlens, batch, seq_len, VARLEN: tl.constexpr):
    """(first row, length) of a sequence: from cu_seqlens [B + 1] int32, or dense (0, seq_len)."""
    if VARLEN:
        first = tl.load(cu_seqlens + batch)
        length = tl.load(cu_seqlens + batch + 1) - first
    else:
        first = seq_len * 0
        length = seq_len
    return first, length


@triton.jit
def row_stats(base, batch, head, first, stride_batch, stride_head):
    """Pointer to the number of row 0 of a sequence in lse or delta, [B, H, S] or [H, T] fp32."""
    return base + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head + first


@triton.jit
def place_in_grid(blocks, section, heads, heads_total, LAST_FIRST: tl.constexpr):
    """(block, batch, head) of this program, in a grid of `blocks * heads_total` programs.

    Programs start in order of their index. Heads go in sections, small enough that the operands
    which running programs share stay in the L2 cache. Within a section the longest loops go first,
    so that the short ones fill the end: under a causal mask these are the last block of queries
    (LAST_FIRST) or the first block of keys.
    """
    program = tl.program_id(0)
    section_size = blocks * section
    section_index = program // section_size
    within = program - section_index * section_size
    width = tl.minimum(section, heads_total - section_index * section)
    flat_head = section_index * section + within % width
    block = within // width
    if LAST_FIRST:
        block = blocks - 1 - block
    return block, flat_head // heads, flat_head % heads


@triton.jit
def visible(queries, keys, mask, shape: tl.constexpr):
    """Which keys each query row sees; both index tensors come expanded, e.g. [M, 1] and [1, N]."""
    seen = keys < mask.seq_len_k
    if shape.HAS_RIGHT:
        seen = seen & (keys <= queries + (mask.shift + mask.right))
    if shape.HAS_LEFT:
        seen = seen & (keys >= queries + (mask.shift - mask.left))
    return seen


@triton.jit
def _split(low, full_low, full_high, high, STEP: tl.constexpr):
    """Round the inner bounds inwards to whole blocks; an empty inner range ends where it starts."""
    low = low // STEP * STEP
    end = tl.maximum(low, (high + STEP - 1) // STEP * STEP)
    full_low = tl.minimum((full_low + STEP - 1) // STEP * STEP, end)
    full_high = tl.maximum(full_low, full_high // STEP * STEP)
    return low, full_low, full_high, high


@triton.jit
def key_ranges(row, mask, shape: tl.constexpr):
    """The keys that query rows `row ... row + M` see, as bounds (low, full_low, full_high, high).

    Blocks of N keys in `[low, full_low)` and `[full_high, high)` need the mask; those in
    `[full_low, full_high)` are seen whole by every row. All bounds but `high` are multiples of N.
    """
    last = tl.minimum(row + shape.M, mask.seq_len_q) - 1 + mask.shift
    first = row + mask.shift
    low = row * 0
    full_low = low
    high = low + mask.seq_len_k
    full_high = high
    if shape.HAS_RIGHT:
        high = tl.minimum(high, tl.maximum(last + mask.right + 1, 0))
        full_high = tl.minimum(full_high, tl.maximum(first + mask.right + 1, 0))
    if shape.HAS_LEFT:
        low = tl.maximum(first - mask.left, 0)
        full_low = tl.maximum(last - mask.left, 0)
    return _split(low, full_low, full_high, high, shape.N)


@triton.jit
def query_ranges(key, mask, shape: tl.constexpr):
    """The query rows that see keys `key ... key + N`, as `key_ranges` gives keys, blocks of M."""
    last = tl.minimum(key + shape.N, mask.seq_len_k) - 1 - mask.shift
    first = key - mask.shift
    low = key * 0
    full_low = low
    high = low + mask.seq_len_q
    full_high = high
    if shape.HAS_LEFT:
        high = tl.minimum(high, tl.maximum(last + mask.left + 1, 0))
        full_high = tl.minimum(full_high, tl.maximum(first + mask.left + 1, 0))
    if shape.HAS_RIGHT:
        low = tl.maximum(first - mask.right, 0)
        full_low = tl.maximum(last - mask.right, 0)
    return _split(low, full_low, full_high, high, shape.M)


@triton.jit
def finite(tile):
    """`tile` with zeros for what is infinite or NaN."""
    return tl.where(tl.abs(tile.to(tl.float32)) < float("inf"), tile, 0.0).to(tile.dtype)


@triton.jit
def any_nan(tile):
    """1 if a tile holds a NaN, else 0."""
    # Over all dimensions at once: one after the other does not compile for Blackwell (Triton 3.6).
    return tl.max((tile != tile).to(tl.int32))
