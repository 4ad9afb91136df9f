"""Backward in two kernels, without atomics: dQ by blocks of query rows, then dK and dV by blocks of keys.

FlashAttention-2 (arXiv 2307.08691, algorithm 2) with the loop split in two: P is computed twice, 7 matrix products
instead of 5, and in exchange every gradient is summed by one program in one order, so gradients repeat bit for bit
and no fp32 copy of dQ goes through memory. P = exp2(S * scale * log2(e) - lse * log2(e)) needs no running maximum.

    delta = rowsum(O * dO)      dP = dO V^T         dS = P * (dP - delta)
    dV = P^T dO                 dK = scale dS^T Q   dQ = scale dS K
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fa4_triton.kernels.tiles import (
    LOG2_E,
    Mask,
    Rows,
    Shape,
    any_nan,
    finite,
    kernel,
    key_ranges,
    load_tile,
    operand,
    place_in_grid,
    query_ranges,
    sequence,
    store_tile,
    visible,
)


class Heads(NamedTuple):
    """The query heads that share one key head, from the first of them on."""

    q: Any  # Rows
    do: Any
    lse_rows: Any  # pointer
    delta_rows: Any
    q_stride: Any  # elements from head to head
    do_stride: Any
    lse_stride: Any
    count: Any


class Queries(NamedTuple):
    """What one block of query rows brings into the products."""

    q0: Any  # [M, D0]
    q1: Any  # [M, D1]
    do0: Any  # [M, D0]
    do1: Any  # [M, D1]
    lse_log2: Any  # [M] fp32
    delta: Any  # [M] fp32


@triton.jit
def _product(a0, a1, b, row, COUNT: tl.constexpr, shape: tl.constexpr, CHECK: tl.constexpr):
    """[rows of a, COUNT] fp32: A B^T over both column blocks, B loaded from rows `row ...`."""
    c = tl.dot(a0, load_tile(b, row, COUNT, 0, shape, CHECK).T)
    if shape.D1 > 0:
        c = tl.dot(a1, load_tile(b, row, COUNT, 1, shape, CHECK).T, c)
    return c


@triton.jit
def _grad_scores(x, k, v, row, key, scale_log2, mask, shape: tl.constexpr, MASKED: tl.constexpr):
    """[M, N] fp32: dS of one block of queries `x` (from row `row`) and one of keys; 0 where the mask hides the key."""
    s = _product(x.q0, x.q1, k, key, shape.N, shape, MASKED)
    p = tl.exp2(s * scale_log2 - x.lse_log2[:, None])
    dp = _product(x.do0, x.do1, v, key, shape.N, shape, MASKED)
    ds = p * (dp - x.delta[:, None])
    if MASKED:
        queries = row + tl.arange(0, shape.M)
        keys = key + tl.arange(0, shape.N)
        # Selected, not multiplied: scores and dP of hidden keys may be NaN.
        ds = tl.where(visible(queries[:, None], keys[None, :], mask, shape), ds, 0.0)
    return ds


@triton.jit
def _accumulate_dq(dq0, dq1, x, k, v, low, high, row, scale_log2, mask, shape: tl.constexpr, MASKED: tl.constexpr):
    """Add dS K over the keys `[low, high)`."""
    for key in tl.range(low, high, shape.N):
        key = tl.multiple_of(key, shape.N)
        ds = _grad_scores(x, k, v, row, key, scale_log2, mask, shape, MASKED)
        k0 = load_tile(k, key, shape.N, 0, shape, MASKED)
        ds = ds.to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0)
        if shape.D1 > 0:
            dq1 = tl.dot(ds, load_tile(k, key, shape.N, 1, shape, MASKED), dq1)
    return dq0, dq1


@triton.jit
def _load_queries(heads, member, row, mask, shape: tl.constexpr):
    """The `Queries` of rows `row ...` of one head; rows past the end read as zero."""
    queries = row + tl.arange(0, shape.M)
    inside = queries < mask.seq_len_q
    q = Rows(heads.q.pointer + member * heads.q_stride, heads.q.end, heads.q.stride)
    do = Rows(heads.do.pointer + member * heads.do_stride, heads.do.end, heads.do.stride)
    q0 = load_tile(q, row, shape.M, 0, shape, True)
    do0 = load_tile(do, row, shape.M, 0, shape, True)
    q1 = q0
    do1 = do0
    if shape.D1 > 0:
        q1 = load_tile(q, row, shape.M, 1, shape, True)
        do1 = load_tile(do, row, shape.M, 1, shape, True)
    at = member * heads.lse_stride + queries
    lse = tl.load(heads.lse_rows + at, mask=inside, other=0.0)
    delta = tl.load(heads.delta_rows + at, mask=inside, other=0.0)
    return Queries(q0, q1, do0, do1, lse * LOG2_E, delta)


@triton.jit
def _repair_dq(dq, heads, k, v, row, rows_end, scale, mask, shape: tl.constexpr, PART: tl.constexpr):
    """Write dQ of rows `row ... rows_end` again, column block PART, free of keys that each row does not see.

    As in the forward's repair: dS is 0 for a hidden key, but 0 * Inf is NaN, and K enters a matrix product.
    """
    for strip in tl.range(row, rows_end, shape.M, num_stages=1):
        strip = tl.multiple_of(strip, shape.M)
        queries = strip + tl.arange(0, shape.M)
        low, full_low, full_high, high = key_ranges(strip, mask, shape)
        x = _load_queries(heads, 0, strip, mask, shape)
        acc = tl.zeros([shape.M, shape.D1 if PART == 1 else shape.D0], tl.float32)
        for key in tl.range(low, high, shape.N, num_stages=1):
            key = tl.multiple_of(key, shape.N)
            k_tile = load_tile(k, key, shape.N, PART, shape, True)
            seen = visible(queries[:, None], (key + tl.arange(0, shape.N))[None, :], mask, shape)
            seen = tl.broadcast_to(seen, [shape.M, shape.N])
            acc = tl.dot(seen.to(k_tile.dtype), (finite(k_tile) != k_tile).to(k_tile.dtype), acc)
        acc = tl.where(acc > 0, float("nan"), 0.0)
        for key in tl.range(low, high, shape.N, num_stages=1):
            key = tl.multiple_of(key, shape.N)
            ds = _grad_scores(x, k, v, strip, key, scale * LOG2_E, mask, shape, True)
            k_tile = load_tile(k, key, shape.N, PART, shape, True)
            acc = tl.dot(ds.to(k_tile.dtype), finite(k_tile), acc)
        store_tile(dq, strip, acc * scale, shape.M, PART, shape, True)


@kernel
def dq_kernel(
    q,  # [B, Hq, Sq, D], packed [1, Hq, Tq, D]
    k,  # [B, Hkv, Sk, D], packed [1, Hkv, Tk, D]
    v,  # like k
    do,  # like q
    out,  # like q
    dq,  # like q, written
    lse,  # fp32 [B, Hq, Sq] or [Hq, Tq], natural log
    delta,  # like lse, written
    cu_seqlens_q,  # [B + 1] int32 or None
    cu_seqlens_k,
    scale: tl.float32,
    q_stride_batch: tl.int64,  # all but lse's and delta's in units of STRIDE_UNIT elements
    q_stride_head: tl.int64,
    q_stride_row: tl.int64,
    k_stride_batch: tl.int64,
    k_stride_head: tl.int64,
    k_stride_row: tl.int64,
    v_stride_batch: tl.int64,
    v_stride_head: tl.int64,
    v_stride_row: tl.int64,
    do_stride_batch: tl.int64,
    do_stride_head: tl.int64,
    do_stride_row: tl.int64,
    out_stride_batch: tl.int64,
    out_stride_head: tl.int64,
    out_stride_row: tl.int64,
    dq_stride_batch: tl.int64,
    dq_stride_head: tl.int64,
    dq_stride_row: tl.int64,
    lse_stride_batch: tl.int64,  # lse and delta
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
    STRIDE_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dQ and delta of one block of query rows of one head. Grid: (blocks * B * Hq,)."""
    shape: tl.constexpr = Shape(M, N, D0, D1, HEAD_DIM, HAS_LEFT, HAS_RIGHT, VARLEN)
    block, batch, head = place_in_grid(blocks, section, heads, heads_total, LAST_FIRST=True)
    first_q, length_q = sequence(cu_seqlens_q, batch, seq_len_q, VARLEN)
    first_k, length_k = sequence(cu_seqlens_k, batch, seq_len_k, VARLEN)
    row = block * M
    if row >= length_q:
        return
    mask = Mask(length_k - length_q, left, right, length_q, length_k)
    at_row0 = batch.to(tl.int64) * lse_stride_batch + head.to(tl.int64) * lse_stride_head + first_q
    lse_rows = lse + at_row0
    delta_rows = delta + at_row0
    if VARLEN:
        batch = batch * 0
    head_kv = head // group
    q_rows = operand(
        q, batch, head, first_q, length_q, q_stride_batch, q_stride_head, q_stride_row, STRIDE_UNIT, WIDE
    )
    k_rows = operand(
        k, batch, head_kv, first_k, length_k, k_stride_batch, k_stride_head, k_stride_row, STRIDE_UNIT, WIDE
    )
    v_rows = operand(
        v, batch, head_kv, first_k, length_k, v_stride_batch, v_stride_head, v_stride_row, STRIDE_UNIT, WIDE
    )
    out_rows = operand(
        out, batch, head, first_q, length_q, out_stride_batch, out_stride_head, out_stride_row, STRIDE_UNIT, WIDE
    )
    do_rows = operand(
        do, batch, head, first_q, length_q, do_stride_batch, do_stride_head, do_stride_row, STRIDE_UNIT, WIDE
    )
    dq_rows = operand(
        dq, batch, head, first_q, length_q, dq_stride_batch, dq_stride_head, dq_stride_row, STRIDE_UNIT, WIDE
    )

    rows = row + tl.arange(0, M)
    q0 = load_tile(q_rows, row, M, 0, shape, True)
    do0 = load_tile(do_rows, row, M, 0, shape, True)
    delta_block = tl.sum(load_tile(out_rows, row, M, 0, shape, True).to(tl.float32) * do0.to(tl.float32), 1)
    q1 = q0
    do1 = do0
    dq0 = tl.zeros([M, D0], tl.float32)
    dq1 = dq0
    if D1 > 0:
        q1 = load_tile(q_rows, row, M, 1, shape, True)
        do1 = load_tile(do_rows, row, M, 1, shape, True)
        delta_block += tl.sum(load_tile(out_rows, row, M, 1, shape, True).to(tl.float32) * do1.to(tl.float32), 1)
        dq1 = tl.zeros([M, D1], tl.float32)
    tl.store(delta_rows + rows, delta_block, mask=rows < length_q)
    lse_block = tl.load(lse_rows + rows, mask=rows < length_q, other=0.0)
    x = Queries(q0, q1, do0, do1, lse_block * LOG2_E, delta_block)

    low, full_low, full_high, high = key_ranges(row, mask, shape)
    scale_log2 = scale * LOG2_E
    if HAS_LEFT:
        dq0, dq1 = _accumulate_dq(dq0, dq1, x, k_rows, v_rows, low, full_low, row, scale_log2, mask, shape, True)
    dq0, dq1 = _accumulate_dq(dq0, dq1, x, k_rows, v_rows, full_low, full_high, row, scale_log2, mask, shape, False)
    dq0, dq1 = _accumulate_dq(dq0, dq1, x, k_rows, v_rows, full_high, high, row, scale_log2, mask, shape, True)

    store_tile(dq_rows, row, dq0 * scale, M, 0, shape, False)
    has_nan = any_nan(dq0)
    if D1 > 0:
        store_tile(dq_rows, row, dq1 * scale, M, 1, shape, False)
        has_nan += any_nan(dq1)
    if has_nan > 0:
        tl.debug_barrier()  # the strips read the delta that other threads stored
        strips: tl.constexpr = Shape(16, 32, D0, D1, HEAD_DIM, HAS_LEFT, HAS_RIGHT, VARLEN)
        rows_end = tl.minimum(row + M, length_q)
        one_head = Heads(q_rows, do_rows, lse_rows, delta_rows, 0, 0, 0, 1)
        _repair_dq(dq_rows, one_head, k_rows, v_rows, row, rows_end, scale, mask, strips, 0)
        if D1 > 0:
            _repair_dq(dq_rows, one_head, k_rows, v_rows, row, rows_end, scale, mask, strips, 1)


