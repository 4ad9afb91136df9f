"""The kernels as an operator of their own, `fa4_cuda::attention`.

An operator is opaque to `torch.compile`, so that a graph which calls it does not break, and carries
its own shapes (`register_fake`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fa4_cuda.kernel_set import CudaKernels, empty_like, empty_lse
from flash_attention_registry.sdpa import AttentionCall
from flash_attention_registry.sdpa.direct import not_served

__all__ = ["attention"]

_kernels = CudaKernels()


@torch.library.custom_op("fa4_cuda::attention", mutates_args=())
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
) -> tuple[Tensor, Tensor]:
    """Attention of one call whose arguments are those of `AttentionCall`.

    Returns:
        out: Like `query`; 0 in rows that see no key.
        lse: float32 `[B, Hq, Sq]`, or `[Hq, Tq]` of packed sequences; -inf in such rows.

    Raises:
        NotImplementedError: The kernels do not serve the call.
    """
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
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query), empty_lse(query).fill_(-math.inf)
    with torch.cuda.device_of(query):
        return _kernels.forward(call)


@attention.register_fake
def _(query: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_like(query), empty_lse(query)


def _refuse_gradients(*_: object) -> None:
    raise not_served(_kernels.name, "gradients are not supported")


attention.register_autograd(_refuse_gradients)
