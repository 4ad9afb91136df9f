"""Backward for Hopper: a producer warp and two consumer warp groups, key block after key block.

A program keeps a block of keys and goes over the queries that see them. Scores are computed
transposed, S^T = K Q^T and dP^T = V dO^T, keys by queries, so that P^T and dS^T are left operands
in registers of dV += P^T dO and dK += dS^T Q. Each consumer has half of the keys. dQ = dS K sums
over all of them: dS goes through shared memory, and each consumer computes half of dQ, which
leaves for its fp32 sums in global memory through the copy engine.

One product is always under way: under those of dQ and dK of one block runs the softmax of the
next, under that of dV the gradient of the scores. None is under way where the loop turns: ptxas
would serialise all of them. Exponents count in log2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fa4_triton.kernels.hopper import (
    Grid,
    accumulator,
    following,
    make_barriers,
    make_board,
    make_ring,
    published,
)
from fa4_triton.kernels.hopper_backward_common import (
    ANY_VALUE,
    KEYS,
    UNIT,
    Queries,
    Supply,
    issue_scores,
    kept,
    opaque,
    probabilities,
    produce,
    rows_seeing,
    score_gradients,
    seeing_of,
)

LINE = gl.constexpr(256)
"""Elements of a line of the sums of dQ; a panel has 16 lines."""


@dataclass(frozen=True)
class BackwardConfig:
    """What the kernel is compiled for.

    Attributes:
        m: Query rows of a block.
        d: Columns, a power of two.
        q_stages: Slots of Q.
        do_stages: Slots of dO.
        causal: Row i sees the keys up to i + Sk - Sq.
        tail: Sk is no multiple of `n`.
        consumer_registers: Of a consumer's thread.
        producer_registers: Of a producer's.
    """

    m: int
    d: int
    q_stages: int
    do_stages: int
    causal: bool
    tail: bool
    consumer_registers: int
    producer_registers: int

    @property
    def n(self) -> int:
        """Keys of a tile."""
        return 128

    @property
    def masks(self) -> bool:
        """Whether there are blocks in which a query does not see a key."""
        return self.causal or self.tail


class Memory(NamedTuple):
    """Shared memory: blocks, and the barriers of each kind of block."""

    k: Any  # [1, N, D]
    v: Any  # like k
    q: Any  # [q_stages, M, D]
    do: Any  # [do_stages, M, D]
    lse: Any  # [q_stages, M] fp32, -lse in log2
    delta: Any  # [do_stages, M] fp32
    ds: Any  # [2, N, M], dS^T
    dq: Any  # [consumers, 16, LINE] fp32, a panel on its way out
    k_ring: Any  # one slot, as has v_ring
    v_ring: Any
    q_ring: Any
    do_ring: Any
    ds_full: Any  # who writes dS knows by its own dQ that a slot is free
    board: Any


@builtin
def reduce_add(desc, coord, source, _semantic=None):
    """Add a block in shared memory to global memory by TMA, which Gluon does not offer."""
    coordinates = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, desc.handle, coordinates, source.handle)


@gluon.jit
def in_order_of_lanes(dq):
    """A panel [UNIT, 64] of dQ as [16, LINE]: four elements of a thread, thread by thread.

    So the accumulators go to shared memory 16 bytes a lane without a bank conflict.
    """
    # Rows: warp, half of its 16, lane // 4. Columns: octet, lane % 4, pair.
    parts = dq.reshape([4, 2, 8, 8, 4, 2])
    return parts.permute((3, 0, 2, 4, 1, 5)).reshape([16, LINE])


@gluon.jit
def _own(block, WHO: gl.constexpr):
    """Consumer WHO's keys of K or V."""
    return block.index(opaque(0)).slice(WHO * KEYS, KEYS, 0)


@gluon.jit
def _add_panel(dq_desc, dq, stage, line):
    """Add a panel of dQ to its sums. The one before has left when this returns."""
    tma.store_wait(0)
    stage.store(in_order_of_lanes(dq))
    fence_async_shared()
    reduce_add(dq_desc, [line, 0], stage)


