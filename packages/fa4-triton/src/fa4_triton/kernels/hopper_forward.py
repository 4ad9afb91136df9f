"""Forward for Hopper: a producer warp and two or three consumer warp groups, tile after tile.

FlashAttention-3 (arXiv 2407.08608) in Gluon. While one consumer exponentiates, the products of
another run; and within a consumer, P V of one block runs under the softmax of the next. Keys are
taken from the last block to the first, so that masked blocks come before the loop that needs no
mask. The running maximum and the exponents count in log2.
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
    LN_2,
    ROWS,
    Grid,
    Problem,
    Ring,
    Sequence,
    accumulator,
    blocks_in_window,
    blocks_seen,
    draw,
    following,
    make_barriers,
    make_board,
    make_ring,
    pass_turn,
    place,
    publish,
    published,
    published_packed,
    sequence_of,
    take_turn,
)
from fa4_triton.kernels.hopper_repair import (
    PRODUCT,
    make_table,
    repair,
    source_in,
    store_rows,
)


@dataclass(frozen=True)
class Config:
    """What the kernel is compiled for.

    Attributes:
        m: Query rows of a tile, `ROWS` a consumer.
        n: Keys of a block.
        d: Columns, a power of two.
        stages: Slots of K and of V.
        causal: Row i sees the keys up to i + Sk - Sq.
        window: Row i sees the keys from i + Sk - Sq - left to i + Sk - Sq + right.
        varlen: Sequences are packed, whose lengths are in memory.
        tail: Where nothing else is masked, Sk is no multiple of `n`.
        drawn: Programs draw their tiles from a counter; else tiles are dealt to them in turn.
        own_o: O has a buffer of its own; else it leaves through Q's.
        consumer_registers: Of a consumer's thread.
        producer_registers: Of a producer's.
    """

    m: int
    n: int
    d: int
    stages: int
    causal: bool
    window: bool
    varlen: bool
    tail: bool
    drawn: bool
    own_o: bool
    consumer_registers: int
    producer_registers: int

    @property
    def consumers(self) -> int:
        """Warp groups that multiply."""
        return self.m // 64


# [ROWS, 4]: of 16 rows a warp, rows i and i + 8 belong to 4 lanes, as in a matrix product's result.
LANES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)


class Memory(NamedTuple):
    """Shared memory: blocks, and the barriers of each kind of block."""

    q: Any  # [consumers, ROWS, D]
    k: Any  # [stages, N, D]
    v: Any  # like k
    o: Any  # like q, or q itself
    q_ring: Any  # a slot a consumer
    k_ring: Any
    v_ring: Any
    board: Any


class Inputs(NamedTuple):
    """What the producer reads."""

    q: Any  # descriptors
    k: Any
    v: Any
    cu_seqlens_q: Any  # pointers, of packed sequences only
    cu_seqlens_k: Any


@gluon.jit
def _load(desc, batch, head, row, ring, slot, phase, block):
    """Copy rows `row ...` of one head into `block`, slot `slot` of a ring, once that is empty."""
    mbarrier.wait(ring.empty.index(slot), phase ^ 1)
    mbarrier.expect(ring.full.index(slot), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, head, row, 0], ring.full.index(slot), block)


@gluon.jit
def _blocks_of_tile(row, sequence, problem, config: gl.constexpr):
    """(low, high): blocks of keys, the last excluded, that some row of a tile sees."""
    if config.window:
        low, _, _, _ = blocks_in_window(row, sequence, problem, config.n)
        _, _, _, high = blocks_in_window(row + config.m - ROWS, sequence, problem, config.n)
    else:
        low = 0
        high, _ = blocks_seen(row, config.m, sequence, config.n, config.causal)
    return low, high


@gluon.jit
def _producer(
    inputs,
    counter,
    memory,
    grid,
    problem,
    config: gl.constexpr,
):
    """Copy Q, and K and V block by block, of every tile of this program."""
    M: gl.constexpr = config.m
    N: gl.constexpr = config.n
    CONSUMERS: gl.constexpr = config.consumers
    q_shape: gl.constexpr = [1, 1, ROWS, config.d]
    k_shape: gl.constexpr = [1, 1, N, config.d]
    slot = 0
    phase = 0
    q_phase = 0
    board_slot = 0
    board_phase = 0
    tile = gl.program_id(0)
    if config.varlen:
        sequence = sequence_of(inputs.cu_seqlens_q, inputs.cu_seqlens_k, 0)
    else:
        sequence = Sequence(problem.queries, problem.keys, 0, 0)
    while tile < grid.tiles:
        block, batch, head = place(tile, grid)
        if config.varlen:
            sequence = sequence_of(inputs.cu_seqlens_q, inputs.cu_seqlens_k, batch)
            batch = batch * 0
            there = block * M < sequence.queries
        else:
            there = True
        if there:
            publish(
                memory.board, board_slot, board_phase, block, batch, head, sequence, config.varlen
            )
            board_slot, board_phase = following(board_slot, board_phase, 2)
            head_kv = head // problem.group
            low, high = _blocks_of_tile(block * M, sequence, problem, config)
            key = sequence.first_key + (high - 1) * N
            k_block = memory.k.index(slot).reshape(k_shape)
            _load(inputs.k, batch, head_kv, key, memory.k_ring, slot, phase, k_block)
            for who in gl.static_range(CONSUMERS):
                row = sequence.first_query + block * M + who * ROWS
                q_block = memory.q.index(who).reshape(q_shape)
                _load(inputs.q, batch, head, row, memory.q_ring, who, q_phase, q_block)
            v_block = memory.v.index(slot).reshape(k_shape)
            _load(inputs.v, batch, head_kv, key, memory.v_ring, slot, phase, v_block)
            slot, phase = following(slot, phase, config.stages)
            for index in range(1, high - low):
                key = sequence.first_key + (high - 1 - index) * N
                k_block = memory.k.index(slot).reshape(k_shape)
                _load(inputs.k, batch, head_kv, key, memory.k_ring, slot, phase, k_block)
                v_block = memory.v.index(slot).reshape(k_shape)
                _load(inputs.v, batch, head_kv, key, memory.v_ring, slot, phase, v_block)
                slot, phase = following(slot, phase, config.stages)
            q_phase ^= 1
        if config.drawn:
            # Not before all of this tile is on its way: who draws early keeps a long tile from a
            # program that has nothing to do. The blocks under way hide the counter's latency.
            tile = draw(counter, grid)
        else:
            tile += gl.num_programs(0)
    publish(memory.board, board_slot, board_phase, -1, 0, 0)


@gluon.jit
def _by_lane(s, N: gl.constexpr):
    """`s` [ROWS, N] as [ROWS, N // 8, 4, 2]: octets of columns, of which each of 4 lanes has 2."""
    return s.reshape([ROWS, N // 8, 4, 2])


@gluon.jit
def _hide(s, limit, lower, N: gl.constexpr, LEFT: gl.constexpr):
    """`s` [ROWS, N] with -inf in row i from column `limit[i]` on, and with LEFT before `lower[i]`.

    The lane's part of a column's index goes to the limit's side, so that what is compared with it
    is a constant of the instruction, not a register a column.
    """
    parts = _by_lane(s, N)
    layout: gl.constexpr = parts.type.layout
    octet_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    lane_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout)))
    pair_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    row_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))
    octet = 8 * gl.arange(0, N // 8, octet_layout)
    lane = 2 * gl.arange(0, 4, lane_layout)
    pair = gl.arange(0, 2, pair_layout)
    octet = gl.expand_dims(gl.expand_dims(gl.expand_dims(octet, 0), 2), 3)
    lane = gl.expand_dims(gl.expand_dims(gl.expand_dims(lane, 0), 1), 3)
    pair = gl.expand_dims(gl.expand_dims(gl.expand_dims(pair, 0), 1), 2)
    limit = gl.convert_layout(limit, row_layout, assert_trivial=True)
    limit = gl.expand_dims(gl.expand_dims(gl.expand_dims(limit, 1), 2), 3)
    seen = octet + pair < limit - lane
    if LEFT:
        lower = gl.convert_layout(lower, row_layout, assert_trivial=True)
        lower = gl.expand_dims(gl.expand_dims(gl.expand_dims(lower, 1), 2), 3)
        seen = seen & (octet + pair >= lower - lane)
    hidden = gl.where(seen, parts, float("-inf"))
    return gl.convert_layout(hidden.reshape([ROWS, N]), s.type.layout, assert_trivial=True)


@gluon.jit
def _softmax(
    s,
    maximum,
    total,
    scale_log2,
    limit,
    lower,
    N: gl.constexpr,
    MASKED: gl.constexpr,
    LEFT: gl.constexpr,
):
    """(P, maximum, total, rescale) with the scores `s` [ROWS, N] taken in.

    Args:
        s: Unscaled.
        maximum: [ROWS], of the scaled scores so far, log2.
        total: [ROWS, 4], sum of P so far, a lane's columns each.
        scale_log2: scale * log2(e), positive: times zero, a hidden -inf would be NaN.
        limit: [ROWS], where in the block the keys end that each row sees; MASKED only.
        lower: [ROWS], where they begin; LEFT only.
        N: Keys.
        MASKED: Whether some row does not see some key.
        LEFT: Whether that may be one of the block's first keys.
    """
    if MASKED:
        s = _hide(s, limit, lower, N, LEFT)
    new_maximum = gl.maximum(maximum, gl.max(s, 1) * scale_log2)
    # A row that has seen no key yet subtracts 0, not -inf: its P is exp2(-inf) = 0.
    offset = gl.where(new_maximum == float("-inf"), 0.0, new_maximum) if MASKED else new_maximum
    p = gl.exp2(s * scale_log2 - gl.expand_dims(offset, 1))
    rescale = gl.exp2(maximum - offset)
    # Each lane sums its columns only; all lanes together are summed once, at the end.
    sums = gl.sum(gl.sum(_by_lane(p, N), 3), 1)
    total_rows: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    total = total * gl.expand_dims(gl.convert_layout(rescale, total_rows, assert_trivial=True), 1)
    sums = gl.convert_layout(sums, total.type.layout, assert_trivial=True)
    return p, new_maximum, total + sums, rescale


@gluon.jit
def _first_softmax(
    s,
    limit,
    lower,
    scale_log2,
    dtype: gl.constexpr,
    config: gl.constexpr,
    HALF: gl.constexpr,
):
    """(P, maximum, total) of a tile's first block; with HALF no row sees its second half."""
    N: gl.constexpr = config.n
    MASKED: gl.constexpr = config.causal or config.window or config.tail
    layout: gl.constexpr = s.type.layout
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    maximum = gl.full([ROWS], float("-inf"), gl.float32, rows)
    total = gl.zeros([ROWS, 4], gl.float32, LANES)
    if HALF:
        half: gl.constexpr = accumulator(N // 2)
        half_rows: gl.constexpr = gl.SliceLayout(1, half)
        first, _ = gl.split(s.reshape([ROWS, 2, N // 2]).permute((0, 2, 1)))
        p, maximum, total, _ = _softmax(
            gl.convert_layout(first, half, assert_trivial=True),
            gl.convert_layout(maximum, half_rows, assert_trivial=True),
            total,
            scale_log2,
            gl.convert_layout(limit, half_rows, assert_trivial=True),
            lower,
            N // 2,
            MASKED,
            False,
        )
        maximum = gl.convert_layout(maximum, rows, assert_trivial=True)
        p = p.to(dtype)
        p = gl.join(p, gl.zeros_like(p)).permute((0, 2, 1)).reshape([ROWS, N])
        p = gl.convert_layout(p, layout, assert_trivial=True)
    else:
        p, maximum, total, _ = _softmax(
            s, maximum, total, scale_log2, limit, lower, N, MASKED, config.window
        )
        p = p.to(dtype)
    return p, maximum, total


@gluon.jit
def _step(
    q,
    memory,
    slot,
    phase,
    p,
    acc,
    maximum,
    total,
    scale_log2,
    limit,
    lower,
    WHO: gl.constexpr,
    config: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Scores of the next block, under whose softmax P V of the block before runs.

    `slot` and `phase` are those of the block before, whose P comes as an operand; the next block's
    are returned with the new state.
    """
    v_slot = slot
    v_phase = phase
    slot, phase = following(slot, phase, config.stages)
    mbarrier.wait(memory.k_ring.full.index(slot), phase)
    take_turn(WHO)
    N: gl.constexpr = config.n
    s_layout: gl.constexpr = accumulator(N)
    zeros = gl.zeros([ROWS, N], gl.float32, s_layout)
    k_block = memory.k.index(slot).permute((1, 0))
    s = warpgroup_mma(q, k_block, zeros, use_acc=False, is_async=True)
    mbarrier.wait(memory.v_ring.full.index(v_slot), v_phase)
    acc = warpgroup_mma(p, memory.v.index(v_slot), acc, is_async=True)
    pass_turn(WHO, config.consumers)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(memory.k_ring.empty.index(slot), count=1)
    new_p, maximum, total, rescale = _softmax(
        s, maximum, total, scale_log2, limit, lower, N, MASKED, config.window
    )
    p = gl.convert_layout(new_p.to(p.dtype), p.type.layout)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(memory.v_ring.empty.index(v_slot), count=1)
    o_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    acc = acc * gl.expand_dims(gl.convert_layout(rescale, o_rows), 1)
    return slot, phase, p, acc, maximum, total


@gluon.jit
def _pass_by(count, memory, slot, phase, WHO: gl.constexpr, config: gl.constexpr):
    """Let go of `count` blocks that only other consumers see; (slot, phase) after them."""
    for _ in range(count):
        take_turn(WHO)
        pass_turn(WHO, config.consumers)
        mbarrier.wait(memory.k_ring.full.index(slot), phase)
        mbarrier.arrive(memory.k_ring.empty.index(slot), count=1)
        mbarrier.wait(memory.v_ring.full.index(slot), phase)
        mbarrier.arrive(memory.v_ring.empty.index(slot), count=1)
        slot, phase = following(slot, phase, config.stages)
    return slot, phase


@gluon.jit
def _consumer(
    out_desc,
    sources,
    memory,
    problem,
    WHO: gl.constexpr,
    config: gl.constexpr,
):
    """Out and lse of rows `WHO * ROWS ...` of every tile of this program."""
    M: gl.constexpr = config.m
    N: gl.constexpr = config.n
    D: gl.constexpr = config.d
    CAUSAL: gl.constexpr = config.causal
    WINDOW: gl.constexpr = config.window
    s_layout: gl.constexpr = accumulator(N)
    o_layout: gl.constexpr = accumulator(D)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    q = memory.q.index(WHO)
    o_block = memory.o.index(WHO)
    if config.consumers - 1 == WHO:
        pass_turn(WHO, config.consumers)
    slot = 0
    phase = 0
    q_phase = 0
    board_slot = 0
    board_phase = 0
    if config.varlen:
        block, batch, head, sequence = published_packed(memory.board, board_slot, board_phase)
    else:
        block, batch, head = published(memory.board, board_slot, board_phase)
        sequence = Sequence(problem.queries, problem.keys, 0, 0)
    while block >= 0:
        row = block * M + WHO * ROWS
        rows = row + gl.arange(0, ROWS, row_layout)
        shift = sequence.keys - sequence.queries
        limit = gl.zeros([ROWS], gl.int32, row_layout) + sequence.keys
        lower = limit  # not looked at without a window
        # Blocks from `last` down to `low` are seen, of which those from `last` down to `whole` and
        # those before `whole_low` need the mask.
        brought_low, brought = _blocks_of_tile(block * M, sequence, problem, config)
        if WINDOW:
            limit = gl.minimum(limit, rows + (1 + shift + problem.right))
            lower = rows + (shift - problem.left)
            low, whole_low, whole, seen = blocks_in_window(row, sequence, problem, N)
        else:
            if CAUSAL:
                limit = gl.minimum(limit, rows + (1 + shift))
            seen, whole = blocks_seen(row, ROWS, sequence, N, CAUSAL)
        if CAUSAL or WINDOW:
            slot, phase = _pass_by(brought - seen, memory, slot, phase, WHO, config)

        mbarrier.wait(memory.q_ring.full.index(WHO), q_phase)
        mbarrier.wait(memory.k_ring.full.index(slot), phase)
        take_turn(WHO)
        zeros = gl.zeros([ROWS, N], gl.float32, s_layout)
        k_block = memory.k.index(slot).permute((1, 0))
        s = warpgroup_mma(q, k_block, zeros, use_acc=False, is_async=True)
        pass_turn(WHO, config.consumers)
        acc = gl.zeros([ROWS, D], gl.float32, o_layout)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(memory.k_ring.empty.index(slot), count=1)
        last = seen - 1
        first_limit = limit - last * N
        first_lower = lower - last * N
        dtype: gl.constexpr = out_desc.dtype
        if CAUSAL and N > ROWS:
            # Every second warp group sees half of its last block: 64 rows of 128 keys.
            if row + ROWS + shift - last * N <= N // 2:
                p, maximum, total = _first_softmax(
                    s, first_limit, first_lower, problem.scale_log2, dtype, config, True
                )
            else:
                p, maximum, total = _first_softmax(
                    s, first_limit, first_lower, problem.scale_log2, dtype, config, False
                )
        else:
            p, maximum, total = _first_softmax(
                s, first_limit, first_lower, problem.scale_log2, dtype, config, False
            )
        p = gl.convert_layout(p, p_layout)
        if CAUSAL or WINDOW:
            # An opaque move of P. Without it ptxas keeps P of the two loops below in different
            # registers from P here, and copies it in every step: 64 instructions of 470 at D 64.
            # What two branches may have written it does not keep under way at all (C7513).
            p = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [p], p.dtype, False, 2)
        if WINDOW:
            whole = gl.maximum(gl.minimum(whole, last), low)
            whole_low = gl.minimum(gl.maximum(whole_low, low), whole)
            unmasked = whole - whole_low
        elif CAUSAL:
            unmasked = gl.minimum(whole, last)
        else:
            unmasked = last
        if CAUSAL or WINDOW:
            for index in range(1, seen - whole):
                key = (last - index) * N
                slot, phase, p, acc, maximum, total = _step(
                    q,
                    memory,
                    slot,
                    phase,
                    p,
                    acc,
                    maximum,
                    total,
                    problem.scale_log2,
                    limit - key,
                    lower - key,
                    WHO,
                    config,
                    True,
                )
        for _ in range(unmasked):
            slot, phase, p, acc, maximum, total = _step(
                q,
                memory,
                slot,
                phase,
                p,
                acc,
                maximum,
                total,
                problem.scale_log2,
                limit,
                lower,
                WHO,
                config,
                False,
            )
        if WINDOW:
            for index in range(1, whole_low - low + 1):
                key = (whole_low - index) * N
                slot, phase, p, acc, maximum, total = _step(
                    q,
                    memory,
                    slot,
                    phase,
                    p,
                    acc,
                    maximum,
                    total,
                    problem.scale_log2,
                    limit - key,
                    lower - key,
                    WHO,
                    config,
                    True,
                )
        if config.own_o:
            mbarrier.arrive(memory.q_ring.empty.index(WHO), count=1)
        mbarrier.wait(memory.v_ring.full.index(slot), phase)
        acc = warpgroup_mma(p, memory.v.index(slot), acc, is_async=True)
        total = gl.convert_layout(gl.sum(total, 1), row_layout, assert_trivial=True)
        empty = total == 0.0  # no key seen; a row of NaN scores has a total of NaN
        inverse = gl.where(empty, 0.0, 1.0 / total)
        lse_log2 = maximum + gl.log2(total)
        lse_values = gl.where(empty, problem.lse_of_empty, lse_log2 * LN_2)
        # Of packed sequences problem.queries is Tq, and batch is 0.
        lse_rows = problem.lse + (batch.to(gl.int64) * problem.heads + head) * problem.queries
        lse_rows += sequence.first_query
        gl.store(lse_rows + rows, lse_values, mask=rows < sequence.queries)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(memory.v_ring.empty.index(slot), count=1)
        slot, phase = following(slot, phase, config.stages)
        if WINDOW:
            slot, phase = _pass_by(low - brought_low, memory, slot, phase, WHO, config)
        inverse = gl.convert_layout(inverse, gl.SliceLayout(1, o_layout))
        if config.own_o:
            tma.store_wait(0)  # the tile before has left
        o_block.store((acc * gl.expand_dims(inverse, 1)).to(out_desc.dtype))
        if CAUSAL or WINDOW or config.varlen:  # noqa: SIM102  # compiled; the other when run
            # A dense batch without a mask multiplies nothing unseen: keys past the last are zero.
            if gl.max(gl.max((acc != acc).to(gl.int32), 1), 0) > 0:
                product_rows: gl.constexpr = gl.SliceLayout(1, PRODUCT)
                head_kv = head // problem.group
                repair(
                    o_block,
                    source_in(sources, 0, batch, head, sequence.first_query, out_desc.dtype),
                    source_in(sources, 1, batch, head_kv, sequence.first_key, out_desc.dtype),
                    source_in(sources, 2, batch, head_kv, sequence.first_key, out_desc.dtype),
                    gl.convert_layout(gl.where(empty, 0.0, lse_log2), product_rows),
                    row,
                    sequence,
                    problem,
                    out_desc.shape[3],
                    D,
                    config,
                )
        # Before the copy engine reads it, or brings the next Q to where it is.
        fence_async_shared()
        if config.varlen:
            if row + ROWS <= sequence.queries:
                tma.async_copy_shared_to_global(
                    out_desc,
                    [batch, head, sequence.first_query + row, 0],
                    o_block.reshape([1, 1, ROWS, D]),
                )
            else:  # rows that follow are another sequence's
                out = source_in(sources, 3, batch, head, sequence.first_query, out_desc.dtype)
                store_rows(o_block, out, row, sequence.queries, out_desc.shape[3], D)
        else:
            tma.async_copy_shared_to_global(
                out_desc, [batch, head, row, 0], o_block.reshape([1, 1, ROWS, D])
            )
        if not config.own_o:
            tma.store_wait(0)
            mbarrier.arrive(memory.q_ring.empty.index(WHO), count=1)
        q_phase ^= 1
        board_slot, board_phase = following(board_slot, board_phase, 2)
        if config.varlen:
            block, batch, head, sequence = published_packed(memory.board, board_slot, board_phase)
        else:
            block, batch, head = published(memory.board, board_slot, board_phase)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "lse",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "scale_log2",
        "lse_of_empty",
        "heads",
        "group",
        "heads_total",
        "seq_len_q",
        "seq_len_k",
        "left",
        "right",
        "tiles",
        "blocks_of_rows",
        "section",
        "counter",
    ]
)
def hopper_forward_kernel(
    q_desc,  # [B, Hq, Sq, D], packed [1, Hq, Tq, D], blocks of [1, 1, ROWS, D]
    k_desc,  # [B, Hkv, Sk, D], packed [1, Hkv, Tk, D], blocks of [1, 1, N, D]
    v_desc,  # like k
    out_desc,  # like q
    q,  # the same tensors by their addresses, for `repair` and `store_rows`
    k,
    v,
    out,
    lse,  # fp32 [B, Hq, Sq] or [Hq, Tq], natural log
    cu_seqlens_q,  # [B + 1] int32, of packed sequences only
    cu_seqlens_k,
    counter,  # int32, zero before and after; unused where tiles are dealt
    scale_log2,  # scale * log2(e), positive
    lse_of_empty,
    heads,  # Hq
    group,  # Hq // Hkv
    heads_total,  # B * Hq
    seq_len_q,  # packed Tq
    seq_len_k,  # packed Tk
    left,  # of a window
    right,
    tiles,
    blocks_of_rows,  # of M rows in the longest sequence
    section,  # see place
    config: gl.constexpr,
):
    """Out and lse. Grid: any number of programs, no more than tiles."""
    CONSUMERS: gl.constexpr = config.consumers
    D: gl.constexpr = config.d
    dtype: gl.constexpr = q_desc.dtype
    row_major: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], row_major)
    k_smem = gl.allocate_shared_memory(dtype, [config.stages, config.n, D], row_major)
    v_smem = gl.allocate_shared_memory(dtype, [config.stages, config.n, D], row_major)
    if config.own_o:
        o_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], row_major)
    else:
        o_smem = q_smem
    q_ring = Ring(make_barriers(CONSUMERS, 1), make_barriers(CONSUMERS, 1))
    k_ring = make_ring(config.stages, CONSUMERS)
    v_ring = make_ring(config.stages, CONSUMERS)
    memory = Memory(q_smem, k_smem, v_smem, o_smem, q_ring, k_ring, v_ring, make_board(CONSUMERS))
    if config.varlen:
        sources = make_table((q, k, v, out), (q_desc, k_desc, v_desc, out_desc))
    elif config.causal or config.window:
        sources = make_table((q, k, v), (q_desc, k_desc, v_desc))
    else:
        sources = lse  # nothing is repaired
    fence_async_shared()
    grid = Grid(tiles, blocks_of_rows, section, heads, heads_total)
    problem = Problem(
        lse, scale_log2, lse_of_empty, seq_len_q, seq_len_k, heads, group, left, right
    )
    inputs = Inputs(q_desc, k_desc, v_desc, cu_seqlens_q, cu_seqlens_k)
    if config.consumers == 2:
        gl.warp_specialize(
            [
                (_consumer, (out_desc, sources, memory, problem, 0, config)),
                (_consumer, (out_desc, sources, memory, problem, 1, config)),
                (_producer, (inputs, counter, memory, grid, problem, config)),
            ],
            [4, 1],
            [config.consumer_registers, config.producer_registers],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (out_desc, sources, memory, problem, 0, config)),
                (_consumer, (out_desc, sources, memory, problem, 1, config)),
                (_consumer, (out_desc, sources, memory, problem, 2, config)),
                (_producer, (inputs, counter, memory, grid, problem, config)),
            ],
            [4, 4, 1],
            [config.consumer_registers, config.consumer_registers, config.producer_registers],
        )
