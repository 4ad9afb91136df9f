"""What the Hopper kernels share: rings of blocks in shared memory, turns, and the way of a tile.

Written in Gluon, which compiles for Hopper only and cannot be interpreted. A program is one
producer warp, which copies blocks by TMA, and two or three consumer warp groups of 64 query rows
each, which multiply. They talk by mbarriers: a *full* one when a block has arrived, an *empty* one
when all consumers are done with it.

Letters are the papers': Q K V O are operands, S = Q K^T the scores, P the probabilities, M a tile
of query rows, N a block of keys, D the head dim's columns in a tile. D is a power of two: columns
past the head dim are read as zero by TMA and not written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

LN_2 = gl.constexpr(0.6931471805599453)

ROWS = gl.constexpr(64)
"""Query rows of a consumer: what one warp group's matrix product spans."""

FIRST_TURN = gl.constexpr(9)
"""Hardware barrier of consumer 0's turn, the others' follow; Triton's own count from 0."""


@gluon.constexpr_function
def accumulator(columns):
    """How the threads of a warp group hold a product [64, columns] in fp32."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


class Ring(NamedTuple):
    """Barriers of the slots of a ring of blocks."""

    full: Any
    empty: Any


class Grid(NamedTuple):
    """Which tiles there are; int32 scalars."""

    tiles: Any  # blocks * heads_total
    blocks: Any  # of M rows in a sequence
    section: Any  # heads that go side by side
    heads: Any  # Hq
    heads_total: Any  # B * Hq


class Problem(NamedTuple):
    """What is computed; scalars."""

    lse: Any  # pointer to [B, Hq, Sq] fp32, or [Hq, Tq] of packed sequences
    scale_log2: Any  # scale * log2(e), not negative
    lse_of_empty: Any  # lse of rows without keys
    queries: Any  # Sq, or Tq
    keys: Any  # Sk, or Tk
    heads: Any  # Hq
    group: Any  # Hq // Hkv
    left: Any  # keys seen before the diagonal, of a window
    right: Any  # and after it


class Sequence(NamedTuple):
    """Sizes of one sequence and where it begins; scalars."""

    queries: Any
    keys: Any
    first_query: Any  # row of the packed tensors; 0 of a dense batch
    first_key: Any


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT mbarriers, each of which a phase of ARRIVALS arrivals completes."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def make_ring(SLOTS: gl.constexpr, CONSUMERS: gl.constexpr):
    """Barriers of a ring that one producer fills and CONSUMERS empty."""
    return Ring(make_barriers(SLOTS, 1), make_barriers(SLOTS, CONSUMERS))


@gluon.jit
def following(slot, phase, SLOTS: gl.constexpr):
    """The slot after `slot`, and the phase of its barriers: it flips with every round."""
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _named_barrier(KIND: gl.constexpr, NUMBER: gl.constexpr):
    """`bar.sync` or `bar.arrive` among two warp groups, which Gluon does not offer.

    Inline PTX works on tensors, so it moves a number that nobody needs.
    """
    carrier = gl.full([128], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))
    PTX: gl.constexpr = f"bar.{KIND} {NUMBER}, 256; mov.u32 $0, $1;"
    gl.inline_asm_elementwise(PTX, "=r,r", [carrier], gl.int32, False, 1)


@gluon.jit
def take_turn(WHO: gl.constexpr):
    """Wait until it is consumer WHO's turn to issue matrix products."""
    _named_barrier("sync", FIRST_TURN + WHO)


@gluon.jit
def pass_turn(WHO: gl.constexpr, CONSUMERS: gl.constexpr):
    """Give the turn to the consumer after WHO, whose products run under WHO's softmax."""
    _named_barrier("arrive", FIRST_TURN + (WHO + 1) % CONSUMERS)


@gluon.jit
def draw(counter, grid):
    """The next tile that no program has taken yet; one past the last if there is none.

    Every program begins with the tile of its own index. `tiles` draws are made in all, and the
    last of them leaves the counter as it was found: zero.
    """
    drawn = gl.atomic_add(counter, 1, sem="relaxed")
    if drawn == grid.tiles - 1:
        gl.store(counter, 0)
    return drawn + gl.num_programs(0)


class Board(NamedTuple):
    """What the producer tells the consumers: where in the grid the next tile lies.

    Once for all of them, since finding out takes half a dozen divisions.
    """

    block: Any  # [2, 1] int32 in shared memory; -1: no tile is left
    batch: Any
    head: Any
    sequence: Any  # [8, 1], a `Sequence` a slot; of packed sequences only
    ring: Any


@gluon.jit
def make_board(CONSUMERS: gl.constexpr):
    """A board with room for this tile and the next."""
    word: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return Board(
        gl.allocate_shared_memory(gl.int32, [2, 1], word),
        gl.allocate_shared_memory(gl.int32, [2, 1], word),
        gl.allocate_shared_memory(gl.int32, [2, 1], word),
        gl.allocate_shared_memory(gl.int32, [8, 1], word),
        make_ring(2, CONSUMERS),
    )


