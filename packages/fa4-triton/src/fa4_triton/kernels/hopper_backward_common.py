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

KEYS = gl.constexpr(64)
"""Keys, or rows, of a consumer: what one warp group's matrix product spans."""

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


@gluon.jit
def rows_seeing(key, problem, M: gl.constexpr, CAUSAL: gl.constexpr):
    """The first row of the first block of queries that sees `key` or a later one."""
    row = 0
    if CAUSAL:
        row = gl.maximum(key - (problem.keys - problem.queries), 0) // M * M
    return row


@gluon.jit
def steps_of(first_row, problem, M: gl.constexpr):
    """Steps of a tile: blocks of queries of all heads that share its keys."""
    return (problem.queries - first_row + M - 1) // M * problem.group


@gluon.jit
def block_after(row, head, first_row, problem, M: gl.constexpr):
    """Row and head of the block of queries after this one."""
    row += M
    last = row >= problem.queries
    return gl.where(last, first_row, row), gl.where(last, head + 1, head)


@gluon.jit
def load_rows(desc, stats_desc, batch, head, row, problem, ring, slot, phase, block, stats):
    """Copy rows `row ...` of a head, and their number each, once the slot is empty."""
    mbarrier.wait(ring.empty.index(slot), phase ^ 1)
    full = ring.full.index(slot)
    mbarrier.expect(full, desc.block_type.nbytes + stats_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, head, row, 0], full, block)
    flat_row = (batch * problem.heads + head) * problem.units * UNIT + row
    tma.async_copy_global_to_shared(stats_desc, [flat_row], full, stats)


@gluon.jit
def load_keys(desc, batch, head, key, ring, phase, block):
    """Copy the tile's keys or values, once those of the tile before are done with."""
    mbarrier.wait(ring.empty.index(0), phase ^ 1)
    mbarrier.expect(ring.full.index(0), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, head, key, 0], ring.full.index(0), block)


@gluon.jit
def _hide(x, bound, value, COUNT: gl.constexpr, FROM: gl.constexpr):
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
def hide(
    x,
    masked,
    bound,
    value,
    COUNT: gl.constexpr,
    FROM: gl.constexpr,
    config: gl.constexpr,
):
    """`_hide`, in blocks that are `masked`."""
    if config.masks:  # noqa: SIM102  # decided when compiled, the other when run
        if masked:
            x = _hide(x, bound, value, COUNT, FROM)
    return x


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
    """The row from which on each key `key ...` is seen, and that from which on all up to `end`."""
    keys = key + gl.arange(0, KEYS, layout)
    seeing = gl.zeros([KEYS], gl.int32, layout)
    clean_row = 0
    if config.causal:
        seeing = keys - (problem.keys - problem.queries)
        clean_row = end - 1 - (problem.keys - problem.queries)
    # A key behind the end is seen by none.
    seeing = gl.where(keys < problem.keys, seeing, 1 << 30)
    clean_row = gl.where(end > problem.keys, 1 << 30, clean_row)
    # Opaque, for what the compiler makes of a condition that it knows not to change in the loop
    # over steps takes more registers than there are.
    return opaque(seeing), opaque(clean_row)
