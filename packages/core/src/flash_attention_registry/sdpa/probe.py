"""Where typical calls of attention would go: which backend torch chooses, which kernel runs.

Nothing is computed. Whether a call would be served is found out by giving it to its op's adapter
with kernels that decline everything, the served calls too: every check is made, no kernel runs, and
nothing is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from flash_attention_registry.default import current_flash_attention_impl
from flash_attention_registry.doctor.findings import TypicalCall
from flash_attention_registry.errors import describe

from . import router
from .capabilities import KernelSet
from .ops import ROUTED_OPS
from .serving import ActiveKernels
from .torch_internals import chosen_backend

__all__ = [
    "CAUSAL",
    "NOT_ROUTED",
    "CallKind",
    "active_on",
    "backend_of",
    "default_device_type",
    "plain_torch",
    "query_of",
    "typical_calls",
]

NOT_ROUTED = "does not use flash_attention_registry.sdpa, which therefore cannot tell"
"""Said of an implementation that installs its kernels by its own means."""

_SHAPE = (1, 4, 128, 64)  # [B, H, S, D]
_SERVED = "would be served"


@dataclass(frozen=True, slots=True)
class CallKind:
    """One kind of call.

    Attributes:
        name: What is special about it.
        dtype: Of query, key and value.
        causal: Whether it is causal.
        masked: Whether it has an attention mask.
        dropout_p: As in training.
    """

    name: str
    dtype: torch.dtype = torch.bfloat16
    causal: bool = False
    masked: bool = False
    dropout_p: float = 0.0


CAUSAL = CallKind("bfloat16, causal", causal=True)
"""The call that flash kernels are made for."""

_KINDS = (
    CAUSAL,
    CallKind("bfloat16 with a mask", masked=True),
    CallKind("float32, causal", dtype=torch.float32, causal=True),
    CallKind("bfloat16 with dropout, in training", dropout_p=0.1, causal=True),
)


def typical_calls() -> tuple[TypicalCall, ...]:
    """Return where calls of each kind would go on the GPU, or on the CPU if there is none."""
    return tuple(_typical_call(kind, default_device_type()) for kind in _KINDS)


def _typical_call(kind: CallKind, device_type: str) -> TypicalCall:
    try:
        with plain_torch(device_type):
            query, mask = query_of(kind, device_type), _mask(kind, device_type)
            backend = backend_of(kind, query, mask)
            kernel, reason = _kernel(kind, query, mask, backend)
    except (Exception, SystemExit) as error:  # such as a GPU without memory to spare
        return TypicalCall(kind.name, device_type, None, None, describe(error))
    return TypicalCall(kind.name, device_type, backend, kernel, reason)


def default_device_type() -> str:
    """Return `"cuda"` if there is a GPU, else `"cpu"`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def plain_torch(device_type: str) -> Iterator[None]:
    """Compute as outside of the caller's `no_grad`, `inference_mode` and `autocast`."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device_type, enabled=False),
    ):
        yield


def query_of(kind: CallKind, device_type: str) -> Tensor:
    """Return a query for a call of that kind, to be its key and its value as well."""
    # Not drawn from the generator of the process, on whose state a training may depend.
    numbers = torch.linspace(-1.0, 1.0, 8192, device=device_type).repeat(4)
    return numbers.reshape(_SHAPE).to(kind.dtype).requires_grad_()


def _mask(kind: CallKind, device_type: str) -> Tensor | None:
    """A mask as the ops get it: added to the scores, in the dtype of the query."""
    seq_len = _SHAPE[2]
    if not kind.masked:
        return None
    return torch.zeros(seq_len, seq_len, dtype=kind.dtype, device=device_type)


def backend_of(kind: CallKind, query: Tensor, mask: Tensor | None) -> str | None:
    """Name the backend that torch chooses; None if this torch does not tell."""
    chosen = chosen_backend(query, mask, kind.dropout_p, kind.causal)
    return None if chosen is None else str(SDPBackend(chosen).name)


def _kernel(
    kind: CallKind, query: Tensor, mask: Tensor | None, backend: str | None
) -> tuple[str | None, str | None]:
    """Return what would run a call, `"stock"` or None if unknown, and what to say about it."""
    device_type = query.device.type
    installed = router.installed_kernel_sets()
    active = active_on(installed, device_type)
    if active is None:
        return "stock", None
    if not installed:
        return None, f"{active} {NOT_ROUTED}"
    if device_type not in installed:
        return "stock", f"{active} is installed for {', '.join(installed)}"
    if backend is None:
        return None, None
    op_call = _op_call(kind, query, mask, device_type, backend)
    if op_call is None:
        return "stock", "what torch sends to this backend never reaches an implementation"
    op = op_call[0]
    if op not in router.routed_ops(device_type):
        return "stock", f"aten::{op} of this torch has arguments that are not known here"
    if op in router.ops_taken_over(device_type):
        return None, f"another library has overridden aten::{op}"
    kernels = installed[device_type]
    reason = _ask(kernels, device_type, *op_call)
    if reason != _SERVED:
        return "stock", reason
    against_backward = kernels.capabilities.reason_to_decline_backward()
    if against_backward is not None:
        return active, f"but its backward runs on stock: {against_backward}"
    return active, None


def active_on(installed: dict[str, KernelSet], device_type: str) -> str | None:
    """Return the active implementation, or the kernel set that was installed without a registry."""
    kernels = installed.get(device_type)
    return current_flash_attention_impl() or (None if kernels is None else kernels.name)


def _op_call(
    kind: CallKind, query: Tensor, mask: Tensor | None, device_type: str, backend: str
) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    """Return the op that a backend stands for, and its arguments; None if it is not routed."""
    tensors, dropout_p, causal = (query, query, query), kind.dropout_p, kind.causal
    if backend == SDPBackend.FLASH_ATTENTION.name:
        if device_type == "cpu":
            op = "_scaled_dot_product_flash_attention_for_cpu"
            return op, (*tensors, dropout_p, causal), {"attn_mask": mask}
        return "_scaled_dot_product_flash_attention", (*tensors, dropout_p, causal, False), {}
    if backend == SDPBackend.CUDNN_ATTENTION.name:
        options = (mask, True, dropout_p, causal, False)
        return "_scaled_dot_product_cudnn_attention", (*tensors, *options), {}
    return None


def _ask(
    kernel_set: KernelSet,
    device_type: str,
    op: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> str:
    """Return `_SERVED`, or why the kernel set would not run a call of `op`."""
    kernels = ActiveKernels(kernel_set, strict=False)
    supports = kernels.supports
    kernels.supports = lambda call: supports(call) or _SERVED
    kernels.forward_heads_first = None  # it would run what it serves
    reason: str = ROUTED_OPS[device_type].adapters[op](kernels, *arguments, **options)
    return reason
