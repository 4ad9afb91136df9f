"""What the kernels of the Hopper backward share.

Letters are the papers': S = Q K^T are the scores, P = exp2(S) the probabilities, dP = dO V^T,
dS = P * (dP - delta). Exponents count in log2. Masks are looked at in blocks that have unseen
scores only, when the program runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

from fa4_triton.kernels.hopper import draw, following, place, publish, published

KEYS = gl.constexpr(64)
"""Keys, or rows, of a consumer: what one warp group's matrix product spans."""

ANY_VALUE = (
    *("lse", "delta", "counter", "scale", "scale_log2", "heads", "group", "heads_total"),
    *("seq_len_q", "seq_len_k", "tiles", "blocks_of_keys", "blocks_of_rows", "section", "units"),
)
"""Arguments for which no kernel is compiled anew: neither for a 1 nor for a multiple of 16."""

UNIT = gl.constexpr(64)
"""Rows of dQ that lie together in its sums, a panel of as many columns after the other."""


class Queries(NamedTuple):
    """What is computed; scalars. Sizes are those of every sequence and head."""

    scale: Any
    scale_log2: Any  # scale * log2(e), positive
    queries: Any  # Sq
    keys: Any  # Sk
    heads: Any  # Hq
    group: Any  # Hq // Hkv
    units: Any  # of UNIT rows a head has in the workspaces


class Supply(NamedTuple):
    """What one producer warp copies: keys of a tile, and rows with a number each."""

    keys_desc: Any  # tensor maps of them in global memory
    rows_desc: Any
    stats_desc: Any
    keys: Any  # [1, N, D]
    rows: Any  # [stages, M, D]
    stats: Any  # [stages, M] fp32
    keys_ring: Any  # one slot
    ring: Any


@gluon.jit
def rows_seeing(key, problem, M: gl.constexpr, CAUSAL: gl.constexpr):
    """The first row of the first block of queries that sees `key` or a later one."""
    row = 0
    if CAUSAL:
        row = gl.maximum(key - (problem.keys - problem.queries), 0) // M * M
    return row


@gluon.jit
def _next_tile(tile, grid, board, slot, phase, DEALS: gl.constexpr):
    """(block, batch, key head) of the next tile: found and published, or as it was published.

    The first block of keys comes first: under a causal mask it is the longest.
    """
    if DEALS:
        block = grid.tiles * 0 - 1
        batch = block
        head = block
        if tile < grid.tiles:
            from_end, batch, head = place(tile, grid)
            block = grid.blocks - 1 - from_end
        publish(board, slot, phase, block, batch, head)
    else:
        block, batch, head = published(board, slot, phase, 1)
    return block, batch, head


@gluon.jit
def produce(
    supply,
    counter,
    board,
    grid,
    problem,
    STAGES: gl.constexpr,
    DEALS: gl.constexpr,
    config: gl.constexpr,
):
    """Copy the keys of every tile of this program, and rows block by block; one warp.

    Of two such warps one copies K, and Q with -lse, and DEALS the tiles; the other copies V, and dO
    with delta. So neither waits for what the other's blocks are still needed for.
    """
    M: gl.constexpr = config.m
    N: gl.constexpr = config.n
    rows_shape: gl.constexpr = [1, 1, M, config.d]
    keys_shape: gl.constexpr = [1, 1, N, config.d]
    key_phase = 0
    slot = 0
    phase = 0
    board_slot = 0
    board_phase = 0
    tile = gl.program_id(0)
    block, batch, head_kv = _next_tile(tile, grid, board, board_slot, board_phase, DEALS)
    while block >= 0:
        mbarrier.wait(supply.keys_ring.empty.index(0), key_phase ^ 1)
        full = supply.keys_ring.full.index(0)
        mbarrier.expect(full, supply.keys_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            supply.keys_desc,
            [batch, head_kv, block * N, 0],
            full,
            supply.keys.index(0).reshape(keys_shape),
        )
        key_phase ^= 1
        first_row = rows_seeing(block * N, problem, M, config.causal)
        for member in range(problem.group):
            head = head_kv * problem.group + member
            flat_row = (batch * problem.heads + head) * problem.units * UNIT
            for row in range(first_row, problem.queries, M):
                mbarrier.wait(supply.ring.empty.index(slot), phase ^ 1)
                full = supply.ring.full.index(slot)
                mbarrier.expect(
                    full, supply.rows_desc.block_type.nbytes + supply.stats_desc.block_type.nbytes
                )
                tma.async_copy_global_to_shared(
                    supply.rows_desc,
                    [batch, head, row, 0],
                    full,
                    supply.rows.index(slot).reshape(rows_shape),
                )
                tma.async_copy_global_to_shared(
                    supply.stats_desc, [flat_row + row], full, supply.stats.index(slot)
                )
                slot, phase = following(slot, phase, STAGES)
        if DEALS:
            # When all of this tile is on its way, as in the forward.
            tile = draw(counter, grid)
        board_slot, board_phase = following(board_slot, board_phase, 2)
        block, batch, head_kv = _next_tile(tile, grid, board, board_slot, board_phase, DEALS)


