"""The kernels as operators of their own, `fa4_triton::attention` and its backward.

An operator is opaque to `torch.compile`, so that a graph which calls it does not break, and carries
its own shapes (`register_fake`) and derivative (`register_autograd`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fa4_triton import interpreter
from fa4_triton.kernel_set import TritonKernels, empty_like, empty_row_stats
from flash_attention_registry.sdpa import AttentionCall
from flash_attention_registry.sdpa.direct import not_served, with_unit_stride

__all__ = ["attention", "attention_backward"]

interpreter.repair()

_kernels = TritonKernels()


@torch.library.custom_op("fa4_triton::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_query: Tensor | None,
    cu_seqlens_key: Tensor | None,
    max_seqlen_query: int,
    max_seqlen_key: int,
    scale: float,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of one call whose arguments are those of `AttentionCall`.

    `deterministic` says whether its gradients are to repeat bit for bit; its results do anyway.

    Returns:
        out: Like `query`; 0 in rows that see no key.
        lse: float32 `[B, Hq, Sq]`, or `[Hq, Tq]` of packed sequences; -inf in such rows.

    Raises:
        NotImplementedError: The kernels do not serve the call.
    """
    call = _served_call(
        query,
        key,
        value,
        cu_seqlens_query,
        cu_seqlens_key,
        max_seqlen_query,
        max_seqlen_key,
        scale,
        causal,
        window_left,
        window_right,
    )
    if _is_empty(call):
        return torch.zeros_like(query), empty_row_stats(query).fill_(-math.inf)
    with torch.cuda.device_of(query):
        return _kernels.forward(call)


@torch.library.custom_op("fa4_triton::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_query: Tensor | None,
    cu_seqlens_key: Tensor | None,
    max_seqlen_query: int,
    max_seqlen_key: int,
    scale: float,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each like its tensor, from what `attention` returned."""
    call = _served_call(
        query,
        key,
        value,
        cu_seqlens_query,
        cu_seqlens_key,
        max_seqlen_query,
        max_seqlen_key,
        scale,
        causal,
        window_left,
        window_right,
    )
    if _is_empty(call):
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    with torch.cuda.device_of(query):
        grad_out, out = with_unit_stride(grad_out), with_unit_stride(out)
        return _kernels.backward(call, grad_out, out, lse, deterministic)


def _served_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_query: Tensor | None,
    cu_seqlens_key: Tensor | None,
    max_seqlen_query: int,
    max_seqlen_key: int,
    scale: float,
    causal: bool,
    window_left: int | None,
    window_right: int | None,
) -> AttentionCall:
    call = AttentionCall(
        query,
        key,
        value,
        scale,
        causal,
        window_left,
        window_right,
        cu_seqlens_query,
        cu_seqlens_key,
        max_seqlen_query,
        max_seqlen_key,
    )
    reason = _kernels.supports(call)
    if reason is not None:
        raise not_served(_kernels.name, reason)
    return call


def _is_empty(call: AttentionCall) -> bool:
    """Whether there is nothing to launch for."""
    return call.query.numel() == 0 or call.key.numel() == 0


@attention.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_like(query), empty_row_stats(query)


@attention_backward.register_fake
def _(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object
) -> tuple[Tensor, ...]:
    return empty_like(query), empty_like(key), empty_like(value)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens_query, cu_seqlens_key, *options = inputs
    out, lse = output
    ctx.save_for_backward(query, key, value, out, lse, cu_seqlens_query, cu_seqlens_key)
    ctx.options = options
    # lse is for reading: its derivative is not computed, and must not pass for zero.
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, cu_seqlens_query, cu_seqlens_key = ctx.saved_tensors
    grads = attention_backward(grad_out, *tensors, cu_seqlens_query, cu_seqlens_key, *ctx.options)
    return (*grads, *[None] * (2 + len(ctx.options)))


attention.register_autograd(_differentiate, setup_context=_save_for_backward)
