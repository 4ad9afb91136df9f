"""How one cell's call is made to run on one implementation.

`native` is the kernel that torch chooses by itself, with no implementation active: behind the
registry's routers an empty slot calls the captured kernel. `torch:flash`, `torch:cudnn` and
`torch:efficient` are torch's too, chosen by name. Everything else is a name of the registry.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from flash_attention_registry.errors import RegistryWarning, text_of
from flash_attention_registry.sdpa import DispatchCounts, dispatch_counts, installed_kernel_sets
from flash_attention_testkit.bench.grids import Cell

__all__ = [
    "NATIVE",
    "STOCK",
    "Inputs",
    "NotMeasuredError",
    "StaysInstalledError",
    "make_inputs",
    "mode_of",
    "operation",
    "running_on",
    "why",
]

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


class NotMeasuredError(Exception):
    """A call cannot be made, or did not run on the implementation meant; the text says why."""


class StaysInstalledError(Exception):
    """An implementation could not be left, so that nothing else can be measured any more."""


@contextlib.contextmanager
def running_on(name: str, device: str) -> Iterator[None]:
    """Attention on `device` runs on `name` inside: one of `STOCK`, or a registered implementation.

    Raises:
        NotMeasuredError: Torch's own kernels ran in place of an implementation's; says why.
        StaysInstalledError: The implementation could not be taken away afterwards.
    """
    with contextlib.ExitStack() as stack:
        if name in STOCK:
            stack.enter_context(_nothing_active())
            backend = STOCK[name]
        else:
            stack.enter_context(_active(name))
            stack.enter_context(_served(device))
            # Torch's own FA3 and FA4 stand at the flash ops only, which torch may not choose.
            backend = SDPBackend.FLASH_ATTENTION if name.startswith("torch:") else None
        if backend is not None:
            stack.enter_context(sdpa_kernel(backend))
        yield


@contextlib.contextmanager
def _nothing_active() -> Iterator[None]:
    """Torch's own kernels run inside; what was active before is active again afterwards."""
    active = current_flash_attention_impl()
    with warnings.catch_warnings():
        # With nothing active it warns, and drops all the same what the environment asked for.
        warnings.simplefilter("ignore", RegistryWarning)
        restore_flash_attention_impl()
    try:
        yield
    finally:
        if active is not None:
            activate_flash_attention_impl(active)


@contextlib.contextmanager
def _active(name: str) -> Iterator[None]:
    """`name` is active inside, and its kernels are certainly gone afterwards."""
    scope = use_flash_attention_impl(name)
    scope.__enter__()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            # Of kernels that gave no handle the registry only warns.
            warnings.simplefilter("error", RegistryWarning)
            try:
                scope.__exit__(None, None, None)
            except Exception as error:
                raise StaysInstalledError(
                    f"{name} cannot be compared with anything: once it has run, torch's own "
                    f"kernels do not come back. {text_of(error)}"
                ) from error


@contextlib.contextmanager
def _served(device: str) -> Iterator[None]:
    """See by the registry's counts that calls inside run on the active kernel set.

    An implementation that installs itself by its own means has no counts, and is believed.
    """
    counted = device in installed_kernel_sets()
    before = dispatch_counts()
    yield
    if counted:
        _check_served(before, dispatch_counts())


def _check_served(before: DispatchCounts, after: DispatchCounts) -> None:
    for op, counts in after.items():
        for reason, number in counts.declined.items():
            if op not in before or number > before[op].declined.get(reason, 0):
                raise NotMeasuredError(f"runs on torch's own kernel: {reason}")
    if after.served == before.served:
        raise NotMeasuredError(
            "runs on torch's own kernel: torch sends this call to a backend that no "
            "implementation takes the place of"
        )


