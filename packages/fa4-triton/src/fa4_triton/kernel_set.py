"""The kernel set: what is served, and how a call becomes launches."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fa4_triton import interpreter
from fa4_triton.hopper import (
    SMALLEST_SCALE,
    Direction,
    Scale,
    asked_for,
    choose,
    plan_hopper_forward,
    situation_of,
    why_no_gluon,
    why_not_this_call,
)
from fa4_triton.hopper_backward import (
    KernelPlan,
    plan_hopper_backward,
    why_not_this_backward,
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
    sizes_of,
)
from fa4_triton.tiles import Kernel, Tile, architecture, key_gradient_kernels
from flash_attention_registry.sdpa import AttentionCall, Capabilities, count_kernel
from flash_attention_registry.sdpa.allocation import empty_like, empty_lse

__all__ = ["ASKED", "CAPABILITIES", "TritonKernels", "variants_of"]

ASKED = asked_for()
"""Which kernels the environment asks for; settled when this module is imported."""

_LOG2_E = math.log2(math.e)

CAPABILITIES = Capabilities(
    device_types=frozenset({"cpu"} if interpreter.INTERPRETED else {"cuda"}),
    dtypes=frozenset({torch.float16, torch.bfloat16}),
    head_dims=range(8, 257, 8),
    features=frozenset({"backward", "causal", "gqa", "varlen", "window"}),
    deterministic="on_request",
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
    return Variant(_KERNELS[kernel], tile, constants, dtype)


@cache
def _hopper_variant(config: Any, dtype: torch.dtype) -> Any:
    from fa4_triton.hopper_launch import HopperForward

    return HopperForward(config, dtype)


class _Forward(NamedTuple):
    """How calls of one kind are served.

    Attributes:
        variant: The compiled kernel.
        plan: How it is launched.
        scalars: The portable kernel's int arguments.
        counted: What `count_kernel` is told; None where there is no choice.
    """

    variant: Any
    plan: Any
    scalars: tuple[int, ...]
    counted: str | None

    def launch(
        self,
        device_index: int,
        tensors: tuple[Tensor | None, ...],
        pointers: list[int],
        scale: float,
        lse_of_empty_rows: float,
    ) -> None:
        """Launch with query, key, value, out, lse and the offsets of packed sequences, or None."""
        floats = (abs(scale) * _LOG2_E, lse_of_empty_rows, *self.scalars)
        self.variant.launch(device_index, self.plan, tensors, pointers, floats)
        if self.counted is not None:
            count_kernel(self.counted)


def _kind_of(scale: float) -> Scale:
    if scale > SMALLEST_SCALE:
        return "positive"
    return "negative" if scale < 0 else "small"


_looks: dict[tuple[object, ...], _Forward | str] = {}
"""What serves calls of `forward_heads_first`, or why not, by all that decides it."""

_MOST_LOOKS = 4096


@lru_cache(maxsize=4096)
def _forward_of(
    device_index: int,
    dtype: torch.dtype,
    request: Request,
    strides: tuple[Strides, ...],
    alignment: int,
    scale: Scale,
) -> _Forward:
    """The forward that serves a request: Hopper's own, or the portable one for a reason."""
    device = _device(device_index)
    counted = None
    if device.architecture == "hopper":
        situation = situation_of(
            request,
            device,
            "fp16" if dtype == torch.float16 else "bf16",
            "forward",
            triton=triton.__version__,
            gluon=why_no_gluon(),
            asked=ASKED,
        )
        choice = choose(situation)
        reason = choice.reason or why_not_this_call(request, strides, alignment, scale)
        if reason is None and ASKED != "hopper":
            reason = choice.why_too_small(request)
        if reason is None:
            from fa4_triton.hopper_launch import config_of

            tile = choice.tile(sizes_of(request).seq_len_q)
            plan = plan_hopper_forward(device, request, strides, tile)
            config = config_of(tile, plan.mask, plan.varlen, plan.tail)
            variant = _hopper_variant(config, dtype)
            return _Forward(variant, plan, (), "fa4-triton's Hopper forward")
        counted = f"fa4-triton's portable forward: {reason}"
    variant, programs, scalars = _launch_of(
        "forward", device_index, dtype, request, strides, alignment, scale == "negative"
    )
    return _Forward(variant, programs, scalars, counted)


_hopper_backward_variants: dict[Any, Any] = {}