class KeyGradients(NamedTuple):
    """The accumulators of one block of keys."""

    dk0: Any  # [N, D0] fp32
    dk1: Any  # [N, D1] fp32
    dv0: Any
    dv1: Any


@triton.jit
def _accumulate_dkdv(
    grads, k0, k1, v0, v1, heads, low, high, key, scale_log2, mask, shape: tl.constexpr, MHA: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr
):
    """Add dS^T Q and P^T dO over the query rows `[low, high)` of every head in `heads`. Scores are held transposed.

    Rows past the end need no mask: Q and dO read as zero there, and so add nothing.
    """
    dk0 = grads.dk0
    dk1 = grads.dk1
    dv0 = grads.dv0
    dv1 = grads.dv1
    steps = tl.cdiv(tl.maximum(high - low, 0), shape.M)
    # One flat loop over heads and blocks: nested loops cost the registers that this kernel is short of.
    for step in tl.range(0, steps * heads.count):
        member = 0 if MHA else step // steps
        row = low + (step - member * steps) * shape.M
        row = tl.multiple_of(row, shape.M)
        rows = row + tl.arange(0, shape.M)
        x = _load_queries(heads, member, row, mask, shape)
        q0 = x.q0
        q1 = x.q1
        do0 = x.do0
        do1 = x.do1
        s = tl.dot(k0, q0.T)  # [N, M]
        if shape.D1 > 0:
            s = tl.dot(k1, q1.T, s)
        p = tl.exp2(s * scale_log2 - x.lse_log2[None, :])
        if MASKED:
            keys = key + tl.arange(0, shape.N)
            seen = visible(rows[None, :], keys[:, None], mask, shape) & (rows < mask.seq_len_q)[None, :]
            p = tl.where(seen, p, 0.0)
        if DV:
            dv0 = tl.dot(p.to(do0.dtype), do0, dv0)
            if shape.D1 > 0:
                dv1 = tl.dot(p.to(do0.dtype), do1, dv1)
        if DK:
            dp = tl.dot(v0, do0.T)
            if shape.D1 > 0:
                dp = tl.dot(v1, do1.T, dp)
            ds = p * (dp - x.delta[None, :])
            if MASKED:
                ds = tl.where(seen, ds, 0.0)
            ds = ds.to(q0.dtype)
            dk0 = tl.dot(ds, q0, dk0)
            if shape.D1 > 0:
                dk1 = tl.dot(ds, q1, dk1)
    return KeyGradients(dk0, dk1, dv0, dv1)