@gluon.jit
def publish(board, slot, phase, block, batch, head, sequence=None, VARLEN: gl.constexpr = False):
    """Write where the next tile lies, and with VARLEN the `Sequence`. Called by one warp."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    zero = gl.full([1], 0, gl.int32, layout)
    mbarrier.wait(board.ring.empty.index(slot), phase ^ 1)
    board.block.index(slot).store(zero + block)
    board.batch.index(slot).store(zero + batch)
    board.head.index(slot).store(zero + head)
    if VARLEN:
        board.sequence.index(4 * slot).store(zero + sequence.queries)
        board.sequence.index(4 * slot + 1).store(zero + sequence.keys)
        board.sequence.index(4 * slot + 2).store(zero + sequence.first_query)
        board.sequence.index(4 * slot + 3).store(zero + sequence.first_key)
    mbarrier.arrive(board.ring.full.index(slot), count=1)


@gluon.jit
def _word(words, index, WARPS: gl.constexpr = 4):
    """A number on the board. Called by as many warps as there are."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.max(words.index(index).load(layout), 0)


@gluon.jit
def published(board, slot, phase, WARPS: gl.constexpr = 4):
    """(block, batch, head) of the next tile. Called by as many warps as there are."""
    mbarrier.wait(board.ring.full.index(slot), phase)
    block = _word(board.block, slot, WARPS)
    batch = _word(board.batch, slot, WARPS)
    head = _word(board.head, slot, WARPS)
    mbarrier.arrive(board.ring.empty.index(slot), count=1)
    return block, batch, head


@gluon.jit
def published_packed(board, slot, phase):
    """As `published`, and the `Sequence` that the tile belongs to."""
    mbarrier.wait(board.ring.full.index(slot), phase)
    block = _word(board.block, slot)
    batch = _word(board.batch, slot)
    head = _word(board.head, slot)
    sequence = Sequence(
        _word(board.sequence, 4 * slot),
        _word(board.sequence, 4 * slot + 1),
        _word(board.sequence, 4 * slot + 2),
        _word(board.sequence, 4 * slot + 3),
    )
    mbarrier.arrive(board.ring.empty.index(slot), count=1)
    return block, batch, head, sequence


@gluon.jit
def place(tile, grid):
    """(block, batch, head) of a tile.

    Heads go in sections, small enough that their keys and values stay in the L2 cache. Within a
    section the last blocks of rows go first: under a causal mask they are the longest.
    """
    section_size = grid.blocks * grid.section
    number = tile // section_size
    within = tile - number * section_size
    width = gl.minimum(grid.section, grid.heads_total - number * grid.section)
    flat_head = number * grid.section + within % width
    block = grid.blocks - 1 - within // width
    return block, flat_head // grid.heads, flat_head % grid.heads


@gluon.jit
def sequence_of(cu_seqlens_q, cu_seqlens_k, batch):
    """The `Sequence` number `batch`, from offsets [B + 1] int32."""
    first_query = gl.load(cu_seqlens_q + batch)
    first_key = gl.load(cu_seqlens_k + batch)
    queries = gl.load(cu_seqlens_q + batch + 1) - first_query
    keys = gl.load(cu_seqlens_k + batch + 1) - first_key
    return Sequence(queries, keys, first_query, first_key)


@gluon.jit
def blocks_seen(row, COUNT: gl.constexpr, sequence, N: gl.constexpr, CAUSAL: gl.constexpr):
    """(seen, whole): blocks of N keys that rows `row ... row + COUNT` see, and those seen whole.

    Counted from the first key. Never less than one is seen, so that rows without keys need no
    code of their own.
    """
    seen = sequence.keys
    whole = sequence.keys
    if CAUSAL:
        shift = sequence.keys - sequence.queries
        seen = gl.minimum(seen, row + COUNT + shift)
        whole = gl.maximum(gl.minimum(whole, row + 1 + shift), 0)
    return gl.maximum((seen + N - 1) // N, 1), whole // N


@gluon.jit
def blocks_in_window(row, sequence, problem, N: gl.constexpr):
    """(low, whole_low, whole_high, high): blocks of N keys that ROWS rows from `row` on see.

    Blocks from `low` to before `high` are seen by some row, those from `whole_low` to before
    `whole_high` by every row, whole. One block at least, as in `blocks_seen`; all four rise with
    `row`, and `whole_low` may lie above `whole_high`.
    """
    first = row + sequence.keys - sequence.queries
    last = first + ROWS - 1
    blocks = gl.maximum((sequence.keys + N - 1) // N, 1)
    low = gl.minimum(gl.maximum(first - problem.left, 0) // N, blocks - 1)
    end = gl.maximum(gl.minimum(last + problem.right + 1, sequence.keys), 0)
    high = gl.maximum((end + N - 1) // N, low + 1)
    whole_low = (gl.maximum(last - problem.left, 0) + N - 1) // N
    whole_high = gl.maximum(gl.minimum(first + problem.right + 1, sequence.keys), 0) // N
    return low, whole_low, whole_high, high
