"""What attention should return: exactly, and as exactly as a kernel of a given precision can.

``reference_sdpa`` is the truth in float64. ``faithful_sdpa`` rounds where a good kernel has to
round, so that its distance from the truth tells how far from it a correct kernel may be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from flash_attention_testkit._attention import Precision, attend
from flash_attention_testkit._problem import Problem, pack

if TYPE_CHECKING:
    from typing_extensions import Unpack  # torch depends on it; typing has it from Python 3.11 on

EXACT = Precision()

FP32_SUM_ERROR = 4 * torch.finfo(torch.float32).eps
"""Error of an fp32 dot product, relative to the product of the norms: a few units in the last
place. Far below what rounding to fp16 or bf16 does, it counts only where all else cancels."""


@dataclass(frozen=True, slots=True, eq=False)
class SdpaResult:
    """What one attention call returned, or should have returned.

    Attributes:
        out: ``[B, S, Hq, Dv]``, or ``[T, Hq, Dv]`` for packed sequences.
        lse: Natural logarithm of the softmax's denominator: ``[B, Hq, S]``, or ``[Hq, T]`` for
            packed sequences. None where an implementation does not return it.
        dq: Gradient of query, in its shape; None where no gradients were asked for.
        dk: Gradient of key, in its shape; likewise.
        dv: Gradient of value, in its shape; likewise.
    """

    out: Tensor
    lse: Tensor | None = None
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


class AttentionOptions(TypedDict, total=False):
    """The keyword arguments that say which attention is meant; see ``reference_sdpa``."""

    causal: bool
    window_left: int | None
    window_right: int | None
    scale: float | None
    cu_seqlens_query: Tensor | None
    cu_seqlens_key: Tensor | None


def reference_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grad_out: Tensor | None = None,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    scale: float | None = None,
    cu_seqlens_query: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
) -> SdpaResult:
    """Scaled dot-product attention, its log-sum-exp and its gradients in float64.

    Key j is visible to query i if ``i + Sk - Sq - window_left <= j <= i + Sk - Sq +
    window_right``; ``causal`` makes ``window_right`` 0. The last query thus stands at the last key
    (bottom-right alignment). A row without a visible key has out 0, lse -inf and gradients 0.
    Inf and NaN in a key or value reach the rows that see it and no other.

    The gradients follow the formulas of FlashAttention (arXiv 2205.14135, algorithm 4), not
    autograd. Works on the device of the inputs, in chunks: temporaries stay near a gigabyte.

    Args:
        query: ``[B, Sq, Hq, D]``, or ``[Tq, Hq, D]`` with ``cu_seqlens``; any floating dtype.
        key: ``[B, Sk, Hkv, D]`` or ``[Tk, Hkv, D]``; Hq is a multiple of Hkv.
        value: ``[B, Sk, Hkv, Dv]`` or ``[Tk, Hkv, Dv]``.
        grad_out: Gradient of out, in its shape. Without it no gradients are computed.
        causal: Hide the keys after the diagonal.
        window_left: Keys visible before the diagonal; None or -1 for all.
        window_right: Keys visible after the diagonal; None or -1 for all.
        scale: Factor of the scores, of any sign or zero; None for ``D ** -0.5``.
        cu_seqlens_query: Integer ``[sequences + 1]`` offsets of the packed queries, from 0 to Tq;
            sequences may be empty.
        cu_seqlens_key: The same for keys and values.

    Returns:
        Everything in float64; dq, dk and dv are None without ``grad_out``.

    Raises:
        ValueError: Shapes, devices, offsets or windows do not fit together.
    """
    problem = pack(
        query,
        key,
        value,
        grad_out,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        scale=scale,
        cu_seqlens_query=cu_seqlens_query,
        cu_seqlens_key=cu_seqlens_key,
    )
    return solve(problem, EXACT)


def faithful_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grad_out: Tensor | None = None,
    **options: Unpack[AttentionOptions],
) -> SdpaResult:
    """Attention rounded where a kernel with inputs of this dtype rounds, and nowhere else.

    Scores and softmax are fp32; P (unnormalised, its largest entry 1) is rounded to the inputs'
    dtype before it meets V, the sum is divided in fp32 and rounded once more as the output. The
    backward pass recomputes P from the scores and the fp32 lse, takes delta from the rounded
    output, and rounds P before dV and dS before dQ and dK; groups of heads are summed in fp32.

    Between the rounding points the arithmetic is float64, so the result is the same on every
    device and no TF32 setting touches it.

    Args:
        query: Layouts as for ``reference_sdpa``; its dtype is the precision.
        key: In query's dtype.
        value: In query's dtype.
        grad_out: In query's dtype.
        **options: Masking, scale and packing, as for ``reference_sdpa``.

    Returns:
        out, dq, dk and dv in the inputs' dtype, lse in float32.

    Raises:
        ValueError: As ``reference_sdpa``, and where the dtypes differ.
    """
    for name, tensor in (("key", key), ("value", value), ("grad_out", grad_out)):
        if tensor is not None and tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} and query {query.dtype}; a kernel's precision is that "
                "of its inputs, so give them one dtype"
            )
    problem = pack(query, key, value, grad_out, **options)
    return solve(problem, Precision(query.dtype, torch.float32, FP32_SUM_ERROR))


def solve(problem: Problem, precision: Precision) -> SdpaResult:
    """Attention at any precision, in the layout and shapes that the problem came in."""
    with torch.no_grad():
        buffers = attend(problem, precision)
    storage = precision.storage or torch.float64
    query_shape, key_shape, value_shape = problem.shapes
    out = buffers.out.reshape(*query_shape[:-1], value_shape[-1])
    lse = buffers.lse.to(precision.accumulator or torch.float64)
    if len(query_shape) == 4:  # [H, B * S] -> [B, H, S]
        lse = lse.reshape(query_shape[2], *query_shape[:2]).transpose(0, 1).contiguous()
    if problem.grad_out is None:
        return SdpaResult(out.to(storage), lse)
    return SdpaResult(
        out.to(storage),
        lse,
        dq=buffers.dq.reshape(query_shape).to(storage),
        dk=buffers.dk.reshape(key_shape).to(storage),
        dv=buffers.dv.reshape(value_shape).to(storage),
    )