@dataclass(frozen=True, slots=True)
class Inputs:
    """The tensors of a cell, the same for every implementation.

    Attributes:
        tensors: Query, key and value: `[B, H, S, D]`, laid out in memory as `[B, S, H, D]`, as
            projections leave them; packed sequences `[T, H, D]`. For a backward they require
            gradients.
        cu_seqlens: Where each packed sequence starts, int32 `[B + 1]`; None for a dense batch.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    cu_seqlens: Tensor | None


def make_inputs(cell: Cell, device: str) -> Inputs:
    """Draw the tensors of a cell from a standard normal distribution."""
    torch.manual_seed(0)
    heads = (cell.heads, cell.kv_heads, cell.kv_heads)
    shapes: list[tuple[int, ...]]
    if cell.seq_lens:
        shapes = [(sum(cell.seq_lens), count, cell.head_dim) for count in heads]
        starts = [0, *itertools.accumulate(cell.seq_lens)]
        cu_seqlens = torch.tensor(starts, device=device, dtype=torch.int32)
    else:
        rows = (cell.rows, cell.seq_len, cell.seq_len)
        shapes = [
            (cell.batch, length, count, cell.head_dim)
            for length, count in zip(rows, heads, strict=True)
        ]
        cu_seqlens = None
    query, key, value = (
        torch.randn(shape, device=device, dtype=getattr(torch, cell.dtype)) for shape in shapes
    )
    if cu_seqlens is None:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    for tensor in (query, key, value):
        tensor.requires_grad_(cell.direction == "backward")
    return Inputs((query, key, value), cu_seqlens)


def operation(cell: Cell, inputs: Inputs, name: str) -> Callable[[], Any]:
    """Make the call that is timed, which is to run inside `mode_of`; call this in `running_on`.

    A backward is that of one forward, kept, which runs here: in no mode of the cell's.

    Raises:
        NotMeasuredError: No such call can be made.
    """
    call = _dense(cell, inputs) if inputs.cu_seqlens is None else _packed(cell, inputs, name)
    if cell.direction == "forward":
        return call
    with torch.enable_grad():
        out = call()
    heads_first = cell.grad_layout == "bhsd" and not cell.seq_lens
    layout = torch.contiguous_format if heads_first else torch.preserve_format
    grad = torch.randn_like(out, memory_format=layout)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs.tensors, grad, retain_graph=True)

    return backward


@contextlib.contextmanager
def mode_of(cell: Cell) -> Iterator[None]:
    """The modes of torch in which a cell's calls run: for a deterministic one, deterministic ones.

    These are `torch.use_deterministic_algorithms(True, warn_only=True)`, with
    `torch.utils.deterministic.fill_uninitialized_memory` off: torch would fill new memory with NaN,
    for those who read it unwritten, and kernels are timed here.

    A mode that only warns changes nothing in torch's own backwards: FlashAttention-2 and the
    efficient one repeat only where it is an error not to, and cuDNN's attention torch calls
    non-deterministic, and would not choose it there. So their figures are those of their ordinary
    backwards; a kernel set is asked for gradients that repeat in either mode. The forward is made
    outside, by `operation`. The mode is set around a turn, so that no call's time has it.
    """
    if not cell.deterministic:
        yield
        return
    import torch._inductor.config as inductor  # by an attribute of torch, only once it is imported

    options: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills, compiles = options.fill_uninitialized_memory, inductor.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    options.fill_uninitialized_memory = False
    try:
        yield
    finally:
        options.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
        inductor.deterministic = compiles  # torch sets it too, and its user may have before


def _dense(cell: Cell, inputs: Inputs) -> Callable[[], Tensor]:
    """A call of SDPA."""
    query, key, value = inputs.tensors
    options: dict[str, Any] = {"is_causal": cell.causal}
    if cell.kv_heads != cell.heads:
        options["enable_gqa"] = True
    return lambda: F.scaled_dot_product_attention(query, key, value, **options)


def _packed(cell: Cell, inputs: Inputs, name: str) -> Callable[[], Tensor]:
    """A call of the op behind `torch.nn.attention.varlen`, which is flash's alone."""
    cu_seqlens, longest = inputs.cu_seqlens, max(cell.seq_lens)
    if not inputs.tensors[0].is_cuda:
        raise NotMeasuredError("torch has no attention for packed sequences on the CPU")
    if name in ("torch:cudnn", "torch:efficient"):
        raise NotMeasuredError("packed sequences go through aten::_flash_attention_forward")
    arguments = (cu_seqlens, cu_seqlens, longest, longest, 0.0, cell.causal, False)

    def call() -> Tensor:
        out: Tensor = torch.ops.aten._flash_attention_forward(*inputs.tensors, *arguments)[0]
        return out

    return call


def why(error: Exception) -> str:
    """The reason to give for an exception, in one line.

    Raises:
        StaysInstalledError: It is one, which is nothing to go on after.
    """
    if isinstance(error, StaysInstalledError):
        raise error
    text = " ".join(text_of(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {'.'.join(text.split('. ')[:2])}"[:200]
    known = isinstance(error, NotMeasuredError)
    return text if known else f"{type(error).__name__}: {text}"[:300]
