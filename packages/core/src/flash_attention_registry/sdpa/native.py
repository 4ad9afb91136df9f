"""Kernels that serve calls without Python: they stand in the dispatcher, above the routers.

A provider whose kernels can be reached from C++ registers them there itself, and gives `install` an
object by which that is done and switched. A call that they take never comes to a router. Everything
else, reasons, errors, strictness, stock, is the router's business as before: what native kernels do
not take they hand to the route of that op, with the arguments as they came.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, TypeAlias

__all__ = ["NativeKernels", "Route"]

Route: TypeAlias = Callable[..., Any]
"""Takes a call's dispatch keys (`torch.DispatchKeySet`) and arguments, gives its results."""


class NativeKernels(Protocol):
    """The native kernels of one provider at one dispatch key.

    One object lives as long as the process. Its methods are called one at a time, and only `put_in`
    and `take_out` while nothing is switched on.
    """

    def put_in(self, routes: Mapping[str, Route]) -> Collection[str]:
        """Register native kernels on top of the routers, switched off.

        Called once, or again after `take_out`. Other threads may be calling attention.

        Args:
            routes: By op name, without `aten::`: where calls go that are not taken.

        Returns:
            Names of the ops that now have a native kernel.

        Raises:
            Exception: Nothing is registered, and nothing is installed.
        """

    def switch(self, on: bool) -> None:
        """Take calls from now on, or none, without a change to the dispatcher."""

    def served(self, op: str) -> int:
        """How many calls of `op` were taken since the process started."""

    def take_out(self) -> None:
        """Take the native kernels out of the dispatcher; no thread is inside attention."""
