"""How one cell's call is made to run on one implementation.

`native` is the kernel that torch chooses by itself, with no implementation active: behind the
registry's routers an empty slot calls the captured kernel. `torch:flash`, `torch:cudnn` and
`torch:efficient` are torch's too, chosen by name. Everything else is a name of the registry.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attention_registry import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    use_flash_attention_impl,
)
from flash_attention_registry.errors import text_of
from flash_attention_registry.sdpa import dispatch_counts, installed_kernel_sets
from flash_attention_testkit.bench.grids import Cell

__all__ = ["NATIVE", "STOCK", "NotMeasuredError", "check_served", "operation", "running_on", "why"]

NATIVE = "native"
STOCK: Mapping[str, SDPBackend | None] = MappingProxyType(
    {
        NATIVE: None,
        "torch:flash": SDPBackend.FLASH_ATTENTION,
        "torch:cudnn": SDPBackend.CUDNN_ATTENTION,
        "torch:efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
)
"""Torch's own kernels, and the backend each is forced by; None leaves the choice to torch."""

COLD_BYTES = 256 << 20
"""Keys and values of a decoding cell are spread over at least this much memory, several times the
last-level cache of any GPU: a step of a real model never finds them in the cache."""


class NotMeasuredError(Exception):
    """A call cannot be made, or would not run on the implementation meant; the text says why."""


@contextlib.contextmanager
def _nothing_active() -> Iterator[None]:
    """Torch's own kernels run inside; what was active before is active again afterwards."""
    active = current_flash_attention_impl()
    with warnings.catch_warnings():
        # With nothing active it warns, and drops all the same what the environment asked for.
        warnings.simplefilter("ignore")
        restore_flash_attention_impl()
    try:
        yield
    finally:
        if active is not None:
            activate_flash_attention_impl(active)


@contextlib.contextmanager
def running_on(name: str) -> Iterator[None]:
    """Attention runs on `name` inside: one of `STOCK`, or a registered implementation."""
    with contextlib.ExitStack() as stack:
        if name in STOCK:
            stack.enter_context(_nothing_active())
            backend = STOCK[name]
        else:
            stack.enter_context(use_flash_attention_impl(name))
            # Torch's own FA3 and FA4 stand at the flash ops only, which torch may not choose.
            backend = SDPBackend.FLASH_ATTENTION if name.startswith("torch:") else None
        if backend is not None:
            stack.enter_context(sdpa_kernel(backend))
        yield


def operation(cell: Cell, name: str, device: str) -> Callable[[], Any]:
    """Make the inputs of a cell and the call that is timed; to be called inside `running_on`.

    Inputs are the same for every implementation. A backward is that of one forward, kept.

    Raises:
        NotMeasuredError: No such call can be made.
    """
    torch.manual_seed(0)
    if cell.seq_lens:
        call, tensors = _packed(cell, name, device)
    else:
        call, tensors = _dense(cell, device)
    if cell.direction == "forward":
        return call
    with torch.enable_grad():
        for tensor in tensors:
            tensor.requires_grad_()
        out = call()
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True)


def _dense(cell: Cell, device: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A call of SDPA. Memory is laid out `[B, S, H, D]`, as projections leave it."""

    def numbers(rows: int, heads: int) -> Tensor:
        shape = (cell.batch, rows, heads, cell.head_dim)
        return torch.randn(shape, device=device, dtype=getattr(torch, cell.dtype)).transpose(1, 2)

    def tensors() -> list[Tensor]:
        return [numbers(cell.rows, cell.heads)] + [
            numbers(cell.seq_len, cell.kv_heads) for _ in range(2)
        ]

    options: dict[str, Any] = {"is_causal": cell.causal}
    if cell.kv_heads != cell.heads:
        options["enable_gqa"] = True
    sets = [tensors()]
    if cell.is_decode and device == "cuda":
        copies = min(64, math.ceil(COLD_BYTES / cell.key_value_bytes))
        sets += [tensors() for _ in range(copies - 1)]
    turns = itertools.cycle(sets)

    def call() -> Tensor:
        query, key, value = next(turns)
        return F.scaled_dot_product_attention(query, key, value, **options)

    return call, sets[0]


def _packed(cell: Cell, name: str, device: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A call of the op behind `torch.nn.attention.varlen`, which is flash's alone."""
    if device != "cuda":
        raise NotMeasuredError("torch has no attention for packed sequences on the CPU")
    if name in ("torch:cudnn", "torch:efficient"):
        raise NotMeasuredError("packed sequences go through aten::_flash_attention_forward")
    dtype, total = getattr(torch, cell.dtype), sum(cell.seq_lens)
    tensors = [
        torch.randn(total, heads, cell.head_dim, device=device, dtype=dtype)
        for heads in (cell.heads, cell.kv_heads, cell.kv_heads)
    ]
    starts = [0, *itertools.accumulate(cell.seq_lens)]
    cu_seqlens = torch.tensor(starts, device=device, dtype=torch.int32)
    longest = max(cell.seq_lens)
    arguments = (cu_seqlens, cu_seqlens, longest, longest, 0.0, cell.causal, False)

    def call() -> Tensor:
        out: Tensor = torch.ops.aten._flash_attention_forward(*tensors, *arguments)[0]
        return out

    return call, tensors


def check_served(name: str, device: str, run: Callable[[], Any]) -> None:
    """Run once and make sure that the kernels of `name` have run.

    Raises:
        NotMeasuredError: Torch's own kernel ran in their place, and why.
    """
    if name in STOCK or device not in installed_kernel_sets():
        run()  # an implementation that installs itself by its own means has no counts
        return
    before = dispatch_counts()
    run()
    after = dispatch_counts()
    for op, counts in after.items():
        for reason, number in counts.declined.items():
            if op not in before or number > before[op].declined.get(reason, 0):
                raise NotMeasuredError(f"runs on torch's own kernel: {reason}")
    if after.served == before.served:
        raise NotMeasuredError(
            "runs on torch's own kernel: torch sends this call to a backend that no "
            "implementation takes the place of"
        )


def why(error: BaseException) -> str:
    """The reason to give for an exception, in one line."""
    text = " ".join(text_of(error).split())
    known = isinstance(error, NotMeasuredError)
    return text if known else f"{type(error).__name__}: {text}"[:300]
