"""Attention and its gradients by the formulas, at a stated precision.

One implementation serves both references: all arithmetic is float64, and a ``Precision`` says at
which points values are rounded to a narrower type. That keeps TF32 and the accumulation order of
a device's fp32 matrix product out of the reference: what tells one kernel precision from another
are the rounding points, not the noise of fp32 sums, which is 1e3 to 1e4 times smaller.

Formulas: FlashAttention (arXiv 2205.14135), section 2.2 for the forward pass, appendix B.2 and
algorithm 4 for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attention_testkit._problem import Problem

CHUNK_ELEMENTS = 2**24
"""Scores held at once, 128 MiB in float64; about eight such temporaries live in a backward."""


@dataclass(frozen=True, slots=True)
class Precision:
    """Where values are rounded on their way through attention.

    Attributes:
        storage: Type of P and dS as operands of a matrix product, and of out, dq, dk and dv;
            None leaves them in float64.
        accumulator: Type of the scores and of lse; None leaves them in float64.
        sum_error: Relative error of ``delta = sum(grad_out * out)``. A kernel takes delta and
            ``grad_out @ value`` as two fp32 sums in different orders; where a row sees one key
            only, their difference is exactly zero on paper and their rounding noise in a kernel.
        output_error: Relative error of every element of out in delta, the signs being random.
    """

    storage: torch.dtype | None = None
    accumulator: torch.dtype | None = None
    sum_error: float = 0.0
    output_error: float = 0.0

    def stored(self, values: Tensor) -> Tensor:
        """The values as a kernel keeps them between two matrix products, widened again."""
        return values if self.storage is None else values.to(self.storage).double()

    def accumulated(self, values: Tensor) -> Tensor:
        """The values as a kernel's accumulator holds them, widened again."""
        return values if self.accumulator is None else values.to(self.accumulator).double()


