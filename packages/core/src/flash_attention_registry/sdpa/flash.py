"""The CUDA flash-attention pair of SDPA: its arguments in, its results out.

Each adapter has its op's schema as its signature (argument names, order and defaults: the
dispatcher drops trailing arguments that equal the schema's default), after the kernel set, and
returns the op's results or the reason to decline. `*extra` and `**unknown` catch what a newer
schema may add; arguments that older schemas lack are keywords with the default None.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import reason_of_options
from .serving import ActiveKernels, in_layout_of, pattern, serve_bhsd, serve_bhsd_backward

__all__ = ["LSE_OF_EMPTY_ROWS", "sdpa_flash", "sdpa_flash_backward", "unused_outputs"]

LSE_OF_EMPTY_ROWS = math.inf
"""What torch's flash kernels write for a row that sees no key."""

# The random state that dropout would need, as torch's meta functions declare it: on AMD a pair of
# int64 scalars, elsewhere uint64 of two elements and of none.
_RNG_SHAPE: tuple[int, ...] = () if torch.version.hip else (2,)
_RNG_DTYPE = torch.int64 if torch.version.hip else torch.uint64


def unused_outputs(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Random state, its second part and the debug mask of a forward without dropout.

    Allocated in every call although nothing reads them: a CUDA graph cannot hold memory from
    outside its pool, and an output that two calls share is an alias that autograd and compiled
    graphs are not told of.
    """
    device = query.device
    return (
        torch.empty_like(pattern(_RNG_SHAPE, _RNG_DTYPE, device)),
        torch.empty_like(pattern((), _RNG_DTYPE, device)),
        torch.empty_like(pattern((0,), query.dtype, device)),
    )


def sdpa_flash(
    kernels: ActiveKernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *extra: object,
    scale: float | None = None,
    **unknown: object,
) -> tuple[Tensor | int | None, ...] | str:
    """`aten::_scaled_dot_product_flash_attention`; tensors are `[B, H, S, D]`."""
    if dropout_p or return_debug_mask or extra or unknown:
        reason = reason_of_options(dropout_p, return_debug_mask, extra, unknown)
        if reason is not None:
            return reason
    served = serve_bhsd(kernels, query, key, value, scale, is_causal, LSE_OF_EMPTY_ROWS)
    if isinstance(served, str):
        return served
    out, lse = served
    return out, lse, None, None, query.shape[2], key.shape[2], *unused_outputs(query)


def sdpa_flash_backward(
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
    philox_seed: Tensor,
    philox_offset: Tensor,
    *extra: object,
    scale: float | None = None,
    **unknown: object,
) -> tuple[Tensor, ...] | str:
    """`aten::_scaled_dot_product_flash_attention_backward`; tensors are `[B, H, S, D]`."""
    if dropout_p or extra or unknown:
        reason = reason_of_options(dropout_p, False, extra, unknown)
        if reason is not None:
            return reason
    if cum_seq_q is not None or cum_seq_k is not None:
        return "cum_seq_q and cum_seq_k of a dense backward are not supported"
    grads = serve_bhsd_backward(
        kernels, grad_out, query, key, value, out, logsumexp, scale, is_causal, LSE_OF_EMPTY_ROWS
    )
    if isinstance(grads, str):
        return grads
    return (
        in_layout_of(grads[0].transpose(1, 2), query),
        in_layout_of(grads[1].transpose(1, 2), key),
        in_layout_of(grads[2].transpose(1, 2), value),
    )