@gluon.jit
def _line(row, flat_head, problem, WHO: gl.constexpr, D: gl.constexpr):
    """Where in the sums of dQ the panel of consumer WHO begins: of its rows or of its columns."""
    unit = flat_head * problem.units + row // UNIT
    if D == 64:
        return (unit + WHO) * 16
    else:
        return (unit * (D // 64) + WHO) * 16


class Walk(NamedTuple):
    """Where a consumer is in its rings."""

    q: Any
    q_phase: Any
    do: Any
    do_phase: Any
    ds: Any
    ds_phase: Any


@gluon.jit
def _to_ds(
    s,
    dk,
    dv,
    memory,
    walk,
    first_seeing,
    problem,
    q_done,
    WHO: gl.constexpr,
    config: gl.constexpr,
    MASKED: gl.constexpr,
    FIRST: gl.constexpr,
):
    """From S^T to dS^T, under which dK of the block before ends, and dV.

    Returns dS^T as a left operand, dK, dV, and the walk with dO and dS gone on.
    """
    M: gl.constexpr = config.m
    dtype: gl.constexpr = memory.k.dtype
    s_layout: gl.constexpr = s.type.layout
    grad_layout: gl.constexpr = accumulator(config.d)
    left: gl.constexpr = gl.DotOperandLayout(0, grad_layout, 2)
    lse_block = memory.lse.index(walk.q)
    p = probabilities(s, lse_block, first_seeing, problem.scale_log2, dtype, config, MASKED)
    mbarrier.wait(memory.do_ring.full.index(walk.do), walk.do_phase)
    do = memory.do.index(walk.do)
    dp = issue_scores(_own(memory.v, WHO), do, s_layout, M)
    dv = warpgroup_mma(gl.convert_layout(p, left), do, dv, is_async=True)
    if FIRST:
        dp = warpgroup_mma_wait(1, deps=(dp,))
    else:
        dp, dk = warpgroup_mma_wait(1, deps=(dp, dk))
        mbarrier.arrive(memory.q_ring.empty.index(q_done), count=1)
    delta_block = memory.delta.index(walk.do)
    ds = score_gradients(kept(p), dp, delta_block, first_seeing, config, MASKED)
    ds_slot, ds_phase = walk.ds, walk.ds_phase
    if not FIRST:
        ds_slot, ds_phase = following(ds_slot, ds_phase, 2)
    memory.ds.index(ds_slot).slice(WHO * KEYS, KEYS, 0).store(ds)
    fence_async_shared()
    mbarrier.arrive(memory.ds_full.index(ds_slot), count=1)
    dv = warpgroup_mma_wait(0, deps=(dv,))
    mbarrier.arrive(memory.do_ring.empty.index(walk.do), count=1)
    # An opaque move, where no product is under way: what is an operand in the next step is put
    # where that wants it. Otherwise ptxas copies it there, in every step.
    ds = gl.convert_layout(kept(ds), left)
    do_slot, do_phase = following(walk.do, walk.do_phase, config.do_stages)
    return ds, dk, dv, Walk(walk.q, walk.q_phase, do_slot, do_phase, ds_slot, ds_phase)


@gluon.jit
def _step(
    ds,
    dk,
    dv,
    dq_desc,
    line,
    memory,
    walk,
    first_seeing,
    problem,
    WHO: gl.constexpr,
    config: gl.constexpr,
    MASKED: gl.constexpr,
):
    """What is left of one block of queries, dQ and dK from dS^T, and the next one to its dS^T.

    `line` is where the first one's dQ goes, `first_seeing` is the next one's.
    """
    M: gl.constexpr = config.m
    s_layout: gl.constexpr = accumulator(M)
    q_done = walk.q
    q_slot, q_phase = following(walk.q, walk.q_phase, config.q_stages)
    mbarrier.wait(memory.q_ring.full.index(q_slot), q_phase)
    # Before anyone waits for the other's dS.
    s = issue_scores(_own(memory.k, WHO), memory.q.index(q_slot), s_layout, M)
    mbarrier.wait(memory.ds_full.index(walk.ds), walk.ds_phase)
    dq = _issue_dq(memory, walk.ds, WHO, config)
    dk = warpgroup_mma(ds, memory.q.index(q_done), dk, is_async=True)
    s, dq = warpgroup_mma_wait(1, deps=(s, dq))
    _add_panel(dq_desc, dq, memory.dq.index(WHO), line)
    walk = Walk(q_slot, q_phase, walk.do, walk.do_phase, walk.ds, walk.ds_phase)
    return _to_ds(
        s, dk, dv, memory, walk, first_seeing, problem, q_done, WHO, config, MASKED, False
    )


@gluon.jit
def _consumer(
    dq_desc,
    dk_desc,
    dv_desc,
    memory,
    problem,
    WHO: gl.constexpr,
    config: gl.constexpr,
):
    """Gradients dK and dV of keys `WHO * KEYS ...` of every tile, and a half of dQ."""
    M: gl.constexpr = config.m
    N: gl.constexpr = config.n
    D: gl.constexpr = config.d
    s_layout: gl.constexpr = accumulator(M)
    grad_layout: gl.constexpr = accumulator(D)
    stage = memory.dq.index(WHO)
    key_phase = 0
    walk = Walk(0, 0, 0, 0, 0, 0)
    board_slot = 0
    board_phase = 0
    block, batch, head_kv = published(memory.board, board_slot, board_phase)
    while block >= 0:
        key = block * N
        first_row = rows_seeing(key, problem, M, config.causal)
        first_key = key + WHO * KEYS
        seeing, clean_row = seeing_of(
            first_key, key + N, problem, gl.SliceLayout(1, s_layout), config
        )
        flat_head = batch * problem.heads + head_kv * problem.group
        dk = gl.zeros([KEYS, D], gl.float32, grad_layout)
        dv = gl.zeros([KEYS, D], gl.float32, grad_layout)
        mbarrier.wait(memory.k_ring.full.index(0), key_phase)
        mbarrier.wait(memory.q_ring.full.index(walk.q), walk.q_phase)
        s = issue_scores(_own(memory.k, WHO), memory.q.index(walk.q), s_layout, M)
        mbarrier.wait(memory.v_ring.full.index(0), key_phase)
        s = warpgroup_mma_wait(0, deps=(s,))
        ds, dk, dv, walk = _to_ds(
            s,
            dk,
            dv,
            memory,
            walk,
            seeing - first_row,
            problem,
            0,
            WHO,
            config,
            config.masks,
            True,
        )
        line = _line(first_row, flat_head, problem, WHO, D)
        row = first_row + M
        for _ in range(problem.group):
            if config.masks:
                end = gl.minimum(clean_row, problem.queries)
                for masked_row in range(row, end, M):
                    ds, dk, dv, walk = _step(
                        ds,
                        dk,
                        dv,
                        dq_desc,
                        line,
                        memory,
                        walk,
                        seeing - masked_row,
                        problem,
                        WHO,
                        config,
                        True,
                    )
                    line = _line(masked_row, flat_head, problem, WHO, D)
                row = gl.maximum(row, end)
            for clean in range(row, problem.queries, M):
                ds, dk, dv, walk = _step(
                    ds, dk, dv, dq_desc, line, memory, walk, 0, problem, WHO, config, False
                )
                line = _line(clean, flat_head, problem, WHO, D)
            row = first_row
            flat_head += 1
        # What is left of the last step.
        mbarrier.wait(memory.ds_full.index(walk.ds), walk.ds_phase)
        dq = _issue_dq(memory, walk.ds, WHO, config)
        dk = warpgroup_mma(ds, memory.q.index(walk.q), dk, is_async=True)
        dq = warpgroup_mma_wait(1, deps=(dq,))
        _add_panel(dq_desc, dq, stage, line)
        dk = warpgroup_mma_wait(0, deps=(dk,))
        # The next tile's keys and queries come while dK and dV are stored.
        mbarrier.arrive(memory.q_ring.empty.index(walk.q), count=1)
        mbarrier.arrive(memory.k_ring.empty.index(0), count=1)
        mbarrier.arrive(memory.v_ring.empty.index(0), count=1)
        q_slot, q_phase = following(walk.q, walk.q_phase, config.q_stages)
        ds_slot, ds_phase = following(walk.ds, walk.ds_phase, 2)
        walk = Walk(q_slot, q_phase, walk.do, walk.do_phase, ds_slot, ds_phase)
        key_phase ^= 1
        _store_gradient(dv_desc, dv, 1.0, stage, batch, head_kv, first_key, config)
        _store_gradient(dk_desc, dk, problem.scale, stage, batch, head_kv, first_key, config)
        board_slot, board_phase = following(board_slot, board_phase, 2)
        block, batch, head_kv = published(memory.board, board_slot, board_phase)
    tma.store_wait(0)


@gluon.jit
def _issue_dq(memory, slot, WHO: gl.constexpr, config: gl.constexpr):
    """A panel of dQ = dS K, under way: of consumer WHO's rows, or of its columns."""
    layout: gl.constexpr = accumulator(64)
    zeros = gl.zeros([UNIT, 64], gl.float32, layout)
    ds = memory.ds.index(slot)
    if config.d == 64:
        ds = ds.slice(WHO * UNIT, UNIT, 1)
        k = memory.k.index(opaque(0))
    else:
        k = memory.k.index(opaque(0)).slice(WHO * 64, 64, 1)
    return warpgroup_mma(ds.permute((1, 0)), k, zeros, use_acc=False, is_async=True)


@gluon.jit
def _store_gradient(desc, x, scale, stage, batch, head, key, config: gl.constexpr):
    """Store dK or dV of a consumer's keys, through where dQ leaves."""
    rows: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    tma.store_wait(0)
    block = stage._reinterpret(desc.dtype, [KEYS, config.d], rows)
    block.store((x * scale).to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(
        desc, [batch, head, key, 0], block.reshape([1, 1, KEYS, config.d])
    )


@gluon.jit(do_not_specialize=ANY_VALUE)
def hopper_backward_kernel(
    q_desc,  # [B, Hq, Sq, D], blocks of [1, 1, M, D]
    k_desc,  # [B, Hkv, Sk, D], blocks of [1, 1, N, D]
    v_desc,  # like k
    do_desc,  # like q
    dk_desc,  # like k, blocks of [1, 1, KEYS, D], written
    dv_desc,  # like dk
    lse_desc,  # fp32 [B * Hq * units * UNIT], -lse in log2, blocks of [M]
    delta_desc,  # like lse
    dq_desc,  # fp32 [B * Hq * units * UNIT * D / LINE, LINE], blocks of [16, LINE], added to
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
    """Add dQ to its sums; dK and dV. Grid: any number of programs, no more than tiles."""
    M: gl.constexpr = config.m
    N: gl.constexpr = config.n
    D: gl.constexpr = config.d
    dtype: gl.constexpr = q_desc.dtype
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)
    lines: gl.constexpr = gl.NVMMASharedLayout(0, 32, 2)
    memory = Memory(
        gl.allocate_shared_memory(dtype, [1, N, D], swizzled),
        gl.allocate_shared_memory(dtype, [1, N, D], swizzled),
        gl.allocate_shared_memory(dtype, [config.q_stages, M, D], swizzled),
        gl.allocate_shared_memory(dtype, [config.do_stages, M, D], swizzled),
        gl.allocate_shared_memory(gl.float32, [config.q_stages, M], flat),
        gl.allocate_shared_memory(gl.float32, [config.do_stages, M], flat),
        gl.allocate_shared_memory(dtype, [2, N, M], swizzled),
        gl.allocate_shared_memory(gl.float32, [2, 16, LINE], lines),
        make_ring(1, 2),
        make_ring(1, 2),
        make_ring(config.q_stages, 2),
        make_ring(config.do_stages, 2),
        make_barriers(2, 2),
        make_board(3),
    )
    fence_async_shared()
    grid = Grid(tiles, blocks_of_keys, section, heads // group, heads_total)
    problem = Queries(scale, scale_log2, seq_len_q, seq_len_k, heads, group, units)
    m = memory
    queries = Supply(k_desc, q_desc, lse_desc, m.k, m.q, m.lse, m.k_ring, m.q_ring)
    gradients = Supply(v_desc, do_desc, delta_desc, m.v, m.do, m.delta, m.v_ring, m.do_ring)
    board = memory.board
    Q_STAGES: gl.constexpr = config.q_stages
    DO_STAGES: gl.constexpr = config.do_stages
    gl.warp_specialize(
        [
            (_consumer, (dq_desc, dk_desc, dv_desc, memory, problem, 0, config)),
            (_consumer, (dq_desc, dk_desc, dv_desc, memory, problem, 1, config)),
            (produce, (queries, counter, board, grid, problem, Q_STAGES, True, config)),
            (produce, (gradients, counter, board, grid, problem, DO_STAGES, False, config)),
        ],
        [4, 1, 1],
        [config.consumer_registers, config.producer_registers, config.producer_registers],
    )