@dataclass(frozen=True, slots=True, eq=False)
class Buffers:
    """What attention writes; float64, packed ``[T, H, D]``, lse ``[H, T]``."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def attend(problem: Problem, precision: Precision) -> Buffers:
    """Attention over every sequence of a problem; gradients where it has a ``grad_out``.

    Rows without a visible key get out 0, lse -inf and gradients 0. Memory beyond inputs and
    results stays near a gigabyte whatever the lengths and the number of heads.
    """
    query, key, value = problem.query, problem.key, problem.value
    heads, kv_heads = query.shape[1], key.shape[1]
    wants_gradients = problem.grad_out is not None

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=query.device)

    buffers = Buffers(
        out=zeros(*query.shape[:2], value.shape[2]),
        lse=zeros(heads, query.shape[0]) - float("inf"),
        dq=zeros(*query.shape) if wants_gradients else zeros(0),
        dk=zeros(*key.shape) if wants_gradients else zeros(0),
        dv=zeros(*value.shape) if wants_gradients else zeros(0),
    )
    for query_rows, key_rows in problem.spans:
        query_length = query_rows.stop - query_rows.start
        key_length = key_rows.stop - key_rows.start
        if query_length and key_length:
            group = heads // kv_heads
            for kv_range, rows in _chunks(kv_heads, group, query_length, key_length):
                visible = problem.visible(rows, query_length, key_length)
                first = query_rows.start
                chunk = slice(first + rows.start, first + rows.stop)
                _attend_chunk(problem, precision, buffers, visible, chunk, key_rows, kv_range)
    return buffers


def _chunks(
    kv_heads: int, group: int, query_length: int, key_length: int
) -> Iterator[tuple[range, range]]:
    """Ranges of kv heads and of query rows whose scores fit ``CHUNK_ELEMENTS``."""
    row_step = min(query_length, max(1, CHUNK_ELEMENTS // (group * key_length)))
    head_step = max(1, CHUNK_ELEMENTS // (group * key_length * row_step))
    for head in range(0, kv_heads, head_step):
        for row in range(0, query_length, row_step):
            yield (
                range(head, min(head + head_step, kv_heads)),
                range(row, min(row + row_step, query_length)),
            )


def _attend_chunk(
    problem: Problem,
    precision: Precision,
    buffers: Buffers,
    visible: Tensor,
    query_rows: slice,
    key_rows: slice,
    kv_range: range,
) -> None:
    """Attention of some rows and kv heads of one sequence, written into the buffers."""
    group = problem.query.shape[1] // problem.key.shape[1]
    heads = slice(kv_range.start * group, kv_range.stop * group)
    kv_heads = slice(kv_range.start, kv_range.stop)
    query = _to_heads(problem.query[query_rows, heads], group)  # [Hkv, G, R, D]
    key = _to_heads(problem.key[key_rows, kv_heads], 1)  # [Hkv, 1, Sk, D]
    value = _to_heads(problem.value[key_rows, kv_heads], 1)  # [Hkv, 1, Sk, Dv]
    scores = precision.accumulated((query @ key.transpose(-1, -2)) * problem.scale)
    out, lse = _forward(scores, value, visible, precision)
    buffers.out[query_rows, heads] = _from_heads(out)
    buffers.lse[heads, query_rows] = lse.flatten(0, 1).squeeze(-1)
    if problem.grad_out is None:
        return
    grad_out = _to_heads(problem.grad_out[query_rows, heads], group)  # [Hkv, G, R, Dv]
    weights = torch.where(visible, (scores - lse).exp(), 0.0)  # P, normalised: [Hkv, G, R, Sk]
    del scores
    dv = visible_matmul(precision.stored(weights).mT, grad_out, visible.mT)
    delta = (grad_out * out).sum(-1, keepdim=True)  # [Hkv, G, R, 1]
    if precision.sum_error:
        delta += precision.sum_error * _norm(grad_out) * _norm(out)
    if precision.output_error:
        delta += precision.output_error * _norm(grad_out * out)
    grad_scores = weights * (grad_out @ value.transpose(-1, -2) - delta)  # dS: [Hkv, G, R, Sk]
    del weights
    grad_scores = precision.stored(torch.where(visible, grad_scores, 0.0))
    dq = visible_matmul(grad_scores, key, visible) * problem.scale
    dk = visible_matmul(grad_scores.mT, query, visible.mT) * problem.scale
    buffers.dq[query_rows, heads] = _from_heads(dq)
    # Each query head of a group, and each chunk of rows, adds its share to the shared head.
    buffers.dk[key_rows, kv_heads] += _from_heads(dk.sum(1, keepdim=True))
    buffers.dv[key_rows, kv_heads] += _from_heads(dv.sum(1, keepdim=True))


def _forward(
    scores: Tensor, value: Tensor, visible: Tensor, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Softmax over the visible scores ``[.., R, Sk]``: out ``[.., R, Dv]``, lse ``[.., R, 1]``."""
    seen = visible.any(-1, keepdim=True)  # [R, 1]
    scores = torch.where(visible, scores, float("-inf"))
    top = torch.where(seen, scores.amax(-1, keepdim=True), 0.0)
    # Selected again: a row whose top is NaN would otherwise carry it to keys it cannot see.
    weights = torch.where(visible, (scores - top).exp(), 0.0)  # P, the largest is 1
    total = torch.where(seen, weights.sum(-1, keepdim=True), 1.0)
    out = visible_matmul(precision.stored(weights), value, visible) / total
    lse = torch.where(seen, top + total.log(), float("-inf"))
    return precision.stored(out), precision.accumulated(lse)


def visible_matmul(weights: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """``weights @ values`` in which an unseen row of ``values`` has no part, be it Inf or NaN.

    A weight of zero does not do that: ``0 * NaN`` is NaN. Non-finite entries of ``values`` are
    therefore left out of the product and added to those rows alone that see them.

    Args:
        weights: ``[.., M, N]``, zero where not visible.
        values: ``[.., N, D]``.
        visible: bool ``[M, N]``.
    """
    finite = values.isfinite()
    product = weights @ torch.where(finite, values, 0.0)
    if finite.all():
        return product
    other = torch.where(finite, 0.0, values)
    rows = (~finite).any(-1).flatten(0, -2).any(0).nonzero().flatten().tolist()
    for row in rows:
        share = weights[..., row : row + 1] * other[..., row : row + 1, :]
        product = product + torch.where(visible[:, row : row + 1], share, 0.0)
    return product


def _norm(values: Tensor) -> Tensor:
    return values.square().sum(-1, keepdim=True).sqrt()


def _to_heads(rows: Tensor, group: int) -> Tensor:
    """``[T, Hkv * G, D]`` as float64 ``[Hkv, G, T, D]``."""
    length, heads, head_dim = rows.shape
    return rows.double().reshape(length, heads // group, group, head_dim).permute(1, 2, 0, 3)


def _from_heads(heads: Tensor) -> Tensor:
    """``[Hkv, G, T, D]`` as ``[T, Hkv * G, D]``."""
    return heads.permute(2, 0, 1, 3).flatten(1, 2)
