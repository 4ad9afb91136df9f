"""The kernel set: what is served, and how a call becomes launches."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from flash_attention_registry.sdpa import Capabilities

from fa4_triton import interpreter
from fa4_triton.kernels.backward import dkdv_kernel, dq_kernel
from fa4_triton.kernels.forward import forward_kernel
from fa4_triton.launch import Constants, Variant, variant
from fa4_triton.operands import Operands, Sizes, sizes
from fa4_triton.tiles import Tile, architecture, head_dim_blocks, key_gradient_kernels, tile

if TYPE_CHECKING:
    from flash_attention_registry.sdpa import AttentionCall
    from torch import Tensor

__all__ = ["CAPABILITIES", "TritonKernels"]

LOG2_E = math.log2(math.e)

CAPABILITIES = Capabilities(
    device_types=frozenset({"cpu"} if interpreter.INTERPRETED else {"cuda"}),
    dtypes=frozenset({torch.float16, torch.bfloat16}),
    head_dims=range(8, 257, 8),
    features=frozenset({"backward", "causal", "gqa", "varlen", "window"}),
    deterministic="always",
    min_compute_capability=None if interpreter.INTERPRETED else (8, 0),
)
"""What the portable kernels serve."""


class _Device:
    """What the plans need to know of a device; index -1 is the CPU."""

    __slots__ = ("architecture", "index", "l2_bytes")

    def __init__(self, index: int) -> None:
        self.index = index
        if index < 0:
            self.architecture = architecture(None)
            self.l2_bytes = 1 << 25
        else:
            properties = torch.cuda.get_device_properties(index)
            self.architecture = architecture((properties.major, properties.minor))
            self.l2_bytes = properties.L2_cache_size


_device = cache(_Device)


def _section(heads: int, sharing: int, head_bytes: int, device: _Device) -> int:
    """How many of `heads` to run side by side.

    Every `sharing` of them read the same `head_bytes` again and again; what is read at a time should stay within half
    the L2 cache (the other half is for what streams through).
    """
    return min(heads, sharing * max(1, device.l2_bytes // 2 // max(1, head_bytes)))


def _constants(
    size: Sizes, operands: Operands, *, negative_scale: bool = False, mha: bool = False, dk: bool = False, dv: bool = False
) -> Constants:
    return Constants(
        *head_dim_blocks(size.head_dim),
        size.head_dim,
        size.left is not None,
        size.right is not None,
        size.varlen,
        negative_scale,
        mha,
        dk,
        dv,
        operands.unit,
        operands.wide,
        operands.alignment,
    )


def _row_stats(size: Sizes, query: Tensor) -> Tensor:
    """Uninitialised fp32 for one number a row: [B, Hq, Sq], or [Hq, Tq] of packed sequences."""
    shape = (size.heads, query.shape[0]) if size.varlen else (size.batch, size.heads, size.seq_len_q)
    return torch.empty(shape, dtype=torch.float32, device=query.device)


class TritonKernels:
    """Attention in portable Triton, forward and backward. Stateless: one instance serves every device and thread."""

    name = "fa4-triton"
    capabilities = CAPABILITIES

    def supports(self, call: AttentionCall) -> str | None:
        """None if `call` is served, else why not."""
        return CAPABILITIES.reason_to_decline(call)

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Out like `call.query` and lse, fp32 natural log, [B, Hq, Sq] or [Hq, Tq]."""
        query = call.query
        size = sizes(call)
        out = torch.empty_like(query) if call.out is None else call.out
        lse = _row_stats(size, query)
        device = _device(query.get_device())
        shape = tile(device.architecture, "forward", size.head_dim)
        operands = Operands(
            (query, call.key, call.value, out), max(shape.m, shape.n)
        )
        constants = _constants(size, operands, negative_scale=call.scale < 0)
        blocks = -(-size.seq_len_q // shape.m)
        heads_total = size.batch * size.heads
        group = size.heads // size.heads_kv
        variant(forward_kernel, shape, query.dtype, constants).launch(
            device.index,
            blocks * heads_total,
            (query, call.key, call.value, out, lse, call.cu_seqlens_query, call.cu_seqlens_key),
            (
                abs(call.scale) * LOG2_E,
                call.lse_of_empty_rows,
                *operands.strides,
                *_lse_strides(lse),
                size.heads,
                group,
                heads_total,
                size.seq_len_q,
                size.seq_len_k,
                size.left or 0,
                size.right or 0,
                blocks,
                _section(heads_total, group, size.seq_len_k * size.head_dim * 4, device),
            ),
        )
        return out, lse

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, each like its tensor; the same bits every time."""
        query, key, value = call.query, call.key, call.value
        size = sizes(call)
        device = _device(query.get_device())
        delta = _row_stats(size, query)
        grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        _launch_dq(call, size, device, grad_out, out, lse, delta, grads[0])
        for kernel in key_gradient_kernels(device.architecture, size.head_dim):
            _launch_dkdv(call, size, device, grad_out, lse, delta, grads[1], grads[2], kernel)
        return grads


def _lse_strides(lse: Tensor) -> tuple[int, int]:
    """Elements between batches and heads of [B, H, S] or [H, T]."""
    stride = lse.stride()
    return (stride[0], stride[1]) if len(stride) == 3 else (0, stride[0])


def _launch_dq(
    call: AttentionCall, size: Sizes, device: _Device, grad_out: Tensor, out: Tensor, lse: Tensor, delta: Tensor, dq: Tensor
) -> None:
    query, key, value = call.query, call.key, call.value
    shape = tile(device.architecture, "dq", size.head_dim)
    operands = Operands(
        (query, key, value, grad_out, out, dq), max(shape.m, shape.n)
    )
    constants = _constants(size, operands)
    blocks = -(-size.seq_len_q // shape.m)
    heads_total = size.batch * size.heads
    group = size.heads // size.heads_kv
    variant(dq_kernel, shape, query.dtype, constants).launch(
        device.index,
        blocks * heads_total,
        (query, key, value, grad_out, out, dq, lse, delta, call.cu_seqlens_query, call.cu_seqlens_key),
        (
            call.scale,
            *operands.strides,
            *_lse_strides(lse),
            size.heads,
            group,
            heads_total,
            size.seq_len_q,
            size.seq_len_k,
            size.left or 0,
            size.right or 0,
            blocks,
            _section(heads_total, group, size.seq_len_k * size.head_dim * 4, device),
        ),
    )


def _launch_dkdv(
    call: AttentionCall, size: Sizes, device: _Device, grad_out: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor, kernel: Any
) -> None:
    query, key, value = call.query, call.key, call.value
    shape = tile(device.architecture, kernel, size.head_dim)
    operands = Operands(
        (query, key, value, grad_out, dk, dv), max(shape.m, shape.n)
    )
    group = size.heads // size.heads_kv
    constants = _constants(size, operands, mha=group == 1, dk=kernel != "dv", dv=kernel != "dk")
    blocks = -(-size.seq_len_k // shape.n)
    heads_total = size.batch * size.heads_kv
    variant(dkdv_kernel, shape, query.dtype, constants).launch(
        device.index,
        blocks * heads_total,
        (query, key, value, grad_out, dk, dv, lse, delta, call.cu_seqlens_query, call.cu_seqlens_key),
        (
            call.scale,
            *operands.strides,
            *_lse_strides(lse),
            size.heads_kv,
            group,
            heads_total,
            size.seq_len_q,
            size.seq_len_k,
            size.left or 0,
            size.right or 0,
            blocks,
            _section(heads_total, 1, size.seq_len_q * size.head_dim * 4 * group, device),
        ),
    )
