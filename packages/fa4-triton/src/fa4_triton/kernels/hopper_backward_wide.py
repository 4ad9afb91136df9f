"""Backward for Hopper where the head dim is wide: two kernels, seven products instead of five.

dK and dV of 64 keys and 256 columns take all registers that two warp groups have for accumulators,
and adding dQ to sums in global memory would take as many bytes for 64 keys as it does for 128 of
half the columns. So dQ has a kernel of its own, and gradients are the same bits every time.

dK and dV: one consumer computes P^T and dV += P^T dO, the other dP^T, dS^T and dK += dS^T Q. Only P
goes from the one to the other. dQ: each consumer has 64 query rows, S = Q K^T, dP = dO V^T and
dQ += dS K. S of the next block is issued before dV or dQ of this one, under which P is made. No
product is under way where the loop turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fa4_triton.kernels.hopper import (
    ROWS,
    Grid,
    Ring,
    accumulator,
    blocks_seen,
    draw,
    following,
    make_barriers,
    make_board,
    make_ring,
    place,
    publish,
    published,
)
from fa4_triton.kernels.hopper_backward_common import (
    ANY_VALUE,
    KEYS,
    UNIT,
    Queries,
    Supply,
    hide,
    issue_scores,
    kept,
    opaque,
    probabilities,
    produce,
    rows_seeing,
    score_gradients,
    seeing_of,
)


@dataclass(frozen=True)
class WideConfig:
    """What the kernels are compiled for.

    Attributes:
        d: Columns, a power of two.
        causal: Row i sees the keys up to i + Sk - Sq.
        tail: Sk is no multiple of `n`.
        consumer_registers: Of a consumer's thread.
        producer_registers: Of a producer's.
    """

    d: int
    causal: bool
    tail: bool
    consumer_registers: int
    producer_registers: int

    @property
    def m(self) -> int:
        """Query rows of a block."""
        return 64

    @property
    def n(self) -> int:
        """Keys of a block."""
        return 64

    @property
    def masks(self) -> bool:
        """Whether there are blocks in which a query does not see a key."""
        return self.causal or self.tail


class KeyMemory(NamedTuple):
    """Shared memory of dK and dV: blocks, and the barriers of each kind of block."""

    k: Any  # [1, N, D]; dV leaves through it
    v: Any  # like k; dK leaves through it
    q: Any  # [2, M, D]
    do: Any  # like q
    lse: Any  # [2, M] fp32, -lse in log2
    delta: Any  # [2, M] fp32
    p: Any  # [2, N, M], P^T
    k_ring: Any  # one slot, as has v_ring
    v_ring: Any
    q_ring: Any
    do_ring: Any
    p_full: Any  # who writes P knows by Q, of which there are as many slots, that one is free
    board: Any


@gluon.jit
def _make_p(s, memory, at, first_seeing, problem, config: gl.constexpr, MASKED: gl.constexpr):
    """P^T [KEYS, M], rounded, also for the other consumer. `at` is where S came from."""
    lse_block = memory.lse.index(at.slot)
    dtype: gl.constexpr = memory.k.dtype
    p = probabilities(s, lse_block, first_seeing, problem.scale_log2, dtype, config, MASKED)
    memory.p.index(at.slot).store(p)
    mbarrier.arrive(memory.p_full.index(at.slot), count=1)
    return p


class At(NamedTuple):
    """Where a consumer is in its rings, which all have two slots."""

    slot: Any
    phase: Any


@gluon.jit
def _value_step(
    p, dv, memory, at, first_seeing, problem, config: gl.constexpr, MASKED: gl.constexpr
):
    """Of the block of queries at `at`, dV from P^T; of the next, P^T."""
    M: gl.constexpr = config.m
    s_layout: gl.constexpr = accumulator(M)
    before = at
    slot, phase = following(at.slot, at.phase, 2)
    at = At(slot, phase)
    mbarrier.wait(memory.q_ring.full.index(slot), phase)
    s = issue_scores(memory.k.index(opaque(0)), memory.q.index(slot), s_layout, M)
    mbarrier.wait(memory.do_ring.full.index(before.slot), before.phase)
    dv = warpgroup_mma(p, memory.do.index(before.slot), dv, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    # -lse, which came with Q, is still to be read: the other consumer lets go of both behind P.
    mbarrier.arrive(memory.q_ring.empty.index(slot), count=1)
    next_p = _make_p(s, memory, at, first_seeing, problem, config, MASKED)
    dv = warpgroup_mma_wait(0, deps=(dv,))
    # Moved here, not before: what a product under way reads is not to be written.
    p = gl.convert_layout(kept(next_p), p.type.layout)
    mbarrier.arrive(memory.do_ring.empty.index(before.slot), count=1)
    return p, dv, at


@gluon.jit
def _value_consumer(dv_desc, memory, problem, config: gl.constexpr):
    """The gradient dV of every tile of this program, and P for the other consumer."""
    M: gl.constexpr = config.m
    N: gl.constexpr = config.n
    D: gl.constexpr = config.d
    s_layout: gl.constexpr = accumulator(M)
    grad_layout: gl.constexpr = accumulator(D)
    left: gl.constexpr = gl.DotOperandLayout(0, grad_layout, 2)
    key_phase = 0
    at = At(0, 0)
    board_slot = 0
    board_phase = 0
    block, batch, head_kv = published(memory.board, board_slot, board_phase)
    while block >= 0:
        key = block * N
        first_row = rows_seeing(key, problem, M, config.causal)
        seeing, clean_row = seeing_of(key, key + N, problem, gl.SliceLayout(1, s_layout), config)
        dv = gl.zeros([KEYS, D], gl.float32, grad_layout)
        mbarrier.wait(memory.k_ring.full.index(0), key_phase)
        mbarrier.wait(memory.q_ring.full.index(at.slot), at.phase)
        s = issue_scores(memory.k.index(opaque(0)), memory.q.index(at.slot), s_layout, M)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(memory.q_ring.empty.index(at.slot), count=1)
        p = _make_p(s, memory, at, seeing - first_row, problem, config, config.masks)
        p = gl.convert_layout(kept(p), left)
        row = first_row + M
        for _ in range(problem.group):
            if config.masks:
                end = gl.minimum(clean_row, problem.queries)
                for masked_row in range(row, end, M):
                    p, dv, at = _value_step(
                        p, dv, memory, at, seeing - masked_row, problem, config, True
                    )
                row = gl.maximum(row, end)
            for _ in range(row, problem.queries, M):
                p, dv, at = _value_step(p, dv, memory, at, 0, problem, config, False)
            row = first_row
        mbarrier.wait(memory.do_ring.full.index(at.slot), at.phase)
        dv = warpgroup_mma(p, memory.do.index(at.slot), dv, is_async=True)
        dv = warpgroup_mma_wait(0, deps=(dv,))
        mbarrier.arrive(memory.do_ring.empty.index(at.slot), count=1)
        slot, phase = following(at.slot, at.phase, 2)
        at = At(slot, phase)
        # Nobody else reads K.
        _store_gradient(dv_desc, dv, 1.0, memory.k.index(0), batch, head_kv, key, config)
        mbarrier.arrive(memory.k_ring.empty.index(0), count=1)
        key_phase ^= 1
        board_slot, board_phase = following(board_slot, board_phase, 2)
        block, batch, head_kv = published(memory.board, board_slot, board_phase)


@gluon.jit
def _make_ds(dp, memory, at, first_seeing, config: gl.constexpr, MASKED: gl.constexpr):
    """Gradients dS^T [KEYS, M], rounded. `at` is where dP came from, and P."""
    mbarrier.wait(memory.p_full.index(at.slot), at.phase)
    p = memory.p.index(at.slot).load(dp.type.layout)
    delta_block = memory.delta.index(at.slot)
    return score_gradients(p, dp, delta_block, first_seeing, config, MASKED)


@gluon.jit
def _key_step(dk, memory, at, first_seeing, config: gl.constexpr, MASKED: gl.constexpr):
    """Of the block of queries at `at`, dS^T and dK.

    No product of another block runs beside: the other consumer's do, and Q is wanted back for the
    block after the next. With dP^T of the next block issued before dK, as with S^T there, the whole
    backward took a quarter longer.
    """
    M: gl.constexpr = config.m
    s_layout: gl.constexpr = accumulator(M)
    grad_layout: gl.constexpr = accumulator(config.d)
    left: gl.constexpr = gl.DotOperandLayout(0, grad_layout, 2)
    slot, phase = at.slot, at.phase
    mbarrier.wait(memory.do_ring.full.index(slot), phase)
    dp = issue_scores(memory.v.index(opaque(0)), memory.do.index(slot), s_layout, M)
    mbarrier.wait(memory.q_ring.full.index(slot), phase)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = _make_ds(dp, memory, at, first_seeing, config, MASKED)
    mbarrier.arrive(memory.do_ring.empty.index(slot), count=1)
    dk = warpgroup_mma(gl.convert_layout(ds, left), memory.q.index(slot), dk, is_async=True)
    dk = warpgroup_mma_wait(0, deps=(dk,))
    mbarrier.arrive(memory.q_ring.empty.index(slot), count=1)
    slot, phase = following(slot, phase, 2)
    return dk, At(slot, phase)


@gluon.jit
def _key_consumer(dk_desc, memory, problem, config: gl.constexpr):
    """The gradient dK of every tile of this program."""
    M: gl.constexpr = config.m
    N: gl.constexpr = config.n
    D: gl.constexpr = config.d
    s_layout: gl.constexpr = accumulator(M)
    grad_layout: gl.constexpr = accumulator(D)
    key_phase = 0
    at = At(0, 0)
    board_slot = 0
    board_phase = 0
    block, batch, head_kv = published(memory.board, board_slot, board_phase)
    while block >= 0:
        key = block * N
        first_row = rows_seeing(key, problem, M, config.causal)
        seeing, clean_row = seeing_of(key, key + N, problem, gl.SliceLayout(1, s_layout), config)
        dk = gl.zeros([KEYS, D], gl.float32, grad_layout)
        mbarrier.wait(memory.v_ring.full.index(0), key_phase)
        for _ in range(problem.group):
            row = first_row
            if config.masks:
                end = gl.minimum(clean_row, problem.queries)
                for masked_row in range(row, end, M):
                    dk, at = _key_step(dk, memory, at, seeing - masked_row, config, True)
                row = gl.maximum(row, end)
            for _ in range(row, problem.queries, M):
                dk, at = _key_step(dk, memory, at, 0, config, False)
        # Nobody else reads V.
        v_block = memory.v.index(0)
        _store_gradient(dk_desc, dk, problem.scale, v_block, batch, head_kv, key, config)
        mbarrier.arrive(memory.v_ring.empty.index(0), count=1)
        key_phase ^= 1
        board_slot, board_phase = following(board_slot, board_phase, 2)
        block, batch, head_kv = published(memory.board, board_slot, board_phase)


@gluon.jit
def _store_gradient(desc, x, scale, block, batch, head, row, config: gl.constexpr):
    """64 rows of a gradient through `block`, which has been left when this returns."""
    block.store((x * scale).to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(
        desc, [batch, head, row, 0], block.reshape([1, 1, 64, config.d])
    )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=ANY_VALUE)
def hopper_wide_dkdv_kernel(
    q_desc,  # [B, Hq, Sq, D], blocks of [1, 1, M, D]
    k_desc,  # [B, Hkv, Sk, D], blocks of [1, 1, N, D]
    v_desc,  # like k
    do_desc,  # like q
    dk_desc,  # like k, written
    dv_desc,  # like k, written
    lse_desc,  # fp32 [B * Hq * units * UNIT], -lse in log2, blocks of [M]
    delta_desc,  # like lse
    counter,  # int32, zero before and after
    scale,
    scale_log2,  # scale * log2(e), positive
    heads,  # Hq
    group,  # Hq // Hkv
    heads_total,  # B * Hkv
    seq_len_q,
    seq_len_k,
    tiles,
    blocks_of_keys,  # in a sequence
    section,  # see place
    units,  # of UNIT rows a head has in the workspaces
    config: gl.constexpr,
):
    """Gradients dK and dV. Grid: any number of programs, no more than tiles."""
    M: gl.constexpr = config.m
    N: gl.constexpr = config.n
    D: gl.constexpr = config.d
    dtype: gl.constexpr = q_desc.dtype
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)
    memory = KeyMemory(
        gl.allocate_shared_memory(dtype, [1, N, D], swizzled),
        gl.allocate_shared_memory(dtype, [1, N, D], swizzled),
        gl.allocate_shared_memory(dtype, [2, M, D], swizzled),
        gl.allocate_shared_memory(dtype, [2, M, D], swizzled),
        gl.allocate_shared_memory(gl.float32, [2, M], flat),
        gl.allocate_shared_memory(gl.float32, [2, M], flat),
        gl.allocate_shared_memory(dtype, [2, N, M], swizzled),
        make_ring(1, 1),
        make_ring(1, 1),
        make_ring(2, 2),
        make_ring(2, 2),
        make_barriers(2, 1),
        make_board(3),
    )
    fence_async_shared()
    grid = Grid(tiles, blocks_of_keys, section, heads // group, heads_total)
    problem = Queries(scale, scale_log2, seq_len_q, seq_len_k, heads, group, units)
    m = memory
    queries = Supply(k_desc, q_desc, lse_desc, m.k, m.q, m.lse, m.k_ring, m.q_ring)
    gradients = Supply(v_desc, do_desc, delta_desc, m.v, m.do, m.delta, m.v_ring, m.do_ring)
    board = memory.board
    gl.warp_specialize(
        [
            (_value_consumer, (dv_desc, memory, problem, config)),
            (_key_consumer, (dk_desc, memory, problem, config)),
            (produce, (queries, counter, board, grid, problem, 2, True, config)),
            (produce, (gradients, counter, board, grid, problem, 2, False, config)),
        ],
        [4, 1, 1],
        [config.consumer_registers, config.producer_registers, config.producer_registers],
    )


class QueryMemory(NamedTuple):
    """Shared memory of dQ: blocks, and the barriers of each kind of block."""

    q: Any  # [2, ROWS, D], one a consumer; dQ leaves through it
    do: Any  # like q
    k: Any  # [2, N, D]
    v: Any  # [1, N, D]
    q_ring: Any  # a slot a consumer
    do_ring: Any
    k_ring: Any
    v_ring: Any
    board: Any


@gluon.jit
def _load(desc, batch, head, row, ring, slot, phase, block):
    """Copy rows `row ...` of one head into `block`, slot `slot` of a ring, once that is empty."""
    mbarrier.wait(ring.empty.index(slot), phase ^ 1)
    mbarrier.expect(ring.full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, head, row, 0], ring.full.index(slot), block)


@gluon.jit
def _query_producer(
    q_desc, k_desc, v_desc, do_desc, counter, memory, grid, problem, config: gl.constexpr
):
    """Copy Q and dO of every tile of this program, and K and V block by block."""
    N: gl.constexpr = config.n
    q_shape: gl.constexpr = [1, 1, ROWS, config.d]
    k_shape: gl.constexpr = [1, 1, N, config.d]
    slot = 0
    phase = 0
    v_phase = 0
    q_phase = 0
    board_slot = 0
    board_phase = 0
    tile = gl.program_id(0)
    while tile < grid.tiles:
        block, batch, head = place(tile, grid)
        publish(memory.board, board_slot, board_phase, block, batch, head)
        board_slot, board_phase = following(board_slot, board_phase, 2)
        head_kv = head // problem.group
        seen, _ = blocks_seen(block * (2 * ROWS), 2 * ROWS, problem, N, config.causal)
        row = block * (2 * ROWS)
        for index in range(seen):
            k_block = memory.k.index(slot).reshape(k_shape)
            _load(k_desc, batch, head_kv, index * N, memory.k_ring, slot, phase, k_block)
            slot, phase = following(slot, phase, 2)
            if index == 0:
                for who in gl.static_range(2):
                    q_block = memory.q.index(who).reshape(q_shape)
                    q_row = row + who * ROWS
                    _load(q_desc, batch, head, q_row, memory.q_ring, who, q_phase, q_block)
            v_block = memory.v.index(0).reshape(k_shape)
            _load(v_desc, batch, head_kv, index * N, memory.v_ring, 0, v_phase, v_block)
            v_phase ^= 1
            if index == 0:
                for who in gl.static_range(2):
                    do_block = memory.do.index(who).reshape(q_shape)
                    q_row = row + who * ROWS
                    _load(do_desc, batch, head, q_row, memory.do_ring, who, q_phase, do_block)
        q_phase ^= 1
        tile = draw(counter, grid)
    publish(memory.board, board_slot, board_phase, -1, 0, 0)


class Rows(NamedTuple):
    """What a consumer knows of its query rows, [ROWS] each."""

    lse: Any  # -lse in log2
    delta: Any
    limit: Any  # how many keys each sees


@gluon.jit
def _p_of_rows(s, rows, key, problem, dtype: gl.constexpr, N: gl.constexpr, MASKED: gl.constexpr):
    """P [ROWS, N] of keys `key ...`, rounded."""
    if MASKED:
        s = hide(s, rows.limit - key, float("-inf"), N, True)
    return gl.exp2(s * problem.scale_log2 + gl.expand_dims(rows.lse, 1)).to(dtype)


@gluon.jit
def _ds_of_rows(p, dp, rows, key, left: gl.constexpr, N: gl.constexpr, MASKED: gl.constexpr):
    """Gradients dS [ROWS, N] of keys `key ...`, rounded, as a left operand."""
    ds = kept(p).to(gl.float32) * (dp - gl.expand_dims(rows.delta, 1))
    if MASKED:
        ds = hide(ds, rows.limit - key, 0.0, N, True)  # not P alone: dP or delta may be NaN
    return gl.convert_layout(ds.to(p.dtype), left)


class KeysAt(NamedTuple):
    """Where a consumer is in the rings of K and V."""

    slot: Any
    phase: Any
    v_phase: Any


@gluon.jit
def _query_step(
    ds,
    acc,
    memory,
    at,
    rows,
    key,
    problem,
    WHO: gl.constexpr,
    config: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Of the block of keys at `at`, dQ from dS; of the next, `key ...`, dS."""
    N: gl.constexpr = config.n
    dtype: gl.constexpr = memory.k.dtype
    left: gl.constexpr = ds.type.layout
    s_layout: gl.constexpr = accumulator(N)
    before = at.slot
    slot, phase = following(at.slot, at.phase, 2)
    mbarrier.wait(memory.k_ring.full.index(slot), phase)
    q = memory.q.index(WHO + opaque(0))
    s = issue_scores(q, memory.k.index(slot), s_layout, N)
    acc = warpgroup_mma(ds, memory.k.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    p = _p_of_rows(s, rows, key, problem, dtype, N, MASKED)
    mbarrier.wait(memory.v_ring.full.index(0), at.v_phase)
    do = memory.do.index(WHO + opaque(0))
    dp = issue_scores(do, memory.v.index(opaque(0)), s_layout, N)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    mbarrier.arrive(memory.k_ring.empty.index(before), count=1)
    dp = warpgroup_mma_wait(0, deps=(dp,))
    mbarrier.arrive(memory.v_ring.empty.index(0), count=1)
    ds = _ds_of_rows(p, dp, rows, key, left, N, MASKED)
    return ds, acc, KeysAt(slot, phase, at.v_phase ^ 1)


@gluon.jit
def _query_consumer(
    dq_desc, lse, delta, counter, memory, problem, WHO: gl.constexpr, config: gl.constexpr
):
    """The gradient dQ of rows `WHO * ROWS ...` of every tile of this program."""
    N: gl.constexpr = config.n
    D: gl.constexpr = config.d
    dtype: gl.constexpr = dq_desc.dtype
    s_layout: gl.constexpr = accumulator(N)
    grad_layout: gl.constexpr = accumulator(D)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    left: gl.constexpr = gl.DotOperandLayout(0, grad_layout, 2)
    at = KeysAt(0, 0, 0)
    q_phase = 0
    board_slot = 0
    board_phase = 0
    block, batch, head = published(memory.board, board_slot, board_phase)
    while block >= 0:
        row = block * (2 * ROWS) + WHO * ROWS
        brought, _ = blocks_seen(block * (2 * ROWS), 2 * ROWS, problem, N, config.causal)
        _, whole = blocks_seen(row, ROWS, problem, N, config.causal)
        row_numbers = row + gl.arange(0, ROWS, row_layout)
        limit = gl.zeros([ROWS], gl.int32, row_layout) + problem.keys
        if config.causal:
            limit = gl.minimum(limit, row_numbers + (1 + problem.keys - problem.queries))
        inside = row_numbers < problem.units * UNIT
        flat_rows = (batch * problem.heads + head) * problem.units * UNIT + row_numbers
        lse_rows = gl.load(lse + flat_rows, mask=inside, other=float("-inf"))
        delta_rows = gl.load(delta + flat_rows, mask=inside, other=0.0)
        rows = Rows(lse_rows, delta_rows, limit)
        acc = gl.zeros([ROWS, D], gl.float32, grad_layout)
        mbarrier.wait(memory.k_ring.full.index(at.slot), at.phase)
        mbarrier.wait(memory.q_ring.full.index(WHO), q_phase)
        q = memory.q.index(WHO + opaque(0))
        s = issue_scores(q, memory.k.index(at.slot), s_layout, N)
        mbarrier.wait(memory.v_ring.full.index(0), at.v_phase)
        mbarrier.wait(memory.do_ring.full.index(WHO), q_phase)
        do = memory.do.index(WHO + opaque(0))
        dp = issue_scores(do, memory.v.index(opaque(0)), s_layout, N)
        s, dp = warpgroup_mma_wait(0, deps=(s, dp))
        mbarrier.arrive(memory.v_ring.empty.index(0), count=1)
        at = KeysAt(at.slot, at.phase, at.v_phase ^ 1)
        p = _p_of_rows(s, rows, 0, problem, dtype, N, config.masks)
        ds = _ds_of_rows(p, dp, rows, 0, left, N, config.masks)
        if config.masks:
            for index in range(1, whole):
                ds, acc, at = _query_step(
                    ds, acc, memory, at, rows, index * N, problem, WHO, config, False
                )
            for index in range(gl.maximum(whole, 1), brought):
                ds, acc, at = _query_step(
                    ds, acc, memory, at, rows, index * N, problem, WHO, config, True
                )
        else:
            for index in range(1, brought):
                ds, acc, at = _query_step(
                    ds, acc, memory, at, rows, index * N, problem, WHO, config, False
                )
        mbarrier.arrive(memory.do_ring.empty.index(WHO), count=1)
        acc = warpgroup_mma(ds, memory.k.index(at.slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(memory.k_ring.empty.index(at.slot), count=1)
        slot, phase = following(at.slot, at.phase, 2)
        at = KeysAt(slot, phase, at.v_phase)
        if config.causal:  # noqa: SIM102  # decided when compiled, the other when run
            if gl.max(gl.max((acc != acc).to(gl.int32), 1), 0) > 0:
                gl.store(counter + 1, 1)
        _store_gradient(dq_desc, acc, problem.scale, memory.q.index(WHO), batch, head, row, config)
        mbarrier.arrive(memory.q_ring.empty.index(WHO), count=1)
        q_phase ^= 1
        board_slot, board_phase = following(board_slot, board_phase, 2)
        block, batch, head = published(memory.board, board_slot, board_phase)


@gluon.jit(do_not_specialize=ANY_VALUE)
def hopper_wide_dq_kernel(
    q_desc,  # [B, Hq, Sq, D], blocks of [1, 1, ROWS, D]
    k_desc,  # [B, Hkv, Sk, D], blocks of [1, 1, N, D]
    v_desc,  # like k
    do_desc,  # like q
    dq_desc,  # like q, written
    lse,  # fp32 [B * Hq * units * UNIT], -lse in log2
    delta,  # like lse
    counter,  # int32 [2]: zero before and after; 1 if dQ has a NaN
    scale,
    scale_log2,  # scale * log2(e), positive
    heads,  # Hq
    group,  # Hq // Hkv
    heads_total,  # B * Hq
    seq_len_q,
    seq_len_k,
    tiles,
    blocks_of_rows,  # of 2 * ROWS in a sequence
    section,  # see place
    units,  # of UNIT rows a head has in the workspaces
    config: gl.constexpr,
):
    """The gradient dQ. Grid: any number of programs, no more than tiles."""
    N: gl.constexpr = config.n
    D: gl.constexpr = config.d
    dtype: gl.constexpr = q_desc.dtype
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    memory = QueryMemory(
        gl.allocate_shared_memory(dtype, [2, ROWS, D], swizzled),
        gl.allocate_shared_memory(dtype, [2, ROWS, D], swizzled),
        gl.allocate_shared_memory(dtype, [2, N, D], swizzled),
        gl.allocate_shared_memory(dtype, [1, N, D], swizzled),
        Ring(make_barriers(2, 1), make_barriers(2, 1)),
        Ring(make_barriers(2, 1), make_barriers(2, 1)),
        make_ring(2, 2),
        make_ring(1, 2),
        make_board(2),
    )
    fence_async_shared()
    grid = Grid(tiles, blocks_of_rows, section, heads, heads_total)
    problem = Queries(scale, scale_log2, seq_len_q, seq_len_k, heads, group, units)
    gl.warp_specialize(
        [
            (_query_consumer, (dq_desc, lse, delta, counter, memory, problem, 0, config)),
            (_query_consumer, (dq_desc, lse, delta, counter, memory, problem, 1, config)),
            (
                _query_producer,
                (q_desc, k_desc, v_desc, do_desc, counter, memory, grid, problem, config),
            ),
        ],
        [4, 1],
        [config.consumer_registers, config.producer_registers],
    )
