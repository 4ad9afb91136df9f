"""The kernel set: what is served, and how a call that comes through Python is launched.

Most calls do not come through here: `native` takes them in C++. What comes are direct calls, calls
that are declined, and calls that failed there, to fail again where it can be told.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from fa4_cuda.library import (
    BackwardArgs,
    BackwardPlan,
    ForwardArgs,
    ForwardPlan,
    TensorArg,
    error_text,
    load,
)
from flash_attention_registry.sdpa import Capabilities
from flash_attention_registry.sdpa.allocation import empty_like, empty_lse
from flash_attention_registry.sdpa.direct import not_served

if TYPE_CHECKING:
    from torch import Tensor

    from flash_attention_registry.sdpa import AttentionCall

__all__ = ["CAPABILITIES", "CudaKernels"]

CAPABILITIES = Capabilities(
    device_types=frozenset({"cuda"}),
    dtypes=frozenset({torch.float16, torch.bfloat16}),
    head_dims=range(8, 257, 8),
    features=frozenset({"backward", "causal", "gqa", "seqused_key", "varlen", "window"}),
    deterministic="on_request",
    min_compute_capability=(9, 0),
    max_compute_capability=(9, 0),
)
"""What the kernels serve, on Hopper."""

_ELEMENTS = {torch.float16: 0, torch.bfloat16: 1}
_MOST = 2**31 - 1


class CudaKernels:
    """Attention in CUDA C++ for Hopper, forward and backward.

    Stateless: one instance serves every device and thread.
    """

    name = "fa4-cuda"
    capabilities = CAPABILITIES

    def supports(self, call: AttentionCall) -> str | None:
        """None if `call` is served, else why not."""
        reason = CAPABILITIES.reason_to_decline(call)
        if reason is not None:
            return reason
        if call.out is not None and call.out.stride(-1) != 1:
            return "the last dimension of out is not contiguous"
        if max(*call.query.shape, *call.key.shape) > _MOST:
            return "a dimension of 2^31 or more is not supported"
        # The size decides nothing: any number of multiprocessors will do, and any pointer.
        args = _describe(call, call.query if call.out is None else call.out)
        args.lse = args.q.data
        status = load().fa4_plan_forward(ctypes.byref(args), 1, ctypes.byref(ForwardPlan()))
        return error_text(status) if status else None

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Attention of one call, on the current stream of the current device.

        Returns:
            out: Like `call.query`; `call.out` itself where that is given.
            lse: float32, natural logarithm, `[B, Hq, Sq]`, or `[Hq, Tq]` of packed sequences.

        Raises:
            RuntimeError: The launch failed.
        """
        out = empty_like(call.query) if call.out is None else call.out
        lse = empty_lse(call.query)
        args = _describe(call, out)
        _point_to_lse(args, lse)
        _launch("forward", args, ForwardPlan(), call.query)
        return out, lse

    def backward(
        self,
        call: AttentionCall,
        grad_out: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of one call, whoever ran its forward, on the current stream.

        The workspace is two float32 numbers a row and, up to head dim 128, one float32 gradient of
        the query, in whole tiles. Keys that are shared by a group of query heads need no more.

        Args:
            call: As in the forward.
            grad_out: Like `call.query`; copied if the kernels cannot read its strides.
            out: Like `call.query`, what the forward gave; likewise.
            lse: Contiguous float32, what the forward gave; infinite, of either sign, in rows that
                see no key.
            deterministic: Whether the gradients are to repeat bit for bit. They do as well under
                `torch.use_deterministic_algorithms(True)`.

        Returns:
            Gradients of query, key and value, each like its tensor.

        Raises:
            NotImplementedError: `call` has `seqused_key`, which torch's backward ops do not know.
            RuntimeError: The launch failed.
        """
        if call.seqused_key is not None:
            reason = "gradients of a call with seqused_key are not supported"
            raise not_served(self.name, reason)
        grad_out, out = _readable(grad_out), _readable(out)
        grads = empty_like(call.query), empty_like(call.key), empty_like(call.value)
        args = BackwardArgs(
            out=_tensor(out),
            grad_out=_tensor(grad_out),
            dq=_tensor(grads[0]),
            dk=_tensor(grads[1]),
            dv=_tensor(grads[2]),
            deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
            **_request(call),
        )
        _point_to_lse(args, lse)
        _launch("backward", args, BackwardPlan(), call.query)
        return grads


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    direction: str,
    args: ForwardArgs | BackwardArgs,
    plan: ForwardPlan | BackwardPlan,
    query: Tensor,
) -> None:
    """Plan a call that is described but for stream and workspace, and launch it.

    Raises:
        RuntimeError: It was not launched.
    """
    device = query.get_device()
    args.stream = torch.cuda.current_stream(device).cuda_stream
    make_plan = getattr(load(), f"fa4_plan_{direction}")
    status = make_plan(ctypes.byref(args), _multiprocessors(device), ctypes.byref(plan))
    if not status:
        # The caching allocator keeps it from others until the stream is past the kernel.
        workspace = query.new_empty(plan.workspace_bytes, dtype=torch.uint8)
        args.workspace, args.workspace_bytes = workspace.data_ptr(), plan.workspace_bytes
        launch = getattr(load(), f"fa4_{direction}_with_plan")
        status = launch(ctypes.byref(args), ctypes.byref(plan))
    if status:
        raise RuntimeError(f"fa4-cuda's {direction} kernel was not launched: {error_text(status)}")


def _readable(tensor: Tensor) -> Tensor:
    """`tensor`, copied unless its address and strides are what the copy engine takes.

    Those are multiples of 16 bytes, zero too, over a contiguous last dimension: the gradient of a
    sum has one number for all.
    """
    *strides, last = tensor.stride()
    aligned = tensor.data_ptr() % 16 == 0 and all(
        size <= 1 or stride % 8 == 0 for size, stride in zip(tensor.shape, strides, strict=False)
    )
    return tensor if last == 1 and aligned else tensor.clone(memory_format=torch.contiguous_format)


def _point_to_lse(args: ForwardArgs | BackwardArgs, lse: Tensor) -> None:
    args.lse = lse.data_ptr()
    args.lse_stride_head = lse.stride(-2)
    args.lse_stride_batch = lse.stride(0)


def _tensor(tensor: Tensor) -> TensorArg:
    *batch, rows, heads, _ = tensor.stride()
    return TensorArg(tensor.data_ptr(), batch[0] if batch else 0, rows, heads)


def _window(bound: int | None) -> int:
    return -1 if bound is None or bound > _MOST else bound


def _describe(call: AttentionCall, out: Tensor) -> ForwardArgs:
    """A forward; what has to be allocated is left empty."""
    return ForwardArgs(out=_tensor(out), empty_lse=call.lse_of_empty_rows, **_request(call))


def _request(call: AttentionCall) -> dict[str, Any]:
    """The sizes, strides and options of a call, which both directions have under one name."""
    query, key = call.query, call.key
    cu_seqlens_query, cu_seqlens_key = call.cu_seqlens_query, call.cu_seqlens_key
    sizes: dict[str, Any]
    if cu_seqlens_query is None or cu_seqlens_key is None:
        sizes = {"batch": query.shape[0], "seq_q": query.shape[1], "seq_k": key.shape[1]}
    else:
        sizes = {
            "batch": cu_seqlens_query.shape[0] - 1,
            "seq_q": call.max_seqlen_query,
            "seq_k": call.max_seqlen_key,
            "cu_seqlens_q": cu_seqlens_query.data_ptr(),
            "cu_seqlens_k": cu_seqlens_key.data_ptr(),
        }
    if call.seqused_key is not None:
        sizes["seqused_k"] = call.seqused_key.data_ptr()
    return {
        "q": _tensor(query),
        "k": _tensor(key),
        "v": _tensor(call.value),
        "element": _ELEMENTS[query.dtype],
        "heads_q": query.shape[-2],
        "heads_k": key.shape[-2],
        "head_dim": query.shape[-1],
        "total_q": query.shape[-3],
        "total_k": key.shape[-3],
        "causal": call.causal,
        "window_left": _window(call.window_left),
        "window_right": _window(call.window_right),
        "scale": call.scale,
        **sizes,
    }
