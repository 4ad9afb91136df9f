"""From a normalised call to a kernel set's result: the part that all ops share."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .call import AttentionCall
from .capabilities import KernelSet
from .checks import reason_of_backward, reason_of_dense
from .native import NativeKernels

__all__ = [
    "ActiveKernels",
    "in_layout_of",
    "pattern",
    "run_backward",
    "run_forward",
    "run_heads_first",
    "serve_bhsd",
    "serve_bhsd_backward",
]


Shortcut: TypeAlias = Callable[..., "str | None"]


class ActiveKernels:
    """An installed kernel set, its methods looked up once.

    Immutable after construction and replaced as a whole, so that a call that has read it from
    its slot is not touched by a switch in another thread.

    Attributes:
        forward_heads_first: The kernel set's shortcut (`HeadsFirst`), None if it has none that
            stands for its `supports` and `forward`.
        strict: Whether a call that is not served is an error.
        native: What takes calls before they come to a router, None if nothing does.
    """

    __slots__ = (
        "backward",
        "forward",
        "forward_heads_first",
        "kernel_set",
        "name",
        "native",
        "reason_against_backward",
        "strict",
        "supports",
    )

    def __init__(
        self, kernel_set: KernelSet, *, strict: bool, native: NativeKernels | None = None
    ) -> None:
        """Look up what the router calls."""
        self.kernel_set = kernel_set
        self.strict = strict
        self.native = native
        self.name = kernel_set.name
        self.supports = kernel_set.supports
        self.forward = kernel_set.forward
        self.backward = kernel_set.backward
        self.forward_heads_first = _shortcut_of(kernel_set)
        self.reason_against_backward = kernel_set.capabilities.reason_to_decline_backward


def _shortcut_of(kernel_set: KernelSet) -> Shortcut | None:
    """`forward_heads_first`, unless `supports` or `forward` was overridden past it.

    Nor is it taken where `__getattr__` finds it, in an object that a kernel set wraps.
    """
    shared = {"forward_heads_first", "supports", "forward"}
    try:
        own = object.__getattribute__(kernel_set, "__dict__")
    except AttributeError:  # slots; what a wrapped object has is not asked for
        own = {}
    for names in (own, *map(vars, type(kernel_set).__mro__)):
        if not shared.isdisjoint(names):
            # The first that defines any of the three: its methods hide those of all others.
            shortcut: Shortcut | None = getattr(kernel_set, "forward_heads_first", None)
            return shortcut if "forward_heads_first" in names else None
    return None


def run_forward(kernels: ActiveKernels, call: AttentionCall, target: Tensor) -> Tensor | str:
    """Run the forward of a valid call on its tensors' device.

    Args:
        kernels: The installed kernel set.
        call: A valid call whose `out` is `target`.
        target: Shaped like `call.query`.

    Returns:
        lse as `KernelSet.forward` returns it, with `target` written; or the reason to decline.
    """
    if target.stride()[-1] != 1:
        # The layout that torch would give this op's output (overlapping query rows).
        return "the last dimension of the output is not contiguous"
    reason = kernels.supports(call)
    if reason is not None:
        return _as_reason(reason, kernels, "supports")
    device_index = call.query.get_device()
    if device_index >= 0 and device_index != torch.cuda.current_device():
        with torch.cuda.device(device_index):
            out, lse = kernels.forward(call)
    else:
        out, lse = kernels.forward(call)
    if out is not target:
        target.copy_(out)
    return lse


def _as_reason(returned: object, kernels: ActiveKernels, method: str) -> str:
    """What a kernel set's method returned in place of None, if it is a reason to decline.

    Raises:
        TypeError: It is not. What was computed, for one, would pass for the op's result.
    """
    if isinstance(returned, str) and returned:
        return returned
    text = "an empty string" if returned == "" else f"a {type(returned).__name__}"
    raise TypeError(
        f"{kernels.name}.{method}() returned {text}; it returns None for a call that is served, "
        "else the reason why not, as text"
    )


def run_heads_first(shortcut: Shortcut, query: Tensor, *tensors_and_options: Any) -> str | None:
    """Run `HeadsFirst.forward_heads_first` on its tensors' device."""
    device_index = query.get_device()
    if device_index >= 0 and device_index != torch.cuda.current_device():
        with torch.cuda.device(device_index):
            return shortcut(query, *tensors_and_options)
    return shortcut(query, *tensors_and_options)


def run_backward(
    kernels: ActiveKernels, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor] | str:
    """Run the backward of a valid call on its tensors' device.

    Args:
        kernels: The installed kernel set.
        call: As in the forward.
        grad_out: Shaped like `call.query`, any strides.
        out: Shaped like `call.query`, any strides.
        lse: `[B, Hq, Sq]` or `[Hq, Tq]` float32, any strides.

    Returns:
        Gradients of query, key and value; or the reason to decline.
    """
    reason = kernels.reason_against_backward() or kernels.supports(call)
    if reason is not None:
        return _as_reason(reason, kernels, "supports")
    device_index = call.query.get_device()
    if device_index >= 0 and device_index != torch.cuda.current_device():
        with torch.cuda.device(device_index):
            return _run_backward(kernels, call, grad_out, out, lse)
    return _run_backward(kernels, call, grad_out, out, lse)


