"""The CPU flash-attention ops.

Signatures follow the rules told in `flash.py`. What is special here: causal masks of unequal
lengths are aligned at the first row and key (top-left), lse keeps heads innermost, gradients are
laid out as `[B, S, H, D]`, and a fully masked row has lse 0 (all measured on torch 2.13).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import reason_of_options
from .serving import ActiveKernels, serve_bhsd, serve_bhsd_backward

__all__ = ["LSE_OF_EMPTY_ROWS", "sdpa_cpu", "sdpa_cpu_backward"]

LSE_OF_EMPTY_ROWS = 0.0
"""What torch's CPU kernel writes for a row whose keys are all masked."""


def _reason_of_call(query: Tensor, key: Tensor, is_causal: bool) -> str | None:
    if query.dtype is torch.float64:
        return "torch.float64 has a float64 logsumexp in this op, which is not supported"
    if is_causal and query.shape[-2:-1] != key.shape[-2:-1]:
        return "causal attention of unequal lengths is top-left aligned here: not supported"
    return None


def sdpa_cpu(
    kernels: ActiveKernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *extra: object,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    **unknown: object,
) -> tuple[Tensor, ...] | str:
    """`aten::_scaled_dot_product_flash_attention_for_cpu`; tensors are `[B, H, S, D]`."""
    reason = reason_of_options(dropout_p, False, extra, unknown) or _reason_of_call(
        query, key, is_causal
    )
    if reason is not None:
        return reason
    served = serve_bhsd(kernels, query, key, value, scale, is_causal, LSE_OF_EMPTY_ROWS, attn_mask)
    if isinstance(served, str):
        return served
    out, lse = served
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


def sdpa_cpu_backward(
    kernels: ActiveKernels,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *extra: object,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    **unknown: object,
) -> tuple[Tensor, ...] | str:
    """`aten::_scaled_dot_product_flash_attention_for_cpu_backward`, on `[B, H, S, D]`."""
    reason = reason_of_options(dropout_p, False, extra, unknown) or _reason_of_call(
        query, key, is_causal
    )
    if reason is not None:
        return reason
    grads = serve_bhsd_backward(
        kernels,
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        scale,
        is_causal,
        LSE_OF_EMPTY_ROWS,
        attn_mask,
    )
    if isinstance(grads, str):
        return grads
    return tuple(grad.contiguous().transpose(1, 2) for grad in grads)
