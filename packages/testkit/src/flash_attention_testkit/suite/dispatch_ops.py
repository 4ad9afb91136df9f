"""The ops by which calls come: their arguments made of a case, and a way to call each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from flash_attention_registry.environment import STRICT
from flash_attention_registry.sdpa import OpCounts, dispatch_counts, install, uninstall
from flash_attention_registry.sdpa.flash import unused_outputs
from flash_attention_registry.sdpa.router import routed_ops
from flash_attention_testkit.inputs import SdpaInputs
from flash_attention_testkit.reference import reference_sdpa
from flash_attention_testkit.suite._subject import Subject, longest_of

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of an op."""

CallOp: TypeAlias = Callable[[str, Arguments], Any]
"""Calls an op of aten by its name, insists that the kernel set served it, returns its results."""


@dataclass(frozen=True, slots=True)
class Op:
    """An op of aten, used in one way.

    Attributes:
        label: Names it in the ids of tests.
        forward: The op's name, without ``aten::``.
        backward: Of the op that differentiates it; None if there is none.
        device_type: Where torch calls it.
        general: Whether it takes windows; its tensors are ``[B, S, H, D]`` then, else
            ``[B, H, S, D]``.
        packed: Whether it is called with packed sequences ``[T, H, D]``.
        in_place: Whether it takes out as its first argument.
        aligned_at_end: Whether its causal masks of unequal lengths are bottom-right.
        lse_of_empty_rows: What lse reads for a row that sees no key.
    """

    label: str
    forward: str
    backward: str | None
    device_type: str = "cuda"
    general: bool = False
    packed: bool = False
    in_place: bool = False
    aligned_at_end: bool = True
    lse_of_empty_rows: float = math.inf

    def __str__(self) -> str:
        """The label."""
        return self.label

    def laid(self, tensor: Tensor) -> Tensor:
        """A tensor of a case, heads after rows, as the op takes it; or the other way round."""
        return tensor if self.general else tensor.transpose(1, 2)


_FLASH = "_scaled_dot_product_flash_attention"
_CUDNN = "_scaled_dot_product_cudnn_attention"
_GENERAL = "_flash_attention_forward"
_GENERAL_BACKWARD = "_flash_attention_backward"
_IN_PLACE = "_flash_attention_forward_no_dropout_inplace"
_CPU = "_scaled_dot_product_flash_attention_for_cpu"

OPS = (
    Op("flash", _FLASH, f"{_FLASH}_backward"),
    Op(
        *("cudnn", _CUDNN, f"{_CUDNN}_backward"),
        aligned_at_end=False,
        lse_of_empty_rows=-math.inf,
    ),
    Op("general", _GENERAL, _GENERAL_BACKWARD, general=True),
    Op("packed", _GENERAL, _GENERAL_BACKWARD, general=True, packed=True),
    Op("in-place", _IN_PLACE, None, general=True, in_place=True),
    Op("in-place-packed", _IN_PLACE, None, general=True, packed=True, in_place=True),
    Op(
        *("cpu", _CPU, f"{_CPU}_backward", "cpu"),
        aligned_at_end=False,
        lse_of_empty_rows=0.0,
    ),
)
"""Every op that has a router, as torch calls it."""


def forward_arguments(op: Op, inputs: SdpaInputs) -> Arguments:
    """Every argument of the forward op, those with a default included.

    Out of an op in place is NaN.
    """
    query, key, value = map(op.laid, (inputs.query, inputs.key, inputs.value))
    causal, scale = inputs.options.get("causal", False), inputs.options.get("scale")
    if op.device_type == "cpu":
        return (query, key, value, 0.0, causal), {"attn_mask": None, "scale": scale}
    if op.forward == _CUDNN:
        return (query, key, value, None, True, 0.0, causal, False), {"scale": scale}
    if not op.general:
        return (query, key, value, 0.0, causal, False), {"scale": scale}
    out = (torch.full_like(query, math.nan),) if op.in_place else ()
    return (
        (*out, query, key, value, *_edges_and_longest(inputs), 0.0, causal, False),
        {"scale": scale, **_windows(inputs)},
    )


def backward_arguments(op: Op, inputs: SdpaInputs, call_op: CallOp) -> Arguments:
    """Every argument of the backward op after an exact forward, rounded to the inputs' dtype.

    Args:
        op: Which has a backward.
        inputs: The case.
        call_op: Calls the forward, where its backward asks who ran that.
    """
    options = inputs.options
    exact = reference_sdpa(inputs.query, inputs.key, inputs.value, **options)
    assert exact.lse is not None
    query, key, value, grad_out = map(
        op.laid, (inputs.query, inputs.key, inputs.value, inputs.grad_out)
    )
    out = torch.empty_like(query).copy_(op.laid(exact.out))
    lse = exact.lse.float().masked_fill(exact.lse == -math.inf, op.lse_of_empty_rows)
    causal, scale = options.get("causal", False), options.get("scale")
    tensors = grad_out, query, key, value, out
    if op.device_type == "cpu":
        return (*tensors, lse, 0.0, causal), {"attn_mask": None, "scale": scale}
    edges_and_longest = _edges_and_longest(inputs)
    rng_state, unused, _ = unused_outputs(query)
    if op.forward == _CUDNN:
        seed, offset = call_op(op.forward, forward_arguments(op, inputs))[6:8]
        lse = lse.unsqueeze(-1)
        return (*tensors, lse, seed, offset, None, *edges_and_longest, 0.0, causal), {
            "scale": scale
        }
    windows = _windows(inputs) if op.general else {}
    return (*tensors, lse, *edges_and_longest, 0.0, causal, rng_state, unused), {
        "scale": scale,
        **windows,
    }


