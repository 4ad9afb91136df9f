"""Backward without atomics: dQ by blocks of query rows, then dK and dV by blocks of keys.

FlashAttention-2 (arXiv 2307.08691, algorithm 2) with the loop split in two. P is computed twice, 7
matrix products instead of 5; in exchange every gradient is summed by one program in one order, so
gradients repeat bit for bit and no fp32 copy of dQ goes through memory. From the forward's lse,
P = exp2(S * scale * log2(e) - lse * log2(e)) without a running maximum.

    delta = rowsum(O * dO)      dP = dO V^T         dS = P * (dP - delta)
    dV = P^T dO                 dK = scale dS^T Q   dQ = scale dS K
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fa4_triton.kernels.blocks import (
    LOG2_E,
    Mask,
    Rows,
    Shape,
    any_nan,
    finite,
    kernel,
    key_ranges,
    load_blocks,
    load_tile,
    operand,
    place_in_grid,
    query_ranges,
    row_stats,
    sequence,
    store_tile,
    visible,
)


class Heads(NamedTuple):
    """The query heads that share one key head, from the first of them on."""

    q: Any  # Rows
    do: Any  # Rows
    lse_rows: Any  # pointer
    delta_rows: Any  # pointer
    q_stride: Any  # elements from head to head
    do_stride: Any
    stats_stride: Any  # lse and delta
    count: Any


class Queries(NamedTuple):
    """What one block of query rows brings into the products."""

    q: Any  # [M, D0] and [M, D1]
    do: Any  # [M, D0] and [M, D1]
    lse_log2: Any  # [M] fp32
    delta: Any  # [M] fp32


@triton.jit
def _load_head(heads, member, row, mask, shape: tl.constexpr):
    """The `Queries` of rows `row ...` of one of the heads; rows past the end read as zero."""
    queries = row + tl.arange(0, shape.M)
    inside = queries < mask.seq_len_q
    q = Rows(heads.q.pointer + member * heads.q_stride, heads.q.end, heads.q.stride)
    do = Rows(heads.do.pointer + member * heads.do_stride, heads.do.end, heads.do.stride)
    at = member * heads.stats_stride + queries
    lse = tl.load(heads.lse_rows + at, mask=inside, other=0.0)
    delta = tl.load(heads.delta_rows + at, mask=inside, other=0.0)
    return Queries(
        load_blocks(q, row, shape.M, shape),
        load_blocks(do, row, shape.M, shape),
        lse * LOG2_E,
        delta,
    )


@triton.jit
def _product(a, b, row, COUNT: tl.constexpr, shape: tl.constexpr, CHECK: tl.constexpr):
    """[rows of a, COUNT] fp32: A B^T over both column blocks, B loaded from rows `row ...`."""
    c = tl.dot(a[0], load_tile(b, row, COUNT, 0, shape, CHECK).T)
    if shape.D1 > 0:
        c = tl.dot(a[1], load_tile(b, row, COUNT, 1, shape, CHECK).T, c)
    return c


@triton.jit
def _grad_scores(x, k, v, row, key, scale_log2, mask, shape: tl.constexpr, MASKED: tl.constexpr):
    """[M, N] fp32: dS of queries `x` (from row `row`) and keys `key ...`; 0 for unseen keys."""
    s = _product(x.q, k, key, shape.N, shape, MASKED)
    p = tl.exp2(s * scale_log2 - x.lse_log2[:, None])
    dp = _product(x.do, v, key, shape.N, shape, MASKED)
    ds = p * (dp - x.delta[:, None])
    if MASKED:
        queries = row + tl.arange(0, shape.M)
        keys = key + tl.arange(0, shape.N)
        # Selected, not multiplied: scores and dP of unseen keys may be NaN.
        ds = tl.where(visible(queries[:, None], keys[None, :], mask, shape), ds, 0.0)
    return ds


@triton.jit
def _accumulate_dq(
    dq, x, k, v, low, high, row, scale_log2, mask, shape: tl.constexpr, MASKED: tl.constexpr
):
    """Add dS K over the keys `[low, high)` to dq, [M, D0] and [M, D1]."""
    dq0 = dq[0]
    dq1 = dq[1]
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
def _repair_dq(dq, head, k, v, row, rows_end, scale, mask, shape: tl.constexpr, PART: tl.constexpr):
    """Write dQ of rows `row ... rows_end` again, column block PART, free of unseen keys.

    As the forward's repair does for out: dS of an unseen key is 0, but 0 * Inf is NaN.
    """
    for strip in tl.range(row, rows_end, shape.M, num_stages=1):
        strip = tl.multiple_of(strip, shape.M)
        queries = strip + tl.arange(0, shape.M)
        low, _, _, high = key_ranges(strip, mask, shape)
        acc = tl.zeros([shape.M, shape.D1 if PART == 1 else shape.D0], tl.float32)
        for key in tl.range(low, high, shape.N, num_stages=1):
            key = tl.multiple_of(key, shape.N)
            k_tile = load_tile(k, key, shape.N, PART, shape, True)
            keys = key + tl.arange(0, shape.N)
            seen = visible(queries[:, None], keys[None, :], mask, shape)
            seen = tl.broadcast_to(seen, [shape.M, shape.N]).to(k_tile.dtype)
            acc = tl.dot(seen, (finite(k_tile) != k_tile).to(k_tile.dtype), acc)
        acc = tl.where(acc > 0, float("nan"), 0.0)
        x = _load_head(head, 0, strip, mask, shape)
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
    q_stride_batch: tl.int64,  # all but lse's and delta's in units of UNIT elements
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
    o_stride_batch: tl.int64,
    o_stride_head: tl.int64,
    o_stride_row: tl.int64,
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
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradient dQ, and delta, of one block of query rows of one head. Grid: (blocks * B * Hq,)."""
    shape: tl.constexpr = Shape(M, N, D0, D1, HEAD_DIM, HAS_LEFT, HAS_RIGHT)
    block, batch, head = place_in_grid(blocks, section, heads, heads_total, LAST_FIRST=True)
    first_q, length_q = sequence(cu_seqlens_q, batch, seq_len_q, VARLEN)
    first_k, length_k = sequence(cu_seqlens_k, batch, seq_len_k, VARLEN)
    row = block * M
    if row >= length_q:
        return
    mask = Mask(length_k - length_q, left, right, length_q, length_k)
    lse_rows = row_stats(lse, batch, head, first_q, lse_stride_batch, lse_stride_head)
    delta_rows = row_stats(delta, batch, head, first_q, lse_stride_batch, lse_stride_head)
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
    do_rows = operand(
        do,
        batch,
        head,
        first_q,
        length_q,
        do_stride_batch,
        do_stride_head,
        do_stride_row,
        UNIT,
        WIDE,
    )
    out_rows = operand(
        out, batch, head, first_q, length_q, o_stride_batch, o_stride_head, o_stride_row, UNIT, WIDE
    )
    dq_rows = operand(
        dq,
        batch,
        head,
        first_q,
        length_q,
        dq_stride_batch,
        dq_stride_head,
        dq_stride_row,
        UNIT,
        WIDE,
    )

    q_block = load_blocks(q_rows, row, shape.M, shape)
    do_block = load_blocks(do_rows, row, shape.M, shape)
    out_block = load_blocks(out_rows, row, shape.M, shape)
    delta_block = tl.sum(out_block[0].to(tl.float32) * do_block[0].to(tl.float32), 1)
    dq0 = tl.zeros([M, D0], tl.float32)
    dq1 = dq0
    if D1 > 0:
        delta_block += tl.sum(out_block[1].to(tl.float32) * do_block[1].to(tl.float32), 1)
        dq1 = tl.zeros([M, D1], tl.float32)
    rows = row + tl.arange(0, M)
    tl.store(delta_rows + rows, delta_block, mask=rows < length_q)
    lse_block = tl.load(lse_rows + rows, mask=rows < length_q, other=0.0)
    x = Queries(q_block, do_block, lse_block * LOG2_E, delta_block)

    low, full_low, full_high, high = key_ranges(row, mask, shape)
    scale_log2 = scale * LOG2_E
    grad = (dq0, dq1)
    if HAS_LEFT:
        grad = _accumulate_dq(
            grad, x, k_rows, v_rows, low, full_low, row, scale_log2, mask, shape, True
        )
    grad = _accumulate_dq(
        grad, x, k_rows, v_rows, full_low, full_high, row, scale_log2, mask, shape, False
    )
    grad = _accumulate_dq(
        grad, x, k_rows, v_rows, full_high, high, row, scale_log2, mask, shape, True
    )

    store_tile(dq_rows, row, grad[0] * scale, M, 0, shape, False)
    has_nan = any_nan(grad[0])
    if D1 > 0:
        store_tile(dq_rows, row, grad[1] * scale, M, 1, shape, False)
        has_nan += any_nan(grad[1])
    if has_nan > 0:
        tl.debug_barrier()  # the strips read the delta that other threads stored
        strips: tl.constexpr = Shape(16, 32, D0, D1, HEAD_DIM, HAS_LEFT, HAS_RIGHT)
        end = tl.minimum(row + M, length_q)
        this_head = Heads(q_rows, do_rows, lse_rows, delta_rows, 0, 0, 0, 1)
        _repair_dq(dq_rows, this_head, k_rows, v_rows, row, end, scale, mask, strips, 0)
        if D1 > 0:
            _repair_dq(dq_rows, this_head, k_rows, v_rows, row, end, scale, mask, strips, 1)


