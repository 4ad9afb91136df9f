"""One permanent router per op and dispatch key, a slot behind it that switches kernel sets.

Replacing Python kernels in the dispatcher while other threads call them crashes the process. A
router is therefore put in once, and activating, switching and restoring change the one attribute
that it reads. An empty slot is stock: the captured kernel, called with the same arguments.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .capabilities import KernelSet
from .counters import OpCounter, counter_of
from .ops import ROUTED_OPS, Adapter, difference_to_schema, schema_of
from .serving import ActiveKernels

__all__ = ["InstalledKernels", "install", "installed_kernel_sets", "uninstall"]


class _Slot:
    """What the routers of one device type read."""

    __slots__ = ("kernels", "library")

    def __init__(self) -> None:
        self.kernels: ActiveKernels | None = None
        # Any: torch's Library has no annotations.
        self.library: Any = None


_slots = {device_type: _Slot() for device_type in ROUTED_OPS}
_lock = threading.Lock()


def _renew_lock() -> None:
    """Give a forked child a lock that no thread of its parent holds."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


class _Thread(threading.local):
    """Whether this thread is inside a stock kernel that a declined call went to.

    Stock's SDPA kernels call the general flash ops through the dispatcher, and so meet a router
    again. What was declined stays declined, and is counted once.
    """

    in_declined_call = False


_thread = _Thread()


class InstalledKernels:
    """Handle on an installed kernel set."""

    def __init__(self, slot: _Slot, kernels: ActiveKernels) -> None:
        """Remember what was put where."""
        self._slot = slot
        self._kernels = kernels

    def remove(self) -> None:
        """Put stock back, unless another kernel set has taken over since; safe to repeat.

        Calls that are running finish on this kernel set; calls that begin later are stock's.
        """
        with _lock:
            if self._slot.kernels is self._kernels:
                self._slot.kernels = None


def install(kernel_set: KernelSet, device_type: str = "cuda") -> InstalledKernels:
    """Serve attention on `device_type` with `kernel_set`, in place of an earlier one.

    Takes effect at the next call from any thread, compiled graphs included; needs no GPU and
    initialises none. The first install for a device type captures torch's own kernels, puts the
    routers in, and so costs a few milliseconds.

    Args:
        kernel_set: Serves what its `supports` does not decline; stock runs the rest.
        device_type: `"cuda"` or `"cpu"`.

    Returns:
        A handle whose `remove()` puts stock back.

    Raises:
        ValueError: `device_type` has no routed ops, or `kernel_set` does not declare it.
        TypeError: `kernel_set` lacks a part of `KernelSet`.
    """
    slot = _slot_of(device_type)
    if not isinstance(kernel_set, KernelSet):
        raise TypeError(
            f"install() takes a KernelSet (name, capabilities, supports, forward, backward), "
            f"got {type(kernel_set).__name__}, which lacks a part of it"
        )
    declared = kernel_set.capabilities.device_types
    if device_type not in declared:
        raise ValueError(
            f"{kernel_set.name} cannot be installed for device type {device_type!r}: its "
            f"capabilities declare {sorted(declared)}"
        )
    kernels = ActiveKernels(kernel_set)
    with _lock:
        if slot.library is None:
            slot.library = _install_routers(device_type, slot)
        slot.kernels = kernels
    return InstalledKernels(slot, kernels)


def installed_kernel_sets() -> dict[str, KernelSet]:
    """Which kernel set serves now, by device type; a device type on stock is left out."""
    active = {device_type: slot.kernels for device_type, slot in _slots.items()}
    return {device_type: kernels.kernel_set for device_type, kernels in active.items() if kernels}


def uninstall(device_type: str = "cuda") -> None:
    """Take the routers of `device_type` out of the dispatcher, and any kernel set with them.

    For processes that must be exactly as they were. No other thread may be inside attention
    meanwhile, since torch frees the routers at once; `remove()` of a handle has no such
    condition.

    Raises:
        ValueError: `device_type` has no routed ops.
    """
    slot = _slot_of(device_type)
    with _lock:
        slot.kernels = None
        library, slot.library = slot.library, None
        if library is not None:
            library._destroy()


