"""Forward: one program per block of query rows, online softmax over blocks of keys.

FlashAttention-2 (arXiv 2307.08691, algorithm 1) with the scale folded into the exponent: the
running maximum and the exponents count in log2, `P = exp2(S * scale * log2(e) - maximum)`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fa4_triton.kernels.blocks import (
    LN_2,
    LOG2_E,
    Mask,
    Shape,
    any_nan,
    finite,
    kernel,
    key_ranges,
    load_blocks,
    load_tile,
    operand,
    place_in_grid,
    row_stats,
    sequence,
    store_tile,
    visible,
)


class Softmax(NamedTuple):
    """The state of the online softmax of one block of query rows."""

    acc0: Any  # [M, D0] fp32, unnormalised output
    acc1: Any  # [M, D1] fp32
    maximum: Any  # [M] fp32, of the scaled scores, log2
    total: Any  # [M] fp32, sum of P


@triton.jit
def _scores(
    q,  # (q0, q1), [M, D0] and [M, D1]
    k,
    row,
    key,
    scale_log2,
    mask,
    shape: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[M, N] fp32: Q K^T, negated where the scale is negative so that a maximum stays a maximum.

    MASKED gives scaled scores with -inf where a row does not see the key; scaled first, since
    -inf times a scale of zero would be NaN.
    """
    s = tl.dot(q[0], load_tile(k, key, shape.N, 0, shape, MASKED).T)
    if shape.D1 > 0:
        s = tl.dot(q[1], load_tile(k, key, shape.N, 1, shape, MASKED).T, s)
    if NEGATIVE_SCALE:
        s = -s
    if MASKED:
        queries = row + tl.arange(0, shape.M)
        keys = key + tl.arange(0, shape.N)
        seen = visible(queries[:, None], keys[None, :], mask, shape)
        s = tl.where(seen, s * scale_log2, float("-inf"))
    return s