def out_and_lse(op: Op, arguments: Arguments, result: Any) -> tuple[Tensor, Tensor]:
    """Out as the case has it, and lse, of what a forward op has returned or written."""
    out, lse = (arguments[0][0], result) if op.in_place else result[:2]
    return op.laid(out), lse


def without_defaults(name: str, arguments: Arguments) -> Arguments:
    """Only the arguments that the op's schema demands."""
    schema = getattr(torch.ops.aten, name).default._schema
    demanded = sum(not argument.has_default_value() for argument in schema.arguments)
    return arguments[0][:demanded], {}


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among arguments or results, without those that are empty."""
    parts = [values] if isinstance(values, Tensor) else values
    return [part for part in parts if isinstance(part, Tensor) and part.numel()]


def as_torch_declares(name: str, arguments: Arguments) -> Any:
    """What torch's meta function says about the results of a call: shapes, dtypes, strides."""
    positional, keywords = arguments
    return getattr(torch.ops.aten, name)(
        *map(_on_meta, positional), **{key: _on_meta(value) for key, value in keywords.items()}
    )


@contextmanager
def calling(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Iterator[CallOp]:
    """Give a way to call the ops on the subject's device.

    Without a GPU the CUDA ops are called too: the kernel set is installed for CUDA besides, and
    the routers' kernels are called with the CPU tensors that it takes.
    """
    if subject.device.type == "cuda":
        yield lambda name, arguments: _served(subject, name, _dispatched(name), arguments)
        return
    had_routers = bool(routed_ops("cuda"))
    with monkeypatch.context() as patch:
        # Stock's CUDA kernels must not get CPU tensors: what is not served raises.
        patch.setenv(STRICT, "1")
        handle = install(_ForCuda(subject), "cuda")
    try:
        yield lambda name, arguments: _served(
            subject, name, _dispatched(name) if name.startswith(_CPU) else _at_cuda(name), arguments
        )
    finally:
        handle.remove()
        if not had_routers:
            uninstall("cuda")


class _ForCuda:
    """A kernel set for CPU tensors that may be installed where CUDA tensors are expected."""

    def __init__(self, subject: Subject) -> None:
        kernel_set, declared = subject.kernel_set, subject.capabilities
        self.name = kernel_set.name
        self.capabilities = replace(declared, device_types=declared.device_types | {"cuda"})
        self.supports = kernel_set.supports
        self.forward = kernel_set.forward
        self.backward = kernel_set.backward


def _served(subject: Subject, name: str, kernel: Callable[..., Any], arguments: Arguments) -> Any:
    __tracebackhide__ = True
    before = dispatch_counts().get(name, OpCounts())
    with torch.no_grad():
        result = kernel(*arguments[0], **arguments[1])
    after = dispatch_counts().get(name, OpCounts())
    assert after.served == before.served + 1, (
        f"{subject.name} did not serve aten::{name}; since the last reset:\n{dispatch_counts()}"
    )
    return result


def _dispatched(name: str) -> Callable[..., Any]:
    op: Callable[..., Any] = getattr(torch.ops.aten, name)
    return op


def _at_cuda(name: str) -> Callable[..., Any]:
    """The kernel that stands at the CUDA key, whatever the tensors are."""
    kernel: Any = torch.library.get_kernel(f"aten::{name}", "CUDA")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return lambda *args, **kwargs: kernel.call_boxed(keys, *args, **kwargs)


def _on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _edges_and_longest(inputs: SdpaInputs) -> tuple[Tensor | None, Tensor | None, int, int]:
    """``cum_seq_q``, ``cum_seq_k``, ``max_q`` and ``max_k``."""
    edges_query = inputs.options.get("cu_seqlens_query")
    edges_key = inputs.options.get("cu_seqlens_key")
    if edges_query is None or edges_key is None:
        return None, None, inputs.query.shape[1], inputs.key.shape[1]
    return edges_query, edges_key, longest_of(edges_query), longest_of(edges_key)


def _windows(inputs: SdpaInputs) -> dict[str, int | None]:
    return {
        "window_size_left": inputs.options.get("window_left"),
        "window_size_right": inputs.options.get("window_right"),
    }
