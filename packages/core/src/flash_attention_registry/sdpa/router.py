"""One permanent router per op and dispatch key, a slot behind it that switches kernel sets.

Replacing Python kernels in the dispatcher while other threads call them crashes the process. A
router is therefore put in once, and activating, switching and restoring change the one attribute
that it reads. An empty slot is stock: the captured kernel, called with the same arguments.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from flash_attention_registry import environment
from flash_attention_registry.fork import ForkSafeLock
from flash_attention_registry.half_built import undo_on_failure

from .capabilities import KernelSet
from .counters import counter_of
from .native import NativeKernels
from .ops import ROUTED_OPS, difference_to_schema
from .overrides import (
    forget_python_overrides,
    is_overridden_from_python,
    kernel_text,
    warn_of_bypass,
    warn_of_python_override,
)
from .route import Slot, make_route
from .serving import ActiveKernels
from .torch_internals import schema_of, take_out

__all__ = [
    "InstalledKernels",
    "await_first_call",
    "install",
    "installed_kernel_sets",
    "ops_taken_over",
    "routed_ops",
    "uninstall",
]


_PARTS = ("name", "capabilities", "supports", "forward", "backward")
_slots = {device_type: Slot() for device_type in ROUTED_OPS}
_guard = ForkSafeLock()


class InstalledKernels:
    """Handle on an installed kernel set."""

    def __init__(self, slot: Slot, kernels: ActiveKernels) -> None:
        """Remember what was put where."""
        self._slot = slot
        self._kernels = kernels

    def remove(self) -> None:
        """Put stock back, unless another kernel set has taken over since; safe to repeat.

        Calls that are running finish on this kernel set; calls that begin later are stock's.
        """
        _replace(self._slot, self._kernels, None)


def install(
    kernel_set: KernelSet, device_type: str = "cuda", *, native: NativeKernels | None = None
) -> InstalledKernels:
    """Serve attention on `device_type` with `kernel_set`, in place of an earlier one.

    Takes effect at the next call from any thread, compiled graphs included; needs no GPU and
    initialises none. The first install for a device type captures torch's own kernels, puts the
    routers in, and so costs a few milliseconds.

    Args:
        kernel_set: Serves what its `supports` does not decline; stock runs the rest.
        device_type: `"cuda"` or `"cpu"`.
        native: Serves calls before they come to a router, while `kernel_set` is installed.

    Returns:
        A handle whose `remove()` puts stock back. Inside of a `register_fn` it need not be kept for
        the case of a failure: the registry then puts back what was installed before.

    Warns:
        RuntimeWarning: Another library's Python kernel stands below the routers, or has since been
            put on top of them and takes the calls; or Inductor is set to generate code that calls
            torch's kernels past the dispatcher. Where a filter makes it an error, nothing is
            installed.

    Raises:
        ValueError: `device_type` has no routed ops, or `kernel_set` does not declare it.
        TypeError: `kernel_set` lacks a part of `KernelSet`, or is a class.
        EnvironmentVariableError: `FLASH_ATTENTION_IMPL_STRICT` is set and no boolean.
    """
    slot = _slot_of(device_type)
    if isinstance(kernel_set, type):
        raise TypeError(
            f"install() takes a KernelSet, got the class {kernel_set.__name__}; "
            f"give an instance of it: {kernel_set.__name__}()"
        )
    if not isinstance(kernel_set, KernelSet):
        lacking = [part for part in _PARTS if not hasattr(kernel_set, part)]
        raise TypeError(
            f"install() takes a KernelSet ({', '.join(_PARTS)}), got {type(kernel_set).__name__}, "
            f"which lacks {', '.join(lacking)}"
        )
    declared = kernel_set.capabilities.device_types
    if device_type not in declared:
        raise ValueError(
            f"{kernel_set.name} cannot be installed for device type {device_type!r}: its "
            f"capabilities declare {sorted(declared)}"
        )
    kernels = ActiveKernels(kernel_set, strict=environment.strict(), native=native)
    _warn_of_hidden_routers(device_type, slot)
    warn_of_bypass()
    with _guard.lock:
        if slot.library is None:
            slot.library = _install_routers(device_type, slot)
        if native is not None and native not in slot.natives:
            _put_in(native, device_type, slot)
        undo_on_failure(partial(_replace, slot, kernels, slot.kernels))
        slot.switch(kernels)
    return InstalledKernels(slot, kernels)


def await_first_call(device_type: str, first: Callable[[], bool]) -> None:
    """Call `first` at the next call that finds no kernel set installed, before it runs.

    It may install one, which then serves that call already. If it raises, so does the call, and
    the next call calls it again. Puts the routers in and needs no GPU.

    Args:
        device_type: `"cuda"` or `"cpu"`.
        first: Takes no arguments and returns whether it is done; if not, the next call calls it
            again. Calls of several threads at once call it at once.

    Raises:
        ValueError: `device_type` has no routed ops.
    """
    slot = _slot_of(device_type)
    with _guard.lock:
        if slot.library is None:
            slot.library = _install_routers(device_type, slot)
        slot.awaiting = first


def installed_kernel_sets() -> dict[str, KernelSet]:
    """Which kernel set serves now, by device type; a device type on stock is left out."""
    active = {device_type: slot.kernels for device_type, slot in _slots.items()}
    return {device_type: kernels.kernel_set for device_type, kernels in active.items() if kernels}


def routed_ops(device_type: str) -> list[str]:
    """Names of the ops that have a router now; all that this torch has, once one was installed.

    Raises:
        ValueError: `device_type` has no routed ops.
    """
    return list(_slot_of(device_type).routes)


def ops_taken_over(device_type: str) -> list[str]:
    """Names of the ops whose calls go to another library's Python kernel.

    Where our routers are in, they should be on top. A kernel cannot be asked whether it is ours,
    and calling it with made-up tensors is not safe; but torch tells the line that registered it,
    and all routers have one line in this package. Where no router is in, torch's bookkeeping tells.

    Raises:
        ValueError: `device_type` has no routed ops.
    """
    slot = _slot_of(device_type)
    key = ROUTED_OPS[device_type].dispatch_key
    if slot.library is not None:
        return [op for op, text in slot.texts.items() if kernel_text(op, key) != text]
    return [op for op in ROUTED_OPS[device_type].adapters if is_overridden_from_python(op, key)]


def uninstall(device_type: str = "cuda") -> None:
    """Take the routers of `device_type` out of the dispatcher, once no kernel set is installed.

    For processes that must be exactly as they were. No other thread may be inside attention
    meanwhile, since torch frees the routers at once; `remove()` of a handle has no such
    condition.

    Raises:
        ValueError: `device_type` has no routed ops.
        RuntimeError: A kernel set is installed; restore stock kernels first.
    """
    slot = _slot_of(device_type)
    with _guard.lock:
        if slot.kernels is not None:
            raise RuntimeError(
                f"cannot take the routers of {device_type!r} out of the dispatcher: the kernel set "
                f"{slot.kernels.name} is installed there. Restore stock kernels first "
                "(restore_flash_attention_impl(), or remove() of the handle that install() "
                "returned)"
            )
        for native in slot.natives:
            native.take_out()
        library, slot.library = slot.library, None
        slot.awaiting = None
        slot.routes, slot.natives, slot.texts = {}, [], {}
        if library is not None:
            take_out(library)


def _replace(slot: Slot, kernels: ActiveKernels, by: ActiveKernels | None) -> None:
    """Put `by` in the place of `kernels`, unless another kernel set has taken it since."""
    with _guard.lock:
        if slot.kernels is kernels:
            slot.switch(by)


def _slot_of(device_type: str) -> Slot:
    slot = _slots.get(device_type)
    if slot is None:
        raise ValueError(
            f"no attention ops are routed for device type {device_type!r}; "
            f"choose one of {sorted(_slots)}"
        )
    return slot


def _install_routers(device_type: str, slot: Slot) -> Any:
    """Put a router over every op of `device_type` that this torch has.

    Returns:
        The `torch.library.Library` that holds them (which has no annotations).
    """
    routed = ROUTED_OPS[device_type]
    make_library: Any = torch.library.Library
    library = make_library("aten", "IMPL")
    routes, texts = {}, {}
    with warnings.catch_warnings():
        # torch says once per process that a kernel is overridden, which is what we are here for.
        warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel")
        for op, adapter in routed.adapters.items():
            schema = schema_of(op)
            if schema is None:
                continue
            difference = difference_to_schema(adapter, schema)
            if difference is not None:
                warnings.warn(
                    f"aten::{op} stays on torch's own kernel: torch {torch.__version__} has a "
                    f"schema that this version of flash-attention-registry does not know "
                    f"({difference}); upgrade flash-attention-registry",
                    RuntimeWarning,
                    stacklevel=3,
                )
                continue
            warn_of_python_override(op, routed.dispatch_key)
            stock = _stock_kernel(op, routed.dispatch_key)
            route = make_route(op, routed.dispatch_key, adapter, slot, stock, counter_of(op))
            library.impl(op, route, routed.dispatch_key, with_keyset=True, allow_override=True)
            routes[op] = route
            texts[op] = kernel_text(op, routed.dispatch_key)
    forget_python_overrides(library)
    slot.routes, slot.texts = routes, texts
    return library


def _put_in(native: NativeKernels, device_type: str, slot: Slot) -> None:
    """Put native kernels above the routers of `device_type`."""
    key = ROUTED_OPS[device_type].dispatch_key
    for op in native.put_in(slot.routes):
        slot.texts[op] = kernel_text(op, key)
        counter_of(op).include(native)
    slot.natives.append(native)


def _stock_kernel(op: str, dispatch_key: str) -> Callable[..., Any] | None:
    """The kernel that stands at the key now; None if this build of torch has none.

    Captured before the router goes in: calling the op from inside its own override recurses.
    """
    try:
        return torch.library.get_kernel(f"aten::{op}", dispatch_key).call_boxed
    except RuntimeError:
        # A build without CUDA. Its routers are reached only by tests that call them by key.
        return None


def _warn_of_hidden_routers(device_type: str, slot: Slot) -> None:
    """Warn if calls no longer reach the routers, because another library's kernel is on top."""
    key = ROUTED_OPS[device_type].dispatch_key
    hidden = ops_taken_over(device_type) if slot.library is not None else []
    if hidden:
        warnings.warn(
            f"another library has overridden {', '.join('aten::' + op for op in hidden)} ({key}) "
            f"since flash-attention-registry did, so these calls do not reach the kernel set that "
            f"is being installed. Take its override away (torch's own FA3 or FA4: "
            f"torch.nn.attention.restore_flash_attention_impl()), or, with nothing installed, "
            f"call flash_attention_registry.sdpa.uninstall({device_type!r}) and install again.",
            RuntimeWarning,
            stacklevel=3,
        )
