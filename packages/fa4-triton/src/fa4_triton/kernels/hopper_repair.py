"""The Hopper forward's repair of rows that an Inf or NaN in a value they do not see has spoilt.

A matrix product multiplies every row by every key of a block, and 0 * Inf is NaN. Nothing short of
reading all of V can tell before, and it happens to nobody without Inf or NaN in V: so a tile whose
output holds a NaN is looked at again, slowly, before it leaves shared memory. Operands come from
global memory straight into the registers of small synchronous products, so that the main loop pays
neither registers nor shared memory for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from fa4_triton.kernels.hopper import ROWS

KEYS = gl.constexpr(16)
COLUMNS = gl.constexpr(32)
PANEL = gl.constexpr(64)  # columns that a swizzled row of 128 bytes holds
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, PRODUCT.value, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, PRODUCT.value, 2))


class Source(NamedTuple):
    """One operand in global memory."""

    pointer: Any
    stride_row: Any  # elements, int64


TABLE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def make_table(tensors, descs):
    """Addresses and strides of tensors in shared memory, [4 each, 1] int64.

    There they cost the main loop no registers, as arguments of a warp group would.
    """
    COUNT: gl.constexpr = len(tensors)
    table = gl.allocate_shared_memory(gl.int64, [4 * COUNT, 1], TABLE)
    for i in gl.static_range(COUNT):
        address = tensors[i].to(gl.int64)
        table.index(4 * i).store(gl.full([1], 0, gl.int64, _ONE) + address)
        for dim in gl.static_range(3):
            stride = descs[i].strides[dim]
            table.index(4 * i + 1 + dim).store(gl.full([1], 0, gl.int64, _ONE) + stride)
    return table


@gluon.jit
def _entry(table, index):
    return gl.max(table.index(index).load(_ONE), 0)


@gluon.jit
def source_in(table, NUMBER: gl.constexpr, batch, head, row, dtype: gl.constexpr):
    """Tensor NUMBER of a table from row `row` of one head on."""
    stride_row = _entry(table, 4 * NUMBER + 3)
    start = batch * _entry(table, 4 * NUMBER + 1) + head * _entry(table, 4 * NUMBER + 2)
    pointer = _entry(table, 4 * NUMBER).to(gl.pointer_type(dtype), bitcast=True)
    return Source(pointer + (start + row * stride_row), stride_row)


@gluon.jit
def _indices(COUNT: gl.constexpr, layout: gl.constexpr):
    """0 ... COUNT - 1, made anew where it is used.

    As a plain `arange` it would be computed before the loop over tiles, and live in registers there
    that the main loop has not got.
    """
    indices = gl.arange(0, COUNT, layout)
    return gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [indices], gl.int32, False, 1)


@gluon.jit
def _load(source, rows, columns, row_end, column_end):
    """Elements at `rows` and `columns`, index tensors that come expanded; zero past the ends."""
    inside = (rows < row_end) & (columns < column_end)
    return gl.load(source.pointer + rows.to(gl.int64) * source.stride_row + columns, inside, 0.0)


@gluon.jit
def _finite(v):
    return gl.abs(v.to(gl.float32)) < float("inf")


@gluon.jit
def _values(v, key, first_column, keys_end, head_dim):
    """[KEYS, COLUMNS] of V, the right operand."""
    keys = gl.expand_dims(key + _indices(KEYS, gl.SliceLayout(1, RIGHT)), 1)
    columns = _indices(COLUMNS, gl.SliceLayout(0, RIGHT))
    return _load(v, keys, gl.expand_dims(first_column + columns, 0), keys_end, head_dim)


@gluon.jit
def _scores(q, k, row, key, rows_end, keys_end, head_dim):
    """[ROWS, KEYS] fp32: Q K^T."""
    s = gl.zeros([ROWS, KEYS], gl.float32, PRODUCT)
    rows = gl.expand_dims(row + _indices(ROWS, gl.SliceLayout(1, LEFT)), 1)
    keys = gl.expand_dims(key + _indices(KEYS, gl.SliceLayout(0, RIGHT)), 0)
    left_columns = _indices(COLUMNS, gl.SliceLayout(0, LEFT))
    right_columns = _indices(COLUMNS, gl.SliceLayout(1, RIGHT))
    for column in range(0, head_dim, COLUMNS):
        q_part = _load(q, rows, gl.expand_dims(column + left_columns, 0), rows_end, head_dim)
        k_part = _load(k, keys, gl.expand_dims(column + right_columns, 1), keys_end, head_dim)
        s = mma_v2(q_part, k_part, s)
    return s


@gluon.jit
def _seen(rows, keys, diagonal, problem, config: gl.constexpr):
    """Which of `keys` [1, KEYS] each of `rows` [ROWS] sees, both counted from a block's corner.

    Row 0 stands at key `diagonal`. Keys past the last, which are read as zero, count as seen.
    """
    if config.causal:
        seen = keys <= gl.expand_dims(rows + diagonal, 1)
    elif config.window:
        seen = keys <= gl.expand_dims(rows + (diagonal + problem.right), 1)
        seen = seen & (keys >= gl.expand_dims(rows + (diagonal - problem.left), 1))
    else:
        seen = keys >= gl.expand_dims(rows * 0, 1)
    return seen


@gluon.jit
def repair(
    out,
    q,
    k,
    v,
    lse_log2,
    row,
    sequence,
    problem,
    head_dim,
    D: gl.constexpr,
    config: gl.constexpr,
):
    """Put right what unseen values made NaN in `out`.

    First mark the elements that do see something not finite: they stand. If a NaN is left, multiply
    what is finite.

    Args:
        out: [ROWS, D] in shared memory, normalised.
        q: `Source` at row 0 of the sequence and head, as are k and v.
        k: See q.
        v: See q.
        lse_log2: [ROWS] fp32 by rows of `PRODUCT`; finite.
        row: Of the first row of `out`.
        sequence: `Sequence`.
        problem: `Problem`.
        head_dim: Columns in use.
        D: Columns of `out`.
        config: How rows are masked.
    """
    shift = sequence.keys - sequence.queries
    left_rows = _indices(ROWS, gl.SliceLayout(1, LEFT))
    left_keys = gl.expand_dims(_indices(KEYS, gl.SliceLayout(0, LEFT)), 0)
    rows = _indices(ROWS, gl.SliceLayout(1, PRODUCT))
    keys = gl.expand_dims(_indices(KEYS, gl.SliceLayout(0, PRODUCT)), 0)
    begin = 0
    end = sequence.keys
    if config.causal:
        end = gl.minimum(row + ROWS + shift, end)
    if config.window:
        begin = gl.maximum(row + shift - problem.left, 0) // KEYS * KEYS
        end = gl.minimum(row + ROWS + shift + problem.right, end)
    for part in gl.static_range(D // COLUMNS):
        block = out.slice(part * COLUMNS, COLUMNS, 1)
        marks = gl.zeros([ROWS, COLUMNS], gl.float32, PRODUCT)
        for key in range(begin, end, KEYS):
            seen = _seen(left_rows, left_keys, row + shift - key, problem, config)
            values = _values(v, key, part * COLUMNS, sequence.keys, head_dim)
            infinite = gl.where(_finite(values), 0.0, 1.0).to(out.dtype)
            marks = mma_v2(gl.where(seen, 1.0, 0.0).to(out.dtype), infinite, marks)
        stored = block.load(PRODUCT)
        wrong = (stored != stored) & (marks == 0.0)
        if gl.max(gl.max(wrong.to(gl.int32), 1), 0) > 0:
            acc = gl.zeros([ROWS, COLUMNS], gl.float32, PRODUCT)
            for key in range(begin, end, KEYS):
                s = (
                    _scores(q, k, row, key, sequence.queries, sequence.keys, head_dim)
                    * problem.scale_log2
                )
                seen = _seen(rows, keys, row + shift - key, problem, config)
                s = gl.where(seen, s, float("-inf")) - gl.expand_dims(lse_log2, 1)
                # Keys past the last have a score of zero: exp2 of it may be Inf, and Inf * 0 NaN.
                p = gl.exp2(gl.minimum(s, 0.0)).to(out.dtype)
                values = _values(v, key, part * COLUMNS, sequence.keys, head_dim)
                values = gl.where(_finite(values), values.to(gl.float32), 0.0).to(out.dtype)
                acc = mma_v2(gl.convert_layout(p, LEFT), values, acc)
            block.store(gl.where(wrong, acc, stored.to(gl.float32)).to(out.dtype))


@gluon.jit
def store_rows(block, out, row, rows_end, head_dim, D: gl.constexpr):
    """Write `block` [ROWS, D] in shared memory to `out` from row `row` on, up to `rows_end`.

    TMA knows where a tensor ends, and not where a sequence in it does.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    rows = gl.expand_dims(row + _indices(ROWS, gl.SliceLayout(1, layout)), 1)
    columns = _indices(COLUMNS, gl.SliceLayout(0, layout))
    for part in gl.static_range(D // COLUMNS):
        values = block.slice(part * COLUMNS, COLUMNS, 1).load(layout)
        at = gl.expand_dims(part * COLUMNS + columns, 0)
        inside = (rows < rows_end) & (at < head_dim)
        gl.store(out.pointer + rows.to(gl.int64) * out.stride_row + at, values, inside)
