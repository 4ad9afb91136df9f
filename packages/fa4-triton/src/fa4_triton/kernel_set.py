"""The kernel set: what is served, and how a call becomes launches."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton

from fa4_triton import interpreter
from fa4_triton.hopper import (
    SMALLEST_SCALE,
    HopperPlan,
    choose,
    plan_hopper_forward,
    situation_of,
    why_no_gluon,
    why_not_this_call,
)
from fa4_triton.kernels.backward import dkdv_kernel, dq_kernel
from fa4_triton.kernels.forward import forward_kernel
from fa4_triton.launch import Variant
from fa4_triton.plan import (
    Constants,
    Device,
    Request,
    Strides,
    plan_key_gradients,
    plan_queries,
    request_of,
)
from fa4_triton.tiles import Kernel, Tile, architecture, key_gradient_kernels
from flash_attention_registry.sdpa import Capabilities, count_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from flash_attention_registry.sdpa import AttentionCall

__all__ = ["CAPABILITIES", "TritonKernels", "empty_like", "empty_row_stats"]

_LOG2_E = math.log2(math.e)

CAPABILITIES = Capabilities(
    device_types=frozenset({"cpu"} if interpreter.INTERPRETED else {"cuda"}),
    dtypes=frozenset({torch.float16, torch.bfloat16}),
    head_dims=range(8, 257, 8),
    features=frozenset({"backward", "causal", "gqa", "varlen", "window"}),
    deterministic="always",
    min_compute_capability=None if interpreter.INTERPRETED else (8, 0),
)
"""What the kernels serve."""

_KERNELS: dict[Kernel, Any] = {
    "forward": forward_kernel,
    "dq": dq_kernel,
    "dkdv": dkdv_kernel,
    "dk": dkdv_kernel,
    "dv": dkdv_kernel,
}


@cache
def _device(index: int) -> Device:
    """What plans need to know of a CUDA device; of the CPU for -1."""
    if index < 0:
        return Device(architecture(None), l2_bytes=1 << 25, multiprocessors=1)
    properties = torch.cuda.get_device_properties(index)
    return Device(
        architecture((properties.major, properties.minor)),
        properties.L2_cache_size,
        properties.multi_processor_count,
    )


@cache
def _variant(kernel: Kernel, tile: Tile, constants: Constants, dtype: torch.dtype) -> Variant:
    del dtype  # part of what is compiled, which Triton reads off the tensors
    return Variant(_KERNELS[kernel], tile, constants)


@cache
def _hopper_variant(config: Any, dtype: torch.dtype) -> Any:
    from fa4_triton.hopper_launch import HopperForward

    del dtype  # part of what is compiled, which Triton reads off the tensors
    return HopperForward(config)


@lru_cache(maxsize=4096)
def _hopper_forward_of(
    device_index: int,
    dtype: torch.dtype,
    request: Request,
    strides: tuple[Strides, ...],
    alignment: int,
    small_scale: bool,
) -> tuple[Any, HopperPlan] | str:
    """(compiled kernel, plan) of the Hopper forward, or why the portable one serves."""
    device = _device(device_index)
    situation = situation_of(
        request,
        device,
        "fp16" if dtype == torch.float16 else "bf16",
        "forward",
        triton=triton.__version__,
        gluon=why_no_gluon() if device.architecture == "hopper" else None,
    )
    choice = choose(situation)
    reason = choice.reason or why_not_this_call(request, strides, alignment, small_scale)
    if reason is not None:
        return reason
    from fa4_triton.hopper_launch import config_of

    tile = choice.tile(request.query_shape[1])
    plan = plan_hopper_forward(device, request, strides, tile)
    return _hopper_variant(config_of(tile, plan.causal, plan.tail), dtype), plan


@lru_cache(maxsize=4096)
def _launch_of(
    kernel: Kernel,
    device_index: int,
    dtype: torch.dtype,
    request: Request,
    strides: tuple[Strides, ...],
    alignment: int,
    negative_scale: bool,
) -> tuple[Variant, int, tuple[int, ...]]:
    """(variant, programs, int arguments) of a kernel. Bounded: sequence lengths are part of it."""
    device = _device(device_index)
    if kernel in ("forward", "dq"):
        plan = plan_queries(kernel, device, request, strides, alignment, negative_scale)
    else:
        plan = plan_key_gradients(kernel, device, request, strides, alignment)
    return _variant(kernel, plan.tile, plan.constants, dtype), plan.programs, plan.scalars


def _launch(
    kernel: Kernel,
    call: AttentionCall,
    operands: tuple[Tensor, ...],
    stats: tuple[Tensor, ...],
    floats: tuple[float, ...],
) -> None:
    """Launch one kernel of `call`.

    Args:
        kernel: Which.
        call: What.
        operands: Its [B, S, H, D] or [T, H, D] tensors in its order, query and key first.
        stats: lse and the like.
        floats: Its float arguments.
    """
    tensors = (*operands, *stats, call.cu_seqlens_query, call.cu_seqlens_key)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    device_index = call.query.get_device()
    variant, programs, ints = _launch_of(
        kernel,
        device_index,
        call.query.dtype,
        request_of(call),
        tuple([tensor.stride() for tensor in operands]),
        _alignment(pointers[: len(operands)]),
        kernel == "forward" and call.scale < 0,
    )
    variant.launch(device_index, programs, tensors, pointers, floats + ints)


def _launch_hopper_forward(
    call: AttentionCall, operands: tuple[Tensor, ...], lse: Tensor, floats: tuple[float, ...]
) -> bool:
    """Launch the Hopper forward of `call` if it is chosen; whether it was."""
    device_index = call.query.get_device()
    if _device(device_index).architecture != "hopper":
        return False
    pointers = [tensor.data_ptr() for tensor in operands]
    chosen = _hopper_forward_of(
        device_index,
        call.query.dtype,
        request_of(call),
        tuple([tensor.stride() for tensor in operands]),
        _alignment(pointers),
        not call.scale > SMALLEST_SCALE,
    )
    if isinstance(chosen, str):
        count_kernel(f"fa4-triton's portable forward: {chosen}")
        return False
    count_kernel("fa4-triton's Hopper forward")
    variant, plan = chosen
    pointers.append(lse.data_ptr())
    variant.launch(device_index, plan, (*operands, lse), pointers, floats)
    return True


def _alignment(pointers: list[int]) -> int:
    """Bit i: pointer i is a multiple of 16."""
    union = 0
    for pointer in pointers:
        union |= pointer
    if union % 16 == 0:
        return (1 << len(pointers)) - 1
    return sum(1 << bit for bit, pointer in enumerate(pointers) if pointer % 16 == 0)


def empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised, shaped, typed and laid out like `tensor`, with a contiguous last dimension.

    `torch.empty_like` alone may order the dimensions of overlapping rows (`unfold`) otherwise.
    """
    made = torch.empty_like(tensor)
    return made if made.stride(-1) == 1 else tensor.new_empty(tensor.shape)


