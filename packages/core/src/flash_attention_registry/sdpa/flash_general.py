"""The general CUDA flash-attention ops, dense or packed, with windows.

`torch.nn.attention.varlen` and nested tensors call these directly, stock's SDPA pair from inside.
Signatures follow the rules told in `flash.py`.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from .call import AttentionCall
from .checks import (
    normalised_window,
    reason_of_backward,
    reason_of_dense,
    reason_of_options,
    reason_of_packed,
    reason_of_seqused,
)
from .flash import LSE_OF_EMPTY_ROWS, unused_outputs
from .serving import ActiveKernels, in_layout_of, run_backward, run_forward

__all__ = ["flash_backward", "flash_forward", "flash_forward_no_dropout_inplace"]

_LeadingFields: TypeAlias = tuple[
    Tensor,
    Tensor,
    Tensor,
    float,
    bool,
    int | None,
    int | None,
    Tensor | None,
    Tensor | None,
    int,
    int,
]
"""The fields of an `AttentionCall` up to `max_seqlen_key`."""


def _leading_fields(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float | None,
    window_size_left: int | None,
    window_size_right: int | None,
    paged: bool,
) -> _LeadingFields | str:
    """What forward and backward calls share, or the reason to decline."""
    packed = cum_seq_q is not None or cum_seq_k is not None
    if packed:
        reason = reason_of_packed(query, key, value, cum_seq_q, cum_seq_k, paged)
    else:
        reason = reason_of_dense(query, key, value, 2)
    if reason is not None:
        return reason
    left: int | None = None
    right: int | None = None
    if window_size_left is not None or window_size_right is not None:
        seq_lens = (max_q, max_k) if packed else (query.shape[1], key.shape[1])
        is_causal, left, right = normalised_window(
            is_causal, window_size_left, window_size_right, *seq_lens
        )
    if not packed:
        max_q = max_k = 0
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return query, key, value, factor, is_causal, left, right, cum_seq_q, cum_seq_k, max_q, max_k


def _serve_forward(
    kernels: ActiveKernels,
    out: Tensor | None,
    fields: _LeadingFields | str,
    seqused_k: Tensor | None,
    alibi_slopes: Tensor | None,
    block_table: Tensor | None,
    num_splits: int | None,
) -> tuple[Tensor, Tensor] | str:
    """Serve a forward into `out`, or into a new tensor with the query's strides.

    Returns:
        out and lse, or the reason to decline.
    """
    if isinstance(fields, str):
        return fields
    query = fields[0]
    if seqused_k is not None:
        reason = reason_of_seqused(query, seqused_k, cu_seqlens_key=fields[8])
        if reason is not None:
            return reason
    if out is None:
        out = torch.empty_like(query)
    elif (
        out.shape != query.shape
        or out.dtype is not query.dtype
        or out.get_device() != query.get_device()
    ):
        return "out differs from query in shape, dtype or device"
    call = AttentionCall(
        *fields,
        out=out,
        lse_of_empty_rows=LSE_OF_EMPTY_ROWS,
        alibi_slopes=alibi_slopes,
        seqused_key=seqused_k,
        block_table=block_table,
        num_splits=num_splits,
    )
    lse = run_forward(kernels, call, out)
    return lse if isinstance(lse, str) else (out, lse)


def flash_forward(
    kernels: ActiveKernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *extra: object,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    **unknown: object,
) -> tuple[Tensor, ...] | str:
    """`aten::_flash_attention_forward`; tensors are `[B, S, H, D]` or packed `[T, H, D]`."""
    if dropout_p or return_debug_mask or extra or unknown:
        reason = reason_of_options(dropout_p, return_debug_mask, extra, unknown)
        if reason is not None:
            return reason
    fields = _leading_fields(
        *(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, scale),
        *(window_size_left, window_size_right, block_table is not None),
    )
    served = _serve_forward(kernels, None, fields, seqused_k, alibi_slopes, block_table, num_splits)
    return served if isinstance(served, str) else (*served, *unused_outputs(query))


def flash_forward_no_dropout_inplace(
    kernels: ActiveKernels,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *extra: object,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    **unknown: object,
) -> Tensor | str:
    """`aten::_flash_attention_forward_no_dropout_inplace`: writes `out`, returns lse alone."""
    if dropout_p or return_debug_mask or extra or unknown:
        reason = reason_of_options(dropout_p, return_debug_mask, extra, unknown)
        if reason is not None:
            return reason
    fields = _leading_fields(
        *(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, scale),
        *(window_size_left, window_size_right, block_table is not None),
    )
    served = _serve_forward(kernels, out, fields, seqused_k, alibi_slopes, block_table, num_splits)
    return served if isinstance(served, str) else served[1]


def flash_backward(
    kernels: ActiveKernels,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *extra: object,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **unknown: object,
) -> tuple[Tensor, ...] | str:
    """`aten::_flash_attention_backward`; tensors are `[B, S, H, D]` or packed `[T, H, D]`."""
    if dropout_p or extra or unknown:
        reason = reason_of_options(dropout_p, False, extra, unknown)
        if reason is not None:
            return reason
    fields = _leading_fields(
        *(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, is_causal, scale),
        *(window_size_left, window_size_right, False),
    )
    if isinstance(fields, str):
        return fields
    # lse: [H, T] of packed sequences, [B, H, S] of dense ones
    *batch, rows, heads, _ = query.shape
    reason = reason_of_backward(grad_out, query, out, logsumexp, (*batch, heads, rows))
    if reason is not None:
        return reason
    call = AttentionCall(*fields, lse_of_empty_rows=LSE_OF_EMPTY_ROWS)
    grads = run_backward(kernels, call, grad_out, out, logsumexp)
    if isinstance(grads, str):
        return grads
    return (
        in_layout_of(grads[0], query),
        in_layout_of(grads[1], key),
        in_layout_of(grads[2], value),
    )