@gluon.jit
def hide(x, bound, value, COUNT: gl.constexpr, FROM: gl.constexpr):
    """`x` [64, COUNT] with `value` in row i before column `bound[i]`, or FROM there on.

    The lane's part of a column's index goes to the other side, so that what is compared with it is
    a constant of the instruction, not a register a column.
    """
    parts = x.reshape([64, COUNT // 8, 4, 2])
    layout: gl.constexpr = parts.type.layout
    octet_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    lane_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout)))
    pair_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    row_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    octet = 8 * gl.arange(0, COUNT // 8, octet_layout)
    lane = 2 * gl.arange(0, 4, lane_layout)
    pair = gl.arange(0, 2, pair_layout)
    octet = gl.expand_dims(gl.expand_dims(gl.expand_dims(octet, 0), 2), 3)
    lane = gl.expand_dims(gl.expand_dims(gl.expand_dims(lane, 0), 1), 3)
    pair = gl.expand_dims(gl.expand_dims(gl.expand_dims(pair, 0), 1), 2)
    bound = gl.convert_layout(bound, row_layout, assert_trivial=True)
    bound = gl.expand_dims(gl.expand_dims(gl.expand_dims(bound, 1), 2), 3)
    before = octet + pair < bound - lane
    hidden = gl.where(before, parts, value) if FROM else gl.where(before, value, parts)
    return gl.convert_layout(hidden.reshape([64, COUNT]), x.type.layout, assert_trivial=True)


@gluon.jit
def opaque(x):
    """`x`, int32, of which the compiler does not know where it comes from.

    As the index of a block, an opaque zero makes the compiler compute descriptors of the block
    where they are used. What it can see of them it computes once for all steps, keeps, and spills.
    """
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def kept(x):
    """`x`, 16 bits an element, as it is: what is made of it is not made before."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, False, 2)


@gluon.jit
def issue_scores(a, b, layout: gl.constexpr, M: gl.constexpr):
    """[KEYS, M] fp32: A B^T, both in shared memory, under way."""
    zeros = gl.zeros([KEYS, M], gl.float32, layout)
    return warpgroup_mma(a, b.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def seeing_of(key, end, problem, layout: gl.constexpr, config: gl.constexpr):
    """(the row from which on each key `key ...` is seen, the block from which on all to `end` are).

    The latter as its first row.
    """
    keys = key + gl.arange(0, KEYS, layout)
    seeing = gl.zeros([KEYS], gl.int32, layout)
    clean_row = 0
    if config.causal:
        seeing = keys - (problem.keys - problem.queries)
        clean_row = end - 1 - (problem.keys - problem.queries)
    # A key behind the end is seen by none.
    seeing = gl.where(keys < problem.keys, seeing, 1 << 30)
    clean_row = gl.where(end > problem.keys, 1 << 30, clean_row)
    return seeing, gl.maximum(clean_row + config.m - 1, 0) // config.m * config.m


@gluon.jit
def probabilities(
    s,
    lse_block,
    first_seeing,
    scale_log2,
    dtype: gl.constexpr,
    config: gl.constexpr,
    MASKED: gl.constexpr,
):
    """P^T [KEYS, M], rounded.

    What a query does not see is hidden in the exponent, not in S: -lse may be NaN.
    """
    negative_lse = lse_block.load(gl.SliceLayout(0, s.type.layout))
    exponent = s * scale_log2 + gl.expand_dims(negative_lse, 0)
    if MASKED:
        exponent = hide(exponent, first_seeing, float("-inf"), config.m, False)
    return gl.exp2(exponent).to(dtype)


@gluon.jit
def score_gradients(p, dp, delta_block, first_seeing, config: gl.constexpr, MASKED: gl.constexpr):
    """Gradients dS^T [KEYS, M], rounded."""
    delta = delta_block.load(gl.SliceLayout(0, dp.type.layout))
    ds = p.to(gl.float32) * (dp - gl.expand_dims(delta, 0))
    if MASKED:
        ds = hide(ds, first_seeing, 0.0, config.m, False)  # not P alone: dP or delta may be NaN
    return ds.to(p.dtype)
