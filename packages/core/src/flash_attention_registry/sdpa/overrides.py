"""What else stands in the dispatcher at the ops that are routed, and what goes past it.

Torch does not say whose kernel would run, so its bookkeeping of Python kernels is read where it is
there, and what it says about a kernel: the line that registered it.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

from .torch_internals import INDUCTOR_CONFIG, cpp_wrapper, keys_of, python_kernels

__all__ = [
    "forget_python_overrides",
    "is_overridden_from_python",
    "kernel_text",
    "warn_of_bypass",
    "warn_of_python_override",
    "why_bypassed",
]


def kernel_text(op: str, dispatch_key: str) -> str | None:
    """What torch says about the kernel that it would run: the line that registered it.

    None if it says something else at each look, such as an address.
    """
    looks = [torch.library.get_kernel(f"aten::{op}", dispatch_key) for _ in range(2)]
    text, again = map(repr, looks)
    return text if text == again else None


def is_overridden_from_python(op: str, dispatch_key: str) -> bool:
    """Whether torch's bookkeeping lists a Python kernel there."""
    return f"aten/{op}/{dispatch_key}" in (python_kernels() or ())


def warn_of_python_override(op: str, dispatch_key: str) -> None:
    """Warn if what is about to be captured as stock is another library's Python kernel."""
    if is_overridden_from_python(op, dispatch_key):
        warnings.warn(
            f"aten::{op} ({dispatch_key}) is already overridden from Python. Calls that are "
            "declined run on that kernel rather than on torch's own, and fail once it is taken "
            "away: restore it before activating, or deactivate and uninstall() before removing "
            "it.",
            RuntimeWarning,
            stacklevel=4,
        )


def forget_python_overrides(library: Any) -> None:
    """Let torch's own FA3 and FA4 be registered on top of the routers.

    Before 2.13 they register without `allow_override`, and torch refuses a second Python kernel
    at a key that its bookkeeping lists. The dispatcher itself stacks kernels well, so dropping our
    keys from the bookkeeping is all it takes.
    """
    overrides, own = python_kernels(), keys_of(library)
    if overrides is not None and own is not None and _registers_without_override():
        overrides.difference_update(own)


def _registers_without_override() -> bool:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return (major, minor) < (2, 13)


def why_bypassed() -> str | None:
    """Why code that `torch.compile` generates now would not reach any router, or None.

    With `cpp_wrapper`, Inductor's code calls torch's kernels themselves, not the dispatcher, in
    which every override of an op stands. AOTInductor's code always does.
    """
    # Once Inductor's configuration is loaded it is what counts; it has read the variable.
    configured = cpp_wrapper()
    where = f"{INDUCTOR_CONFIG}.cpp_wrapper"
    if configured is None:
        where = "TORCHINDUCTOR_CPP_WRAPPER=1"
        configured = os.environ.get("TORCHINDUCTOR_CPP_WRAPPER") == "1"
    if not configured:
        return None
    return (
        f"{where} is set: code that torch.compile generates calls torch's own kernels past the "
        "dispatcher, so compiled attention is not served. Switch it off to have it served; "
        "attention outside of compiled code is."
    )


def warn_of_bypass() -> None:
    """Warn the caller of `install` if code that is compiled now would not reach a router."""
    reason = why_bypassed()
    if reason is not None:
        warnings.warn(reason, RuntimeWarning, stacklevel=3)
