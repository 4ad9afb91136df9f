"""The kernel set: what is served, and how a call that comes through Python is launched.

Most calls do not come through here: `native` takes them in C++. What comes are direct calls, calls
that are declined, and calls that failed there, to fail again where it can be told.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

import torch

from fa4_cuda.library import ForwardArgs, ForwardPlan, TensorArg, error_text, load
from flash_attention_registry.sdpa import Capabilities

if TYPE_CHECKING:
    from torch import Tensor

    from flash_attention_registry.sdpa import AttentionCall

__all__ = ["CAPABILITIES", "CudaKernels", "empty_like", "empty_lse"]

CAPABILITIES = Capabilities(
    device_types=frozenset({"cuda"}),
    dtypes=frozenset({torch.float16, torch.bfloat16}),
    head_dims=range(8, 257, 8),
    features=frozenset({"causal", "gqa", "seqused_key", "varlen", "window"}),
    deterministic="always",
    min_compute_capability=(9, 0),
    max_compute_capability=(9, 0),
)
"""What the kernels serve: forward, on Hopper."""

_ELEMENTS = {torch.float16: 0, torch.bfloat16: 1}
_MOST = 2**31 - 1


class CudaKernels:
    """Attention in CUDA C++ for Hopper, forward.

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
        args.lse = lse.data_ptr()
        args.lse_stride_head = lse.stride(-2)
        args.lse_stride_batch = lse.stride(0)
        device = call.query.get_device()
        args.stream = torch.cuda.current_stream(device).cuda_stream
        plan = ForwardPlan()
        status = load().fa4_plan_forward(
            ctypes.byref(args), _multiprocessors(device), ctypes.byref(plan)
        )
        if not status:
            # The caching allocator keeps it from others until the stream is past the kernel.
            workspace = call.query.new_empty(plan.workspace_bytes, dtype=torch.uint8)
            args.workspace, args.workspace_bytes = workspace.data_ptr(), plan.workspace_bytes
            status = load().fa4_forward_with_plan(ctypes.byref(args), ctypes.byref(plan))
        if status:
            raise RuntimeError(f"fa4-cuda's forward kernel was not launched: {error_text(status)}")
        return out, lse

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Not called: `capabilities` names no backward, and torch's own kernel runs it.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("fa4-cuda has no backward kernels")


def empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised, shaped, typed and laid out like `tensor`, with a contiguous last dimension.

    `torch.empty_like` alone may order the dimensions of overlapping rows (`unfold`) otherwise.
    """
    made = torch.empty_like(tensor)
    return made if made.stride(-1) == 1 else tensor.new_empty(tensor.shape)


def empty_lse(query: Tensor) -> Tensor:
    """Uninitialised float32, one number a row: `[B, Hq, Sq]`, or `[Hq, Tq]` if packed."""
    shape = query.shape
    rows = (shape[0], shape[2], shape[1]) if len(shape) == 4 else (shape[1], shape[0])
    return query.new_empty(rows, dtype=torch.float32)


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tensor(tensor: Tensor) -> TensorArg:
    *batch, rows, heads, _ = tensor.stride()
    return TensorArg(tensor.data_ptr(), batch[0] if batch else 0, rows, heads)


def _window(bound: int | None) -> int:
    return -1 if bound is None or bound > _MOST else bound


def _describe(call: AttentionCall, out: Tensor) -> ForwardArgs:
    """The sizes, strides and options of a call; what has to be allocated is left empty."""
    query, key = call.query, call.key
    cu_seqlens_query, cu_seqlens_key = call.cu_seqlens_query, call.cu_seqlens_key
    args = ForwardArgs(
        q=_tensor(query),
        k=_tensor(key),
        v=_tensor(call.value),
        out=_tensor(out),
        element=_ELEMENTS[query.dtype],
        heads_q=query.shape[-2],
        heads_k=key.shape[-2],
        head_dim=query.shape[-1],
        total_q=query.shape[-3],
        total_k=key.shape[-3],
        causal=call.causal,
        window_left=_window(call.window_left),
        window_right=_window(call.window_right),
        scale=call.scale,
        empty_lse=call.lse_of_empty_rows,
    )
    if cu_seqlens_query is None or cu_seqlens_key is None:
        args.batch, args.seq_q, args.seq_k = query.shape[0], query.shape[1], key.shape[1]
    else:
        args.batch = cu_seqlens_query.shape[0] - 1
        args.seq_q, args.seq_k = call.max_seqlen_query, call.max_seqlen_key
        args.cu_seqlens_q = cu_seqlens_query.data_ptr()
        args.cu_seqlens_k = cu_seqlens_key.data_ptr()
    if call.seqused_key is not None:
        args.seqused_k = call.seqused_key.data_ptr()
    return args