def _hopper_backward_variant(kernel: KernelPlan, dtype: torch.dtype) -> Any:
    """The compiled kernel that serves a plan; plans with the same constants share it."""
    from fa4_triton.hopper_backward_launch import HopperBackwardVariant

    key = (kernel.kernel, kernel.constants, dtype)
    # Of two threads that come here at once both get the same one.
    return _hopper_backward_variants.setdefault(key, HopperBackwardVariant(kernel, dtype))


class _Backward(NamedTuple):
    """How the Hopper kernels serve a backward, or why they do not."""

    plan: Any
    variants: tuple[Any, ...]
    reason: str | None


@lru_cache(maxsize=4096)
def _backward_of(
    device_index: int,
    dtype: torch.dtype,
    request: Request,
    strides: tuple[Strides, ...],
    alignment: int,
    small_scale: bool,
    deterministic: bool,
) -> _Backward | None:
    """The Hopper backward of a request; None where there is no choice."""
    device = _device(device_index)
    if device.architecture != "hopper":
        return None
    situation = situation_of(
        request,
        device,
        "fp16" if dtype == torch.float16 else "bf16",
        "backward",
        triton=triton.__version__,
        gluon=why_no_gluon(),
        asked=ASKED,
        deterministic=deterministic,
    )
    choice = choose(situation)
    reason = choice.reason or why_not_this_backward(request, strides, alignment, small_scale)
    if reason is not None or choice.backward is None:
        return _Backward(None, (), reason)
    plan = plan_hopper_backward(device, request, strides, choice.backward)
    variants = tuple(_hopper_backward_variant(kernel, dtype) for kernel in plan.kernels)
    return _Backward(plan, variants, None)


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
    """Launch one kernel of `call`'s backward.

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
        False,
    )
    variant.launch(device_index, programs, tensors, pointers, floats + ints)


def _choose_backward(
    call: AttentionCall, operands: tuple[Tensor, ...], deterministic: bool
) -> _Backward | None:
    """The Hopper backward of `call`; None where there is no choice.

    Operands are query, key, value, grad_out, out and the three gradients.
    """
    return _backward_of(
        call.query.get_device(),
        call.query.dtype,
        request_of(call),
        tuple([tensor.stride() for tensor in operands]),
        _alignment([tensor.data_ptr() for tensor in operands]),
        not call.scale > SMALLEST_SCALE,
        deterministic,
    )


def variants_of(
    direction: Direction, device_index: int, dtype: torch.dtype, request: Request
) -> list[Any]:
    """The compiled kernels that a request takes, if all of its tensors are contiguous.

    Its scale is taken to be over `SMALLEST_SCALE`. Whether gradients are to repeat bit for bit is
    what torch is set to.
    """
    like_q, like_k = map(_contiguous, (request.query_shape, request.key_shape))
    if direction == "forward":
        strides = (like_q, like_k, like_k, like_q)
        return [_forward_of(device_index, dtype, request, strides, 0b1111, "positive").variant]
    eight = (*(like_q, like_k, like_k), *(like_q,) * 3, *(like_k,) * 2)
    deterministic = torch.are_deterministic_algorithms_enabled()
    chosen = _backward_of(device_index, dtype, request, eight, 0xFF, False, deterministic)
    if chosen is not None and chosen.reason is None:
        return list(chosen.variants)
    head_dim = request.query_shape[-1]
    arch = _device(device_index).architecture
    tensors: dict[Kernel, tuple[Strides, ...]] = {"dq": (like_q, like_k, like_k, *(like_q,) * 3)}
    for kernel in key_gradient_kernels(arch, head_dim):
        tensors[kernel] = (like_q, like_k, like_k, like_q, like_k, like_k)
    return [
        _launch_of(kernel, device_index, dtype, request, strides, 0b111111, False)[0]
        for kernel, strides in tensors.items()
    ]


def _contiguous(shape: tuple[int, ...]) -> Strides:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _alignment(pointers: list[int]) -> int:
    """Bit i: pointer i is a multiple of 16."""
    union = 0
    for pointer in pointers:
        union |= pointer
    if union % 16 == 0:
        return (1 << len(pointers)) - 1
    return sum(1 << bit for bit, pointer in enumerate(pointers) if pointer % 16 == 0)


def _reason_to_decline(call: AttentionCall) -> str | None:
    if call.out is not None and call.out.stride(-1) != 1:
        return "the last dimension of out is not contiguous"
    return CAPABILITIES.reason_to_decline(call)


def _forward_heads_first_of(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, scale: float, causal: bool
) -> _Forward | str:
    """What serves a call of `forward_heads_first`, whichever kernel set it comes to, or why not."""
    views = [tensor.transpose(1, 2) for tensor in (query, key, value, out)]
    call = AttentionCall(views[0], views[1], views[2], scale, causal, out=views[3])
    reason = _reason_to_decline(call)
    if reason is not None:
        return reason
    return _forward_of(
        query.get_device(),
        query.dtype,
        request_of(call),
        tuple([view.stride() for view in views]),
        _alignment([view.data_ptr() for view in views]),
        _kind_of(scale),
    )


class TritonKernels:
    """Attention in Triton, forward and backward: portable kernels, and Hopper's own in Gluon.

    Stateless: one instance serves every device and thread.
    """

    name = "fa4-triton"
    capabilities = CAPABILITIES

    def supports(self, call: AttentionCall) -> str | None:
        """None if `call` is served, else why not."""
        return _reason_to_decline(call)

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Attention of one call.

        Returns:
            out: Like `call.query`; `call.out` itself where that is given.
            lse: fp32, natural logarithm, [B, Hq, Sq], or [Hq, Tq] of packed sequences.
        """
        query, key, value = call.query, call.key, call.value
        out = empty_like(query) if call.out is None else call.out
        lse = empty_lse(query)
        tensors = (query, key, value, out, lse, call.cu_seqlens_query, call.cu_seqlens_key)
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        scale = call.scale
        chosen = _forward_of(
            query.get_device(),
            query.dtype,
            request_of(call),
            (query.stride(), key.stride(), value.stride(), out.stride()),
            _alignment(pointers[:4]),
            _kind_of(scale),
        )
        chosen.launch(query.get_device(), tensors, pointers, scale, call.lse_of_empty_rows)
        return out, lse

    def forward_heads_first(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        causal: bool,
        lse_of_empty_rows: float,
    ) -> str | None:
        """Attention of one dense call whose tensors are [B, H, S, D]; see `HeadsFirst`."""
        pointers = [query.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr()]
        device_index = query.get_device()
        look = (
            device_index,
            query.dtype,
            query.shape,
            key.shape,
            query.stride(),
            key.stride(),
            value.stride(),
            out.stride(),
            _alignment(pointers),
            _kind_of(scale),
            causal,
        )
        chosen = _looks.get(look)
        if chosen is None:
            chosen = _forward_heads_first_of(query, key, value, out, scale, causal)
            if len(_looks) >= _MOST_LOOKS:
                _looks.clear()
            _looks[look] = chosen
        if isinstance(chosen, str):
            return chosen
        pointers += (lse.data_ptr(), 0, 0)
        tensors = (query, key, value, out, lse, None, None)
        chosen.launch(device_index, tensors, pointers, scale, lse_of_empty_rows)
        return None

    def backward(
        self,
        call: AttentionCall,
        grad_out: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of one call.

        Args:
            call: As in the forward.
            grad_out: Like `call.query`.
            out: Like `call.query`, what the forward gave.
            lse: Contiguous fp32, what the forward gave.
            deterministic: Whether the gradients are to repeat bit for bit. They do as well under
                `torch.use_deterministic_algorithms(True)`, and everywhere but on Hopper.

        Returns:
            Gradients of query, key and value, each like its tensor.
        """
        query, key, value = call.query, call.key, call.value
        dq, dk, dv = empty_like(query), empty_like(key), empty_like(value)
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        grads = (dq, dk, dv)
        operands = (query, key, value, grad_out, out, *grads)
        chosen = _choose_backward(call, operands, deterministic)
        if chosen is not None and chosen.reason is None:
            from fa4_triton.hopper_backward_launch import launch_backward

            launch_backward(
                query.get_device(),
                chosen.plan,
                chosen.variants,
                (*operands[:5], lse, *grads),
                (call.scale, call.scale * _LOG2_E),
            )
            count_kernel("fa4-triton's Hopper backward")
            return grads
        delta = empty_lse(query)  # likewise a number a row
        scale = (call.scale,)
        _launch("dq", call, (query, key, value, grad_out, out, dq), (lse, delta), scale)
        architecture_class = _device(query.get_device()).architecture
        for kernel in key_gradient_kernels(architecture_class, query.shape[-1]):
            _launch(kernel, call, (query, key, value, grad_out, dk, dv), (lse, delta), scale)
        if chosen is not None:
            count_kernel(f"fa4-triton's portable backward: {chosen.reason}")
        return grads