def _run_backward(
    kernels: ActiveKernels, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # out.sum().backward() arrives as an expanded scalar, a transposed loss with any strides.
    if grad_out.stride()[-1] != 1:
        grad_out = grad_out.contiguous()
    if out.stride()[-1] != 1:
        out = out.contiguous()
    return kernels.backward(call, grad_out, out, lse.contiguous())


def serve_bhsd(
    kernels: ActiveKernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    causal: bool,
    lse_of_empty_rows: float,
    attn_bias: Tensor | None = None,
    *,
    lse_column: bool = False,
) -> tuple[Tensor, Tensor] | str:
    """Serve a dense forward of an op that keeps heads before rows.

    Args:
        kernels: The installed kernel set.
        query: `[B, Hq, Sq, D]`.
        key: `[B, Hkv, Sk, D]`.
        value: `[B, Hkv, Sk, D]`.
        scale: As the op took it.
        causal: Bottom-right aligned.
        lse_of_empty_rows: The op's convention.
        attn_bias: Broadcastable to `[B, Hq, Sq, Sk]`.
        lse_column: Whether lse is to have a last dimension of 1.

    Returns:
        out `[B, Hq, Sq, D]` with the query's strides and lse `[B, Hq, Sq]` or `[B, Hq, Sq, 1]`, or
        the reason to decline.
    """
    reason = reason_of_dense(query, key, value, 1)
    if reason is not None:
        return reason
    out = torch.empty_like(query)
    factor = query.shape[3] ** -0.5 if scale is None else scale
    shortcut = kernels.forward_heads_first
    if shortcut is not None and attn_bias is None and out.stride()[3] == 1:
        batch, heads, rows, _ = query.shape
        shape = (batch, heads, rows, 1) if lse_column else (batch, heads, rows)
        lse = query.new_empty(shape, dtype=torch.float32)
        reason = run_heads_first(
            shortcut, query, key, value, out, lse, factor, causal, lse_of_empty_rows
        )
        if reason is None:
            return out, lse
        return _as_reason(reason, kernels, "forward_heads_first")
    target = out.transpose(1, 2)
    call = AttentionCall(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        factor,
        causal,
        out=target,
        lse_of_empty_rows=lse_of_empty_rows,
        attn_bias=attn_bias,
    )
    found = run_forward(kernels, call, target)
    if isinstance(found, str):
        return found
    return out, found.unsqueeze(-1) if lse_column else found


def serve_bhsd_backward(
    kernels: ActiveKernels,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float | None,
    causal: bool,
    lse_of_empty_rows: float,
    attn_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | str:
    """Serve a dense backward of an op that keeps heads before rows.

    Args:
        kernels: The installed kernel set.
        grad_out: `[B, Hq, Sq, D]`.
        query: `[B, Hq, Sq, D]`.
        key: `[B, Hkv, Sk, D]`.
        value: `[B, Hkv, Sk, D]`.
        out: `[B, Hq, Sq, D]`.
        lse: `[B, Hq, Sq]`.
        scale: As the op took it.
        causal: Bottom-right aligned.
        lse_of_empty_rows: The op's convention.
        attn_bias: Broadcastable to `[B, Hq, Sq, Sk]`.

    Returns:
        Gradients as the kernel set gave them, `[B, S, H, D]`, or the reason to decline.
    """
    reason = reason_of_dense(query, key, value, 1) or reason_of_backward(
        grad_out, query, out, lse, query.shape[:3]
    )
    if reason is not None:
        return reason
    call = AttentionCall(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        query.shape[3] ** -0.5 if scale is None else scale,
        causal,
        lse_of_empty_rows=lse_of_empty_rows,
        attn_bias=attn_bias,
    )
    return run_backward(kernels, call, grad_out.transpose(1, 2), out.transpose(1, 2), lse)


def in_layout_of(grad: Tensor, tensor: Tensor) -> Tensor:
    """`grad` with the strides that `torch.empty_like(tensor)` has.

    Compiled graphs assume these. Kernel sets that allocate with `empty_like` get `grad` itself
    back.

    Args:
        grad: Shaped like `tensor`.
        tensor: What the op took.
    """
    strides = _strides_of_empty_like(tensor.shape, tensor.stride())
    if grad.stride() == strides:
        return grad
    return torch.empty_strided(tensor.shape, strides, dtype=grad.dtype, device=grad.device).copy_(
        grad
    )


@lru_cache(maxsize=4096)
def _strides_of_empty_like(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    # A meta tensor has strides and no memory.
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


@lru_cache(maxsize=4096)
def pattern(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor without memory, to make others like it.

    It has memory for a moment, when it is first asked for. `torch.empty_like` takes the host about
    half the time of `torch.empty`.
    """
    tensor = torch.empty(shape, dtype=dtype, device=device)
    tensor.untyped_storage().resize_(0)
    return tensor
