"""Before and after the Hopper backward's main kernel, row by row; plain Triton.

Before: delta, the row sums of dO * O, and lse in log2, for all rows that the workspace holds, and
zeros where dQ is summed. After: dQ from its sums. Under a causal mask, a third kernel looks whether
dQ has a NaN that comes from a key that its row does not see, and writes such rows again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fa4_triton.kernels.backward import Heads, _repair_dq
from fa4_triton.kernels.blocks import LOG2_E, Mask, Rows, Shape

UNIT = tl.constexpr(64)
"""Rows of a program; `hopper_backward.UNIT`."""


@triton.jit
def _unit(units, heads):
    """(flat head, batch, head, first row) of this program's rows."""
    program = tl.program_id(0)
    flat_head = program // units
    batch = flat_head // heads
    return flat_head, batch, flat_head - batch * heads, (program - flat_head * units) * UNIT


@triton.jit
def prepare_kernel(
    out,  # [B, Hq, Sq, head_dim]
    do,  # like out
    lse,  # fp32 [B, Hq, Sq], natural log
    negative_lse,  # fp32 [B * Hq * units * UNIT], written: -lse in log2
    delta,  # like negative_lse, written
    sums,  # fp32 [B * Hq * units * UNIT * D], written: zero
    counters,  # int32 [2], written: zero
    o_stride_batch: tl.int64,
    o_stride_head: tl.int64,
    o_stride_row: tl.int64,
    do_stride_batch: tl.int64,
    do_stride_head: tl.int64,
    do_stride_row: tl.int64,
    heads,
    seq_len_q,
    units,
    head_dim,
    D: tl.constexpr,
    SUMS: tl.constexpr,  # whether there are any
):
    """Row statistics, and an empty workspace. Grid: (B * Hq * units,)."""
    flat_head, batch, head, row = _unit(units, heads)
    rows = row + tl.arange(0, UNIT)
    columns = tl.arange(0, D)
    inside = (rows < seq_len_q)[:, None] & (columns < head_dim)[None, :]
    o_rows = out + batch.to(tl.int64) * o_stride_batch + head.to(tl.int64) * o_stride_head
    do_rows = do + batch.to(tl.int64) * do_stride_batch + head.to(tl.int64) * do_stride_head
    at = rows.to(tl.int64)[:, None]
    o_block = tl.load(o_rows + at * o_stride_row + columns[None, :], mask=inside, other=0.0)
    do_block = tl.load(do_rows + at * do_stride_row + columns[None, :], mask=inside, other=0.0)
    lse_block = tl.load(
        lse + flat_head.to(tl.int64) * seq_len_q + rows, mask=rows < seq_len_q, other=float("inf")
    )
    # Rows without keys have an infinite lse of either sign; their P is to be zero, as is that of
    # rows behind the end.
    empty = tl.abs(lse_block) == float("inf")
    sum_block = tl.sum(o_block.to(tl.float32) * do_block.to(tl.float32), 1)
    place = tl.program_id(0).to(tl.int64) * UNIT + tl.arange(0, UNIT)
    tl.store(negative_lse + place, tl.where(empty, float("-inf"), -lse_block * LOG2_E))
    tl.store(delta + place, tl.where(empty, 0.0, sum_block))
    if SUMS:
        zeros = tl.zeros([UNIT * D], tl.float32)
        tl.store(sums + tl.program_id(0).to(tl.int64) * (UNIT * D) + tl.arange(0, UNIT * D), zeros)
    if tl.program_id(0) == 0:
        tl.store(counters + tl.arange(0, 2), tl.zeros([2], tl.int32))


@triton.jit
def finish_kernel(
    sums,  # fp32 [B * Hq * units * UNIT * D], panels in the order of `_in_order_of_lanes`
    dq,  # [B, Hq, Sq, head_dim], written
    counters,  # int32 [2]; the second becomes 1 if there is a NaN
    scale,
    dq_stride_batch: tl.int64,
    dq_stride_head: tl.int64,
    dq_stride_row: tl.int64,
    heads,
    seq_len_q,
    units,
    head_dim,
    D: tl.constexpr,
    WATCH: tl.constexpr,
):
    """The gradient dQ from its sums. Grid: (B * Hq * units,)."""
    _, batch, head, row = _unit(units, heads)
    rows = row + tl.arange(0, UNIT)
    dq_rows = dq + batch.to(tl.int64) * dq_stride_batch + head.to(tl.int64) * dq_stride_head
    at = rows.to(tl.int64)[:, None] * dq_stride_row
    if row < seq_len_q:
        for panel in tl.static_range(D // 64):
            start = (tl.program_id(0).to(tl.int64) * (D // 64) + panel) * (UNIT * 64)
            x = tl.load(sums + start + tl.arange(0, UNIT * 64)) * scale
            # Octet, warp, lane // 4, lane % 4, half of 16 rows, pair.
            x = tl.reshape(x, [8, 4, 8, 4, 2, 2])
            x = tl.reshape(tl.permute(x, (1, 4, 2, 0, 3, 5)), [UNIT, 64])
            columns = panel * 64 + tl.arange(0, 64)
            inside = (rows < seq_len_q)[:, None] & (columns < head_dim)[None, :]
            tl.store(dq_rows + at + columns[None, :], x.to(dq.dtype.element_ty), mask=inside)
            if WATCH:
                if tl.max(tl.max(((x != x) & inside).to(tl.int32), 1), 0) > 0:
                    tl.store(counters + 1, 1)
