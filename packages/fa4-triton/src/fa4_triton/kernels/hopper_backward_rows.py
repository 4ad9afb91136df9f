"""Before and after the Hopper backward's main kernels, row by row; plain Triton.

Before: delta, the row sums of dO * O, and lse in log2, for all rows that the workspace holds, and
zeros where dQ is summed. After: dQ from its sums. Under a causal mask, rows of dQ with a NaN that
comes from a key that they do not see are written again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fa4_triton.kernels.backward import Heads, _repair_dq
from fa4_triton.kernels.blocks import (
    LOG2_E,
    Mask,
    Shape,
    any_nan,
    kernel,
    load_tile,
    operand,
    row_stats,
)

UNIT = tl.constexpr(64)
"""Rows of a program; `hopper_backward.UNIT`."""

STRIDE = tl.constexpr(8)
"""Elements that strides and the head dim are counted in, 16 bytes: so that the compiler sees it."""


@triton.jit
def _unit(units, heads):
    """(flat head, batch, head, first row) of this program's rows."""
    program = tl.program_id(0)
    flat_head = program // units
    batch = flat_head // heads
    return flat_head, batch, flat_head - batch * heads, (program - flat_head * units) * UNIT


@triton.jit
def _pointers(base, batch, head, row, stride_batch, stride_head, stride_row, columns):
    """[UNIT, len(columns)]: where rows `row ...` of one head lie."""
    start = batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
    rows = row + tl.arange(0, UNIT)
    at = (start + rows.to(tl.int64) * stride_row) * STRIDE
    return base + at[:, None] + columns[None, :]


@kernel
def prepare_kernel(
    grad_out,  # [B, Hq, Sq, head_dim]
    out,  # like grad_out
    lse,  # fp32 [B, Hq, Sq], natural log
    negative_lse,  # fp32 [B * Hq * units * UNIT], written: -lse in log2
    delta,  # like negative_lse, written
    sums,  # fp32 [B * Hq * units * UNIT * D], written: zero
    counters,  # int32 [2], written: zero
    do_stride_batch: tl.int64,  # all strides, and head_dim, in units of STRIDE
    do_stride_head: tl.int64,
    do_stride_row: tl.int64,
    o_stride_batch: tl.int64,
    o_stride_head: tl.int64,
    o_stride_row: tl.int64,
    heads: tl.int32,  # Hq
    seq_len_q: tl.int32,
    units: tl.int32,
    head_dim: tl.int32,
    D: tl.constexpr,
    SUMS: tl.constexpr,  # whether there are any
):
    """Row statistics, and an empty workspace. Grid: (B * Hq * units,)."""
    flat_head, batch, head, row = _unit(units, heads)
    rows = row + tl.arange(0, UNIT)
    columns = tl.arange(0, D)
    inside = (rows < seq_len_q)[:, None] & (columns < head_dim * STRIDE)[None, :]
    do_at = _pointers(
        grad_out, batch, head, row, do_stride_batch, do_stride_head, do_stride_row, columns
    )
    o_at = _pointers(out, batch, head, row, o_stride_batch, o_stride_head, o_stride_row, columns)
    do_block = tl.load(do_at, mask=inside, other=0.0)
    o_block = tl.load(o_at, mask=inside, other=0.0)
    lse_block = tl.load(
        lse + flat_head.to(tl.int64) * seq_len_q + rows, mask=rows < seq_len_q, other=float("inf")
    )
    # Rows without keys have an infinite lse of either sign. Their P is to be zero, as is that of
    # rows behind the end.
    empty = tl.abs(lse_block) == float("inf")
    delta_block = tl.sum(o_block.to(tl.float32) * do_block.to(tl.float32), 1)
    first = tl.program_id(0).to(tl.int64) * UNIT
    tl.store(
        negative_lse + first + tl.arange(0, UNIT),
        tl.where(empty, float("-inf"), -lse_block * LOG2_E),
    )
    tl.store(delta + first + tl.arange(0, UNIT), tl.where(empty, 0.0, delta_block))
    if SUMS:
        tl.store(sums + first * D + tl.arange(0, UNIT * D), tl.zeros([UNIT * D], tl.float32))
    if tl.program_id(0) == 0:
        tl.store(counters + tl.arange(0, 2), tl.zeros([2], tl.int32))


