"""The Python kernel that stands at one op and dispatch key, and what it reads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from flash_attention_registry.environment import STRICT
from flash_attention_registry.errors import CallDeclinedError

from .counters import OpCounter, warn_or_log
from .native import NativeKernels, Route
from .ops import Adapter
from .serving import ActiveKernels
from .watch import watches

__all__ = ["Slot", "make_route"]

_SERVING = "serving"
_ON_STOCK = "on stock"
_NESTED = "called from inside a kernel set"


class Slot:
    """What the routers of one device type read.

    Attributes:
        kernels: The installed kernel set; None is stock.
        awaiting: What the next call on stock is to do first, until it says that it is done: it may
            install a kernel set.
        library: The `torch.library.Library` that holds the routers, None if they are not in.
        routes: The routers, by op.
        natives: The native kernels that stand above the routers, switched on or not.
        texts: What torch said about each op's kernel when it had just been put in: a router, or
            the native kernel above it.
    """

    __slots__ = ("awaiting", "kernels", "library", "natives", "routes", "texts")

    def __init__(self) -> None:
        """Start on stock, without routers."""
        self.kernels: ActiveKernels | None = None
        self.awaiting: Callable[[], bool] | None = None
        # Any: torch's Library has no annotations.
        self.library: Any = None
        self.routes: dict[str, Route] = {}
        self.natives: list[NativeKernels] = []
        self.texts: dict[str, str | None] = {}

    def switch(self, kernels: ActiveKernels | None) -> None:
        """Install `kernels` and what takes calls for them, in place of what is there."""
        if self.kernels is not None and self.kernels.native is not None:
            self.kernels.native.switch(False)
        self.kernels = kernels
        if kernels is not None and kernels.native is not None:
            kernels.native.switch(True)

    def settle(self) -> ActiveKernels | None:
        """Do what is awaited and return what is installed then.

        It is done again at the next call if it raises or is not done yet, and not in calls that it
        makes itself.
        """
        awaiting = self.awaiting
        if awaiting is not None and _thread.inside is None and not _thread.settling:
            _thread.settling = True
            try:
                done = awaiting()
            finally:
                _thread.settling = False
            if done and self.awaiting is awaiting:
                self.awaiting = None
        return self.kernels


class _Thread(threading.local):
    """What this thread is inside of: None, a kernel set, or stock after a declined call.

    A kernel set may use torch's attention itself, and would meet its own router. Stock's SDPA
    kernels call the general flash ops through the dispatcher, and meet a router too: what was
    declined stays declined, and is counted once. Settling what is awaited may use attention too.
    """

    inside: str | None = None
    settling = False


_thread = _Thread()


def make_route(
    op: str,
    dispatch_key: str,
    adapter: Adapter,
    slot: Slot,
    stock: Callable[..., Any] | None,
    counter: OpCounter,
) -> Route:
    """Make the Python kernel of one op: it reads the slot, serves or goes to stock.

    Args:
        op: The op's name, without `aten::`.
        dispatch_key: Where the kernel will stand.
        adapter: Serves the op's calls or says why not.
        slot: Holds the kernel set.
        stock: The kernel to go to, None if this build of torch has none.
        counter: Counts the op's calls.

    Returns:
        A function that takes the dispatch keys and the op's arguments.
    """
    run_stock = _missing_stock(op, dispatch_key) if stock is None else stock

    def on_stock(*args: Any, **kwargs: Any) -> Any:
        before = _thread.inside
        try:
            _thread.inside = _ON_STOCK
            return run_stock(*args, **kwargs)
        finally:
            _thread.inside = before

    def route(keyset: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        kernels = slot.kernels
        if kernels is None:
            if slot.awaiting is not None:
                kernels = slot.settle()
            if kernels is None:
                return run_stock(keyset, *args, **kwargs)
        inside = _thread.inside
        if inside is not None:
            if inside is _ON_STOCK:
                return run_stock(keyset, *args, **kwargs)
            counter.count_declined(_NESTED)
            return on_stock(keyset, *args, **kwargs)
        warning = None
        try:
            _thread.inside = _SERVING
            result = adapter(kernels, *args, **kwargs)
        except Exception as error:
            if kernels.strict:
                raise
            result, warning = counter.note_failure(kernels.name, error)
        finally:
            _thread.inside = None
        if watches:
            reason = result if isinstance(result, str) else None
            for watch in tuple(watches):
                watch.note(op, args, reason)
        if not isinstance(result, str):
            counter.count_served()
            return result
        # Outside of the except block: the exception's frames would keep its tensors alive while
        # stock runs, and the exception may be that memory is short.
        counter.count_declined(result)
        if kernels.strict:
            raise CallDeclinedError(
                f"{kernels.name} does not serve this call of aten::{op}: {result}. It is an error "
                f"because {STRICT} is set; unset it to let torch's own kernel run such calls."
            )
        try:
            return on_stock(keyset, *args, **kwargs)
        finally:
            if warning is not None:
                warn_or_log(warning)

    return route


def _missing_stock(op: str, dispatch_key: str) -> Callable[..., Any]:
    """Stand in for the kernel that this build of torch lacks."""

    def missing_stock(*_args: object, **_kwargs: object) -> Any:
        raise RuntimeError(
            f"aten::{op} was called for {dispatch_key} and no kernel set served it, but this "
            f"build of torch ({torch.__version__}) has no {dispatch_key} kernel to fall back to; "
            "dispatch_counts() names the reason of a declined call"
        )

    return missing_stock