@triton.jit
def _attend(
    state,
    q,
    k,
    v,
    low,
    high,
    row,
    scale_log2,
    mask,
    shape: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take the keys `[low, high)` into the softmax. `scale_log2` is |scale| * log2(e)."""
    acc0 = state.acc0
    acc1 = state.acc1
    maximum = state.maximum
    total = state.total
    for key in tl.range(low, high, shape.N):
        key = tl.multiple_of(key, shape.N)
        s = _scores(q, k, row, key, scale_log2, mask, shape, NEGATIVE_SCALE, MASKED)
        if MASKED:
            new_maximum = tl.maximum(maximum, tl.max(s, 1))
            # A row that has seen no key yet subtracts 0, not -inf: its P is exp2(-inf) = 0.
            offset = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
            p = tl.exp2(s - offset[:, None])
        else:
            new_maximum = tl.maximum(maximum, tl.max(s, 1) * scale_log2)
            offset = new_maximum
            p = tl.exp2(s * scale_log2 - offset[:, None])
        rescale = tl.exp2(maximum - offset)
        total = total * rescale + tl.sum(p, 1)
        maximum = new_maximum
        acc0 = acc0 * rescale[:, None]
        v0 = load_tile(v, key, shape.N, 0, shape, MASKED)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0)
        if shape.D1 > 0:
            acc1 = acc1 * rescale[:, None]
            acc1 = tl.dot(p, load_tile(v, key, shape.N, 1, shape, MASKED), acc1)
    return Softmax(acc0, acc1, maximum, total)


@triton.jit
def _repair(
    out,
    lse_rows,
    q,
    k,
    v,
    row,
    rows_end,
    scale_log2,
    mask,
    shape: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    PART: tl.constexpr,
):
    """Write out of rows `row ... rows_end` again, column block PART, free of unseen keys.

    A matrix product spreads an Inf or NaN of V to every row of a block, 0 * Inf being NaN. This
    runs only for blocks whose output holds a NaN, after they are stored, from memory and in strips
    of few rows, so that the main loop pays no register for it. First mark the elements that do see
    something not finite (what is stored stands), then multiply what is finite.
    """
    for strip in tl.range(row, rows_end, shape.M, num_stages=1):
        strip = tl.multiple_of(strip, shape.M)
        queries = strip + tl.arange(0, shape.M)
        low, _, _, high = key_ranges(strip, mask, shape)
        acc = tl.zeros([shape.M, shape.D1 if PART == 1 else shape.D0], tl.float32)
        for key in tl.range(low, high, shape.N, num_stages=1):
            key = tl.multiple_of(key, shape.N)
            v_tile = load_tile(v, key, shape.N, PART, shape, True)
            keys = key + tl.arange(0, shape.N)
            seen = visible(queries[:, None], keys[None, :], mask, shape)
            seen = tl.broadcast_to(seen, [shape.M, shape.N]).to(v_tile.dtype)
            acc = tl.dot(seen, (finite(v_tile) != v_tile).to(v_tile.dtype), acc)
        acc = tl.where(acc > 0, float("nan"), 0.0)
        q_strip = load_blocks(q, strip, shape.M, shape)
        lse = tl.load(lse_rows + queries, mask=queries < mask.seq_len_q, other=0.0)
        lse = tl.where(lse == float("-inf"), 0.0, lse)  # no keys: P is exp2(-inf - 0), not NaN
        for key in tl.range(low, high, shape.N, num_stages=1):
            key = tl.multiple_of(key, shape.N)
            s = _scores(q_strip, k, strip, key, scale_log2, mask, shape, NEGATIVE_SCALE, True)
            p = tl.exp2(s - (lse * LOG2_E)[:, None])
            v_tile = load_tile(v, key, shape.N, PART, shape, True)
            acc = tl.dot(p.to(v_tile.dtype), finite(v_tile), acc)
        store_tile(out, strip, acc, shape.M, PART, shape, True)


@kernel
def forward_kernel(
    q,  # [B, Hq, Sq, D], packed [1, Hq, Tq, D]
    k,  # [B, Hkv, Sk, D], packed [1, Hkv, Tk, D]
    v,  # like k
    out,  # like q
    lse,  # fp32 [B, Hq, Sq] or [Hq, Tq], natural log
    cu_seqlens_q,  # [B + 1] int32 or None
    cu_seqlens_k,
    scale_log2: tl.float32,  # |scale| * log2(e)
    lse_of_empty_rows: tl.float32,
    q_stride_batch: tl.int64,  # all but lse's in units of UNIT elements
    q_stride_head: tl.int64,
    q_stride_row: tl.int64,
    k_stride_batch: tl.int64,
    k_stride_head: tl.int64,
    k_stride_row: tl.int64,
    v_stride_batch: tl.int64,
    v_stride_head: tl.int64,
    v_stride_row: tl.int64,
    o_stride_batch: tl.int64,
    o_stride_head: tl.int64,
    o_stride_row: tl.int64,
    lse_stride_batch: tl.int64,
    lse_stride_head: tl.int64,
    heads: tl.int32,  # Hq
    group: tl.int32,  # Hq // Hkv
    heads_total: tl.int32,  # B * Hq
    seq_len_q: tl.int32,  # dense only
    seq_len_k: tl.int32,
    left: tl.int32,
    right: tl.int32,
    blocks: tl.int32,  # of M rows in the longest sequence
    section: tl.int32,  # see place_in_grid
    M: tl.constexpr,
    N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    VARLEN: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Out and lse of one block of query rows of one head. Grid: (blocks * B * Hq,)."""
    shape: tl.constexpr = Shape(M, N, D0, D1, HEAD_DIM, HAS_LEFT, HAS_RIGHT)
    block, batch, head = place_in_grid(blocks, section, heads, heads_total, LAST_FIRST=True)
    first_q, length_q = sequence(cu_seqlens_q, batch, seq_len_q, VARLEN)
    first_k, length_k = sequence(cu_seqlens_k, batch, seq_len_k, VARLEN)
    row = block * M
    if row >= length_q:
        return
    mask = Mask(length_k - length_q, left, right, length_q, length_k)
    lse_rows = row_stats(lse, batch, head, first_q, lse_stride_batch, lse_stride_head)
    q_rows = operand(
        q, batch, head, first_q, length_q, q_stride_batch, q_stride_head, q_stride_row, UNIT, WIDE
    )
    head_kv = head // group
    k_rows = operand(
        k,
        batch,
        head_kv,
        first_k,
        length_k,
        k_stride_batch,
        k_stride_head,
        k_stride_row,
        UNIT,
        WIDE,
    )
    v_rows = operand(
        v,
        batch,
        head_kv,
        first_k,
        length_k,
        v_stride_batch,
        v_stride_head,
        v_stride_row,
        UNIT,
        WIDE,
    )
    out_rows = operand(
        out, batch, head, first_q, length_q, o_stride_batch, o_stride_head, o_stride_row, UNIT, WIDE
    )

    q_block = load_blocks(q_rows, row, shape.M, shape)
    acc0 = tl.zeros([M, D0], tl.float32)
    acc1 = acc0
    if D1 > 0:
        acc1 = tl.zeros([M, D1], tl.float32)
    maximum = tl.full([M], float("-inf"), tl.float32)
    state = Softmax(acc0, acc1, maximum, tl.zeros([M], tl.float32))

    low, full_low, full_high, high = key_ranges(row, mask, shape)
    if HAS_LEFT:
        state = _attend(
            state,
            q_block,
            k_rows,
            v_rows,
            low,
            full_low,
            row,
            scale_log2,
            mask,
            shape,
            NEGATIVE_SCALE,
            True,
        )
    state = _attend(
        state,
        q_block,
        k_rows,
        v_rows,
        full_low,
        full_high,
        row,
        scale_log2,
        mask,
        shape,
        NEGATIVE_SCALE,
        False,
    )
    state = _attend(
        state,
        q_block,
        k_rows,
        v_rows,
        full_high,
        high,
        row,
        scale_log2,
        mask,
        shape,
        NEGATIVE_SCALE,
        True,
    )

    maximum = state.maximum
    empty = state.total == 0.0  # no key seen; a row of NaN scores has a total of NaN
    inverse = tl.where(empty, 0.0, 1.0 / state.total)
    rows = row + tl.arange(0, M)
    lse_values = tl.where(empty, lse_of_empty_rows, (maximum + tl.log2(state.total)) * LN_2)
    tl.store(lse_rows + rows, lse_values, mask=rows < length_q)
    store_tile(out_rows, row, state.acc0 * inverse[:, None], M, 0, shape, False)
    has_nan = any_nan(state.acc0)
    if D1 > 0:
        store_tile(out_rows, row, state.acc1 * inverse[:, None], M, 1, shape, False)
        has_nan += any_nan(state.acc1)
    if has_nan > 0:
        tl.debug_barrier()  # the strips read the lse that other threads stored
        strips: tl.constexpr = Shape(16, 32, D0, D1, HEAD_DIM, HAS_LEFT, HAS_RIGHT)
        end = tl.minimum(row + M, length_q)
        _repair(
            out_rows,
            lse_rows,
            q_rows,
            k_rows,
            v_rows,
            row,
            end,
            scale_log2,
            mask,
            strips,
            NEGATIVE_SCALE,
            0,
        )
        if D1 > 0:
            _repair(
                out_rows,
                lse_rows,
                q_rows,
                k_rows,
                v_rows,
                row,
                end,
                scale_log2,
                mask,
                strips,
                NEGATIVE_SCALE,
                1,
            )