class Wanted(NamedTuple):
    """What a launch of `dkdv_kernel` computes; compile-time constants."""

    DK: Any
    DV: Any
    MHA: Any  # one query head a key head


class KeyGradients(NamedTuple):
    """The accumulators of one block of keys."""

    dk0: Any  # [N, D0] fp32
    dk1: Any  # [N, D1] fp32
    dv0: Any
    dv1: Any


@triton.jit
def _accumulate_dkdv(
    grads,
    k,  # [N, D0] and [N, D1]
    v,
    heads,
    low,
    high,
    key,
    scale_log2,
    mask,
    shape: tl.constexpr,
    wanted: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add dS^T Q and P^T dO over the query rows `[low, high)` of every head; scores are [N, M].

    Rows past the end need no mask: Q and dO read as zero there, and so add nothing.
    """
    dk0 = grads.dk0
    dk1 = grads.dk1
    dv0 = grads.dv0
    dv1 = grads.dv1
    steps = tl.cdiv(tl.maximum(high - low, 0), shape.M)
    # One flat loop over heads and blocks: nested ones cost the registers that are short here.
    for step in tl.range(0, steps * heads.count):
        member = 0 if wanted.MHA else step // steps
        row = tl.multiple_of(low + (step - member * steps) * shape.M, shape.M)
        x = _load_head(heads, member, row, mask, shape)
        s = tl.dot(k[0], x.q[0].T)
        if shape.D1 > 0:
            s = tl.dot(k[1], x.q[1].T, s)
        p = tl.exp2(s * scale_log2 - x.lse_log2[None, :])
        if MASKED:
            queries = row + tl.arange(0, shape.M)
            keys = key + tl.arange(0, shape.N)
            seen = visible(queries[None, :], keys[:, None], mask, shape)
            seen = seen & (queries < mask.seq_len_q)[None, :]
            p = tl.where(seen, p, 0.0)
        if wanted.DV:
            p_rounded = p.to(x.do[0].dtype)
            dv0 = tl.dot(p_rounded, x.do[0], dv0)
            if shape.D1 > 0:
                dv1 = tl.dot(p_rounded, x.do[1], dv1)
        if wanted.DK:
            dp = tl.dot(v[0], x.do[0].T)
            if shape.D1 > 0:
                dp = tl.dot(v[1], x.do[1].T, dp)
            ds = p * (dp - x.delta[None, :])
            if MASKED:
                ds = tl.where(seen, ds, 0.0)  # dP of what is unseen may be NaN
            ds = ds.to(x.q[0].dtype)
            dk0 = tl.dot(ds, x.q[0], dk0)
            if shape.D1 > 0:
                dk1 = tl.dot(ds, x.q[1], dk1)
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
    q_stride_batch: tl.int64,  # all but lse's and delta's in units of UNIT elements
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
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradients dK and dV of one block of keys of one key head, over its query heads.

    Grid: (blocks * B * Hkv,). Head dims whose two accumulators do not fit the registers take one
    launch for each gradient.
    """
    shape: tl.constexpr = Shape(M, N, D0, D1, HEAD_DIM, HAS_LEFT, HAS_RIGHT)
    wanted: tl.constexpr = Wanted(DK, DV, MHA)
    block, batch, head_kv = place_in_grid(blocks, section, heads, heads_total, LAST_FIRST=False)
    first_q, length_q = sequence(cu_seqlens_q, batch, seq_len_q, VARLEN)
    first_k, length_k = sequence(cu_seqlens_k, batch, seq_len_k, VARLEN)
    key = block * N
    if key >= length_k:
        return
    mask = Mask(length_k - length_q, left, right, length_q, length_k)
    head = head_kv * group
    q_rows = operand(
        q, batch, head, first_q, length_q, q_stride_batch, q_stride_head, q_stride_row, UNIT, WIDE
    )
    do_rows = operand(
        do,
        batch,
        head,
        first_q,
        length_q,
        do_stride_batch,
        do_stride_head,
        do_stride_row,
        UNIT,
        WIDE,
    )
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
    dk_rows = operand(
        dk,
        batch,
        head_kv,
        first_k,
        length_k,
        dk_stride_batch,
        dk_stride_head,
        dk_stride_row,
        UNIT,
        WIDE,
    )
    dv_rows = operand(
        dv,
        batch,
        head_kv,
        first_k,
        length_k,
        dv_stride_batch,
        dv_stride_head,
        dv_stride_row,
        UNIT,
        WIDE,
    )
    q_heads = Heads(
        q_rows,
        do_rows,
        row_stats(lse, batch, head, first_q, lse_stride_batch, lse_stride_head),
        row_stats(delta, batch, head, first_q, lse_stride_batch, lse_stride_head),
        q_stride_head * UNIT,
        do_stride_head * UNIT,
        lse_stride_head,
        group,
    )

    k_block = load_blocks(k_rows, key, shape.N, shape)
    v_block = load_blocks(v_rows, key, shape.N, shape)
    dk0 = tl.zeros([N, D0], tl.float32)
    dv0 = tl.zeros([N, D0], tl.float32)
    dk1 = dk0
    dv1 = dv0
    if D1 > 0:
        dk1 = tl.zeros([N, D1], tl.float32)
        dv1 = tl.zeros([N, D1], tl.float32)
    grads = KeyGradients(dk0, dk1, dv0, dv1)

    low, full_low, full_high, high = query_ranges(key, mask, shape)
    scale_log2 = scale * LOG2_E
    # The unmasked loop first: with the masked one before it, ptxas serialises the matrix products
    # of both (advisory C7515). Without a left window the last block of rows needs no mask.
    full_end = full_high if HAS_LEFT else high
    grads = _accumulate_dkdv(
        grads,
        k_block,
        v_block,
        q_heads,
        full_low,
        full_end,
        key,
        scale_log2,
        mask,
        shape,
        wanted,
        False,
    )
    if HAS_LEFT:
        grads = _accumulate_dkdv(
            grads,
            k_block,
            v_block,
            q_heads,
            full_high,
            high,
            key,
            scale_log2,
            mask,
            shape,
            wanted,
            True,
        )
    if HAS_RIGHT:
        grads = _accumulate_dkdv(
            grads,
            k_block,
            v_block,
            q_heads,
            low,
            full_low,
            key,
            scale_log2,
            mask,
            shape,
            wanted,
            True,
        )

    if DK:
        store_tile(dk_rows, key, grads.dk0 * scale, N, 0, shape, False)
        if D1 > 0:
            store_tile(dk_rows, key, grads.dk1 * scale, N, 1, shape, False)
    if DV:
        store_tile(dv_rows, key, grads.dv0, N, 0, shape, False)
        if D1 > 0:
            store_tile(dv_rows, key, grads.dv1, N, 1, shape, False)
