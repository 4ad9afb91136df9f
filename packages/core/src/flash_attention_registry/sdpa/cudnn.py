"""The cuDNN attention ops, which plain SDPA chooses on Hopper and newer.

Signatures follow the rules told in `flash.py`. What is special here: the caller may have asked
for cuDNN and nothing else, and a backward must be run by whom the forward was run, because
cuDNN's own backward and ours each rely on what their forward left.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import reason_of_options
from .serving import ActiveKernels, in_layout_of, pattern, serve_bhsd, serve_bhsd_backward

__all__ = ["LSE_OF_EMPTY_ROWS", "sdpa_cudnn", "sdpa_cudnn_backward"]

LSE_OF_EMPTY_ROWS = -math.inf
"""What lse reads for a row that sees no key, which without a bias no served call has."""

_flash_is_enabled: Callable[[], bool] = torch.backends.cuda.flash_sdp_enabled

# cuDNN aligns causal masks of unequal lengths top-left.
_CAUSAL_UNEQUAL = "causal attention of unequal lengths through cuDNN's op is not supported"


_MARK = 2
"""Where in its storage the seed of a served forward stands; cuDNN's stands at 0."""


def _marked_seed(device: torch.device) -> Tensor:
    """An int64 scalar that tells our forwards from cuDNN's: it does not start its storage.

    The offset survives where an attribute or a table of live tensors would not: autograd saves
    the tensor detached, compiled graphs return it from one graph into the next, CUDA graphs
    rebuild it from its metadata. It is 16 bytes because inductor asserts that alignment of every
    tensor a kernel returns.
    """
    return torch.empty_like(pattern((_MARK + 1,), torch.int64, device)).select(0, _MARK)


def sdpa_cudnn(
    kernels: ActiveKernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *extra: object,
    scale: float | None = None,
    **unknown: object,
) -> tuple[Tensor | int | None, ...] | str:
    """`aten::_scaled_dot_product_cudnn_attention`; tensors are `[B, H, S, D]`.

    lse is `[B, H, S, 1]` and given whether `compute_log_sumexp` asks for it or not.
    """
    if not _flash_is_enabled():
        return "flash attention is disabled, so the caller asked for cuDNN itself"
    if dropout_p or return_debug_mask or extra or unknown:
        reason = reason_of_options(dropout_p, return_debug_mask, extra, unknown)
        if reason is not None:
            return reason
    if is_causal and query.shape != key.shape and query.shape[-2:-1] != key.shape[-2:-1]:
        return _CAUSAL_UNEQUAL
    served = serve_bhsd(
        kernels,
        query,
        key,
        value,
        scale,
        is_causal,
        LSE_OF_EMPTY_ROWS,
        attn_bias,
        lse_column=True,
    )
    if isinstance(served, str):
        return served
    out, lse = served
    device = query.device
    offset = torch.empty_like(pattern((), torch.int64, device))
    rows, columns = query.shape[2], key.shape[2]
    return out, lse, None, None, rows, columns, _marked_seed(device), offset, None


def sdpa_cudnn_backward(
    kernels: ActiveKernels,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    attn_bias: Tensor | None,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *extra: object,
    scale: float | None = None,
    **unknown: object,
) -> tuple[Tensor, ...] | str:
    """`aten::_scaled_dot_product_cudnn_attention_backward`; tensors are `[B, H, S, D]`."""
    if philox_seed.storage_offset() != _MARK:
        return "forward was run by cuDNN"
    if dropout_p or extra or unknown:
        reason = reason_of_options(dropout_p, False, extra, unknown)
        if reason is not None:
            return reason
    if cum_seq_q is not None or cum_seq_k is not None:
        return "cum_seq_q and cum_seq_k of a dense backward are not supported"
    if logsumexp.dim() != 4 or logsumexp.shape[3] != 1:
        return "logsumexp is not what this op's forward returns"
    grads = serve_bhsd_backward(
        kernels,
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp.squeeze(3),
        scale,
        is_causal,
        LSE_OF_EMPTY_ROWS,
        attn_bias,
    )
    if isinstance(grads, str):
        return grads
    return (
        in_layout_of(grads[0].transpose(1, 2), query),
        in_layout_of(grads[1].transpose(1, 2), key),
        in_layout_of(grads[2].transpose(1, 2), value),
    )