@kernel
def dkdv_kernel(
    q,  # [B, Hq, Sq, D], packed [1, Hq, Tq, D]
    k,  # [B, Hkv, Sk, D], packed [1, Hkv, Tk, D]
    v,  # like k
    do,  # like q
    dk,  # like k, written
    dv,  # like v, written
    lse,  # fp32 [B, Hq, Sq] or [Hq, Tq], natural log
    delta,  # like lse
    cu_seqlens_q,  # [B + 1] int32 or None
    cu_seqlens_k,
    scale: tl.float32,
    q_stride_batch: tl.int64,  # all but lse's and delta's in units of STRIDE_UNIT elements
    q_stride_head: tl.int64,
    q_stride_row: tl.int64,
    k_stride_batch: tl.int64,
    k_stride_head: tl.int64,
    k_stride_row: tl.int64,
    v_stride_batch: tl.int64,
    v_stride_head: tl.int64,
    v_stride_row: tl.int64,
    do_stride_batch: tl.int64,
    do_stride_head: tl.int64,
    do_stride_row: tl.int64,
    dk_stride_batch: tl.int64,
    dk_stride_head: tl.int64,
    dk_stride_row: tl.int64,
    dv_stride_batch: tl.int64,
    dv_stride_head: tl.int64,
    dv_stride_row: tl.int64,
    lse_stride_batch: tl.int64,  # lse and delta
    lse_stride_head: tl.int64,
    heads: tl.int32,  # Hkv
    group: tl.int32,  # Hq // Hkv
    heads_total: tl.int32,  # B * Hkv
    seq_len_q: tl.int32,  # dense only
    seq_len_k: tl.int32,
    left: tl.int32,
    right: tl.int32,
    blocks: tl.int32,  # of N keys in the longest sequence
    section: tl.int32,  # see place_in_grid
    M: tl.constexpr,
    N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    VARLEN: tl.constexpr,
    MHA: tl.constexpr,  # group is 1
    DK: tl.constexpr,  # compute dK
    DV: tl.constexpr,  # compute dV
    STRIDE_UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """dK and dV of one block of keys of one key head, summed over its query heads. Grid: (blocks * B * Hkv,)."""
    shape: tl.constexpr = Shape(M, N, D0, D1, HEAD_DIM, HAS_LEFT, HAS_RIGHT, VARLEN)
    block, batch, head_kv = place_in_grid(blocks, section, heads, heads_total, LAST_FIRST=False)
    first_q, length_q = sequence(cu_seqlens_q, batch, seq_len_q, VARLEN)
    first_k, length_k = sequence(cu_seqlens_k, batch, seq_len_k, VARLEN)
    key = block * N
    if key >= length_k:
        return
    mask = Mask(length_k - length_q, left, right, length_q, length_k)
    head = head_kv * group
    at_row0 = batch.to(tl.int64) * lse_stride_batch + head.to(tl.int64) * lse_stride_head + first_q
    if VARLEN:
        batch = batch * 0
    q_rows = operand(
        q, batch, head, first_q, length_q, q_stride_batch, q_stride_head, q_stride_row, STRIDE_UNIT, WIDE
    )
    do_rows = operand(
        do, batch, head, first_q, length_q, do_stride_batch, do_stride_head, do_stride_row, STRIDE_UNIT, WIDE
    )
    q_heads = Heads(
        q_rows, do_rows, lse + at_row0, delta + at_row0, q_stride_head * STRIDE_UNIT, do_stride_head * STRIDE_UNIT, lse_stride_head, group
    )
    k_rows = operand(
        k, batch, head_kv, first_k, length_k, k_stride_batch, k_stride_head, k_stride_row, STRIDE_UNIT, WIDE
    )
    v_rows = operand(
        v, batch, head_kv, first_k, length_k, v_stride_batch, v_stride_head, v_stride_row, STRIDE_UNIT, WIDE
    )
    dk_rows = operand(
        dk, batch, head_kv, first_k, length_k, dk_stride_batch, dk_stride_head, dk_stride_row, STRIDE_UNIT, WIDE
    )
    dv_rows = operand(
        dv, batch, head_kv, first_k, length_k, dv_stride_batch, dv_stride_head, dv_stride_row, STRIDE_UNIT, WIDE
    )

    k0 = load_tile(k_rows, key, N, 0, shape, True)
    v0 = load_tile(v_rows, key, N, 0, shape, True)
    k1 = k0
    v1 = v0
    dk0 = tl.zeros([N, D0], tl.float32)
    dv0 = tl.zeros([N, D0], tl.float32)
    dk1 = dk0
    dv1 = dv0
    if D1 > 0:
        k1 = load_tile(k_rows, key, N, 1, shape, True)
        v1 = load_tile(v_rows, key, N, 1, shape, True)
        dk1 = tl.zeros([N, D1], tl.float32)
        dv1 = tl.zeros([N, D1], tl.float32)
    grads = KeyGradients(dk0, dk1, dv0, dv1)

    low, full_low, full_high, high = query_ranges(key, mask, shape)
    scale_log2 = scale * LOG2_E
    # The unmasked loop first: with the masked one before it, ptxas serialises the matrix products of both (C7515).
    if HAS_LEFT:
        grads = _accumulate_dkdv(grads, k0, k1, v0, v1, q_heads, full_low, full_high, key, scale_log2, mask, shape, MHA, DK, DV, False)
        grads = _accumulate_dkdv(grads, k0, k1, v0, v1, q_heads, full_high, high, key, scale_log2, mask, shape, MHA, DK, DV, True)
    else:
        grads = _accumulate_dkdv(grads, k0, k1, v0, v1, q_heads, full_low, high, key, scale_log2, mask, shape, MHA, DK, DV, False)
    if HAS_RIGHT:
        grads = _accumulate_dkdv(grads, k0, k1, v0, v1, q_heads, low, full_low, key, scale_log2, mask, shape, MHA, DK, DV, True)

    if DK:
        store_tile(dk_rows, key, grads.dk0 * scale, N, 0, shape, False)
        if D1 > 0:
            store_tile(dk_rows, key, grads.dk1 * scale, N, 1, shape, False)
    if DV:
        store_tile(dv_rows, key, grads.dv0, N, 0, shape, False)
        if D1 > 0:
            store_tile(dv_rows, key, grads.dv1, N, 1, shape, False)
