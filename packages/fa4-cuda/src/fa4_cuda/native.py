"""The native kernels in torch's dispatcher: served calls run no Python (`csrc/glue`).

What they do not serve is handed on to an operator of this module's, `fa4_cuda_declined::<op>`, of
the same schema, whose kernel is the registry's router: it counts the reason, and calls torch's own
kernel or raises.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fa4_cuda.library import load

if TYPE_CHECKING:
    from flash_attention_registry.sdpa import NativeKernels
    from flash_attention_registry.sdpa.native import Route

__all__ = ["NATIVE", "NativeOps", "signature_of"]

NAMESPACE = "fa4_cuda_declined"

_LETTERS = {"Tensor": "T", "float": "f", "int": "i", "SymInt": "i", "bool": "b"}


def signature_of(schema: torch.FunctionSchema) -> str:
    """A schema in the letters of `csrc/glue/ops.h`, with a question mark for what they lack."""
    arguments = "".join(_letter_of(argument.real_type) for argument in schema.arguments)
    results = "".join(_letter_of(result.real_type) for result in schema.returns)
    return f"{arguments}->{results}"


def _letter_of(kind: Any) -> str:
    text = str(kind)
    optional = text.startswith("Optional[")
    if optional:
        text = text.removeprefix("Optional[").removesuffix("]")
    return _LETTERS.get(text, "?") + ("?" if optional else "")


class NativeOps:
    """The native kernels at one dispatch key, as `flash_attention_registry.sdpa` switches them."""

    def __init__(
        self, dispatch_key: str = "CUDA", library: Callable[[], ctypes.CDLL] = load
    ) -> None:
        """Nothing is registered yet.

        Args:
            dispatch_key: Another than CUDA is for tests, which have no GPU.
            library: Loads the shared library; likewise.
        """
        self._dispatch_key = dispatch_key
        self._load = library
        # Any: torch's Library has no annotations.
        self._declined: Any = None

    def put_in(self, routes: Mapping[str, Route]) -> Collection[str]:
        """Register the native kernels above the routers, and the operators that they go on to.

        Raises:
            RuntimeError: This torch lacks a function of its stable C interface, or refuses.
        """
        missing = self._load().fa4_torch_find()
        if missing is not None:
            raise RuntimeError(
                f"torch {torch.__version__} lacks {missing.decode()}, which fa4-cuda calls; "
                "it needs torch 2.11 or newer"
            )
        make_library: Any = torch.library.Library
        self._declined = make_library(NAMESPACE, "FRAGMENT")
        self._hear_of_overrides()
        taken = []
        for op, route in routes.items():
            schema = getattr(torch.ops.aten, op).default._schema
            self._define(op, schema, route)
            result = self._load().fa4_torch_put_in(
                self._dispatch_key.encode(), op.encode(), signature_of(schema).encode()
            )
            if result < 0:
                self.take_out()
                raise RuntimeError(f"torch {torch.__version__} refuses a kernel for aten::{op}")
            if result:
                taken.append(op)
        return taken

    def switch(self, on: bool) -> None:
        """Serve calls from now on, or none."""
        self._load().fa4_torch_switch(on)

    def served(self, op: str) -> int:
        """How many calls of `op` were served since the process started."""
        return int(self._load().fa4_torch_served(op.encode()))

    def take_out(self) -> None:
        """Take the native kernels out of the dispatcher, and the operators that they went on to."""
        self._load().fa4_torch_take_out()
        if self._declined is not None:
            self._declined._destroy()
            self._declined = None

    def _hear_of_overrides(self) -> None:
        """Let torch tell now, of an operator of ours, that kernels are overridden.

        It tells once per process. Of an override from C++ it would print it on the terminal, past
        Python's filters.
        """
        self._declined.define("_override() -> ()")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                self._declined.impl("_override", lambda: None, "CPU", allow_override=True)

    def _define(self, op: str, schema: torch.FunctionSchema, route: Route) -> None:
        definition = str(schema).removeprefix("aten::")
        kernel = _declined_kernel(route, len(schema.returns), self._load())
        if "SymInt max_q," in definition.rpartition("->")[2]:
            # One result more, for the reason that dispatch.cpp tells.
            definition = definition[:-1] + ", Tensor)"
            kernel = _with_one_more_result(kernel)
        self._declined.define(definition)
        self._declined.impl(op, kernel, "CompositeExplicitAutograd", with_keyset=True)
        # Autograd is outside of the op that was declined.
        for key in ("Autograd", "ADInplaceOrView"):
            self._declined.impl(op, torch.library.fallthrough_kernel, key)


NATIVE: NativeKernels = NativeOps()
"""Those of this process at the CUDA key."""


def _declined_kernel(route: Route, results: int, library: ctypes.CDLL) -> Any:
    """What runs a declined call: the router, whose error is handed to the native kernel below."""
    nothing: Any = None if results == 1 else (None,) * results

    def declined(keyset: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        try:
            return route(keyset, *args, **kwargs)
        except BaseException as error:
            _leave(error, library)
        return nothing

    return declined


def _with_one_more_result(kernel: Any) -> Any:
    return lambda *args, **kwargs: (*kernel(*args, **kwargs), None)


_raised: set[type[BaseException]] = set()


def _leave(error: BaseException, library: ctypes.CDLL) -> None:
    """Let the native kernel that this is called from raise an exception of this type and text."""
    kind, text = type(error), str(error)
    try:
        kind(text)
    except Exception:  # it is made of more than a text
        kind, text = RuntimeError, f"{kind.__name__}: {text}"
    _raised.add(kind)  # which keeps it alive
    library.fa4_torch_raise(id(kind), text.encode(errors="replace"))