def empty_row_stats(query: Tensor) -> Tensor:
    """Uninitialised fp32, one number a row: [B, Hq, Sq], or [Hq, Tq] of packed sequences."""
    shape = query.shape
    stats = (shape[0], shape[2], shape[1]) if len(shape) == 4 else (shape[1], shape[0])
    return query.new_empty(stats, dtype=torch.float32)


class TritonKernels:
    """Attention in Triton, forward and backward: portable kernels, and Hopper's own in Gluon.

    Stateless: one instance serves every device and thread.
    """

    name = "fa4-triton"
    capabilities = CAPABILITIES

    def supports(self, call: AttentionCall) -> str | None:
        """None if `call` is served, else why not."""
        if call.out is not None and call.out.stride(-1) != 1:
            return "the last dimension of out is not contiguous"
        return CAPABILITIES.reason_to_decline(call)

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Attention of one call.

        Returns:
            out: Like `call.query`; `call.out` itself where that is given.
            lse: fp32, natural logarithm, [B, Hq, Sq], or [Hq, Tq] of packed sequences.
        """
        out = empty_like(call.query) if call.out is None else call.out
        lse = empty_row_stats(call.query)
        operands = (call.query, call.key, call.value, out)
        floats = (abs(call.scale) * _LOG2_E, call.lse_of_empty_rows)
        if not _launch_hopper_forward(call, operands, lse, floats):
            _launch("forward", call, operands, (lse,), floats)
        return out, lse

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of one call; the same bits every time.

        Args:
            call: As in the forward.
            grad_out: Like `call.query`.
            out: Like `call.query`, what the forward gave.
            lse: Contiguous fp32, what the forward gave.

        Returns:
            Gradients of query, key and value, each like its tensor.
        """
        query, key, value = call.query, call.key, call.value
        dq, dk, dv = empty_like(query), empty_like(key), empty_like(value)
        delta = empty_row_stats(query)
        scale = (call.scale,)
        _launch("dq", call, (query, key, value, grad_out, out, dq), (lse, delta), scale)
        architecture_class = _device(query.get_device()).architecture
        for kernel in key_gradient_kernels(architecture_class, query.shape[-1]):
            _launch(kernel, call, (query, key, value, grad_out, dk, dv), (lse, delta), scale)
        return dq, dk, dv