def _slot_of(device_type: str) -> _Slot:
    slot = _slots.get(device_type)
    if slot is None:
        raise ValueError(
            f"no attention ops are routed for device type {device_type!r}; "
            f"choose one of {sorted(_slots)}"
        )
    return slot


def _install_routers(device_type: str, slot: _Slot) -> Any:
    """Put a router over every op of `device_type` that this torch has.

    Returns:
        The `torch.library.Library` that holds them (which has no annotations).
    """
    routed = ROUTED_OPS[device_type]
    make_library: Any = torch.library.Library
    library = make_library("aten", "IMPL")
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
            _warn_of_python_override(op, routed.dispatch_key)
            stock = _stock_kernel(op, routed.dispatch_key)
            route = _route(op, routed.dispatch_key, adapter, slot, stock, counter_of(op))
            library.impl(op, route, routed.dispatch_key, with_keyset=True, allow_override=True)
    _forget_python_overrides(library)
    return library


def _stock_kernel(op: str, dispatch_key: str) -> Callable[..., Any] | None:
    """The kernel that stands at the key now; None if this build of torch has none.

    Captured before the router goes in: calling the op from inside its own override recurses.
    """
    try:
        return torch.library.get_kernel(f"aten::{op}", dispatch_key).call_boxed
    except RuntimeError:
        # A build without CUDA. Its routers are reached only by tests that call them by key.
        return None


def _route(
    op: str,
    dispatch_key: str,
    adapter: Adapter,
    slot: _Slot,
    stock: Callable[..., Any] | None,
    counter: OpCounter,
) -> Callable[..., Any]:
    """The Python kernel of one op: reads the slot, serves or goes to stock."""

    def missing_stock(*_args: object, **_kwargs: object) -> Any:
        raise RuntimeError(
            f"aten::{op} was called for {dispatch_key} and no kernel set served it, but this "
            f"build of torch ({torch.__version__}) has no {dispatch_key} kernel to fall back to; "
            "dispatch_counts() names the reason of a declined call"
        )

    run_stock = missing_stock if stock is None else stock

    def route(keyset: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        kernels = slot.kernels
        if kernels is None or _thread.in_declined_call:
            return run_stock(keyset, *args, **kwargs)
        try:
            result = adapter(kernels, *args, **kwargs)
        except Exception as error:
            result = counter.reason_of_failure(kernels.name, error)
        # Outside of the except block: the exception's frames would keep its tensors alive while
        # stock runs, and the exception may be that memory is short.
        if isinstance(result, str):
            counter.count_declined(result)
            _thread.in_declined_call = True
            try:
                return run_stock(keyset, *args, **kwargs)
            finally:
                _thread.in_declined_call = False
        counter.count_served()
        return result

    return route


def _warn_of_python_override(op: str, dispatch_key: str) -> None:
    """Warn if what is about to be captured as stock is another library's Python kernel."""
    overrides = getattr(torch.library, "_impls", ())
    if f"aten/{op}/{dispatch_key}" in overrides:
        warnings.warn(
            f"aten::{op} ({dispatch_key}) is already overridden from Python. Calls that are "
            "declined run on that kernel rather than on torch's own, and fail once it is taken "
            "away: restore it before activating, or deactivate and uninstall() before removing "
            "it.",
            RuntimeWarning,
            stacklevel=4,
        )


def _forget_python_overrides(library: Any) -> None:
    """Let torch's own FA3 and FA4 be registered on top of the routers.

    Before 2.13 they register without `allow_override`, and torch refuses a second Python kernel
    at a key that its bookkeeping lists. The dispatcher itself stacks kernels well, so dropping our
    keys from the bookkeeping is all it takes.
    """
    overrides = getattr(torch.library, "_impls", None)
    own = getattr(library, "_op_impls", None)
    if overrides is not None and own is not None and _registers_without_override():
        overrides.difference_update(own)


def _registers_without_override() -> bool:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return (major, minor) < (2, 13)