@kernel
def finish_kernel(
    dq,  # [B, Hq, Sq, head_dim], written
    sums,  # fp32 [B * Hq * units * UNIT * D], as `hopper_backward.in_order_of_lanes` puts them
    counters,  # int32 [2]; the second becomes 1 if there is a NaN
    scale: tl.float32,
    dq_stride_batch: tl.int64,  # all strides, and head_dim, in units of STRIDE
    dq_stride_head: tl.int64,
    dq_stride_row: tl.int64,
    heads: tl.int32,  # Hq
    seq_len_q: tl.int32,
    units: tl.int32,
    head_dim: tl.int32,
    D: tl.constexpr,
    WATCH: tl.constexpr,  # for NaN
):
    """The gradient dQ from its sums. Grid: (B * Hq * units,)."""
    _, batch, head, row = _unit(units, heads)
    if row >= seq_len_q:
        return
    rows = row + tl.arange(0, UNIT)
    for panel in tl.static_range(D // 64):
        first = (tl.program_id(0).to(tl.int64) * (D // 64) + panel) * (UNIT * 64)
        x = tl.load(sums + first + tl.arange(0, UNIT * 64)) * scale
        # Octet of columns, warp, row of 8, lane of 4, half of 16 rows, pair of columns.
        x = tl.permute(tl.reshape(x, [8, 4, 8, 4, 2, 2]), (1, 4, 2, 0, 3, 5))
        x = tl.reshape(x, [UNIT, 64]).to(dq.dtype.element_ty)
        columns = panel * 64 + tl.arange(0, 64)
        inside = (rows < seq_len_q)[:, None] & (columns < head_dim * STRIDE)[None, :]
        at = _pointers(
            dq, batch, head, row, dq_stride_batch, dq_stride_head, dq_stride_row, columns
        )
        tl.store(at, x, mask=inside)
        if WATCH:  # noqa: SIM102  # decided when compiled, the other when run
            if any_nan(tl.where(inside, x.to(tl.float32), 0.0)) > 0:
                tl.store(counters + 1, 1)


@kernel
def repair_kernel(
    q,  # [B, Hq, Sq, head_dim]
    k,  # [B, Hkv, Sk, head_dim]
    v,  # like k
    grad_out,  # like q
    dq,  # like q, parts of it written again
    lse,  # fp32 [B, Hq, Sq], natural log
    delta,  # fp32 [B * Hq * units * UNIT]
    counters,  # int32 [2]; the second: whether dQ has a NaN
    scale: tl.float32,
    q_stride_batch: tl.int64,  # all strides in units of STRIDE
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
    dq_stride_batch: tl.int64,
    dq_stride_head: tl.int64,
    dq_stride_row: tl.int64,
    heads: tl.int32,  # Hq
    group: tl.int32,  # Hq // Hkv
    heads_total: tl.int32,  # B * Hq
    seq_len_q: tl.int32,
    seq_len_k: tl.int32,
    units: tl.int32,
    D0: tl.constexpr,
    D1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Free dQ of keys that are not seen, under a causal mask. Grid: any number of programs.

    Nearly always there is nothing to do, so programs are few and find out at once.
    """
    if tl.load(counters + 1) == 0:
        return
    block: tl.constexpr = Shape(UNIT, 32, D0, D1, HEAD_DIM, False, True)
    strips: tl.constexpr = Shape(16, 32, D0, D1, HEAD_DIM, False, True)
    mask = Mask(seq_len_k - seq_len_q, 0, 0, seq_len_q, seq_len_k)
    zero = seq_len_q * 0
    for unit in range(tl.program_id(0), heads_total * units, tl.num_programs(0)):
        flat_head = unit // units
        row = (unit - flat_head * units) * UNIT
        batch = flat_head // heads
        head = flat_head - batch * heads
        head_kv = head // group
        dq_rows = operand(
            dq,
            batch,
            head,
            zero,
            seq_len_q,
            dq_stride_batch,
            dq_stride_head,
            dq_stride_row,
            STRIDE,
            True,
        )
        has_nan = any_nan(load_tile(dq_rows, row, UNIT, 0, block, True).to(tl.float32))
        if D1 > 0:
            has_nan += any_nan(load_tile(dq_rows, row, UNIT, 1, block, True).to(tl.float32))
        if has_nan > 0:
            q_rows = operand(
                q,
                batch,
                head,
                zero,
                seq_len_q,
                q_stride_batch,
                q_stride_head,
                q_stride_row,
                STRIDE,
                True,
            )
            do_rows = operand(
                grad_out,
                batch,
                head,
                zero,
                seq_len_q,
                do_stride_batch,
                do_stride_head,
                do_stride_row,
                STRIDE,
                True,
            )
            k_rows = operand(
                k,
                batch,
                head_kv,
                zero,
                seq_len_k,
                k_stride_batch,
                k_stride_head,
                k_stride_row,
                STRIDE,
                True,
            )
            v_rows = operand(
                v,
                batch,
                head_kv,
                zero,
                seq_len_k,
                v_stride_batch,
                v_stride_head,
                v_stride_row,
                STRIDE,
                True,
            )
            lse_rows = row_stats(lse, flat_head, zero, zero, seq_len_q, zero)
            delta_rows = row_stats(delta, flat_head, zero, zero, units * UNIT, zero)
            this_head = Heads(q_rows, do_rows, lse_rows, delta_rows, 0, 0, 0, 1)
            end = tl.minimum(row + UNIT, seq_len_q)
            _repair_dq(dq_rows, this_head, k_rows, v_rows, row, end, scale, mask, strips, 0)
            if D1 > 0:
                _repair_dq(dq_rows, this_head, k_rows, v_rows, row, end, scale, mask, strips, 1)
