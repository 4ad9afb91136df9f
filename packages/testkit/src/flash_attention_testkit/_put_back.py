"""The process's registry, torch's own and torch's attention ops: as they were before a test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flash_attention_registry import Registry, default_registry, torch_impls, torch_state


@contextmanager
def put_back() -> Iterator[Registry]:
    """Give the process's registry; afterwards undo what was done, and fail if that is in vain."""
    registry = default_registry()
    serving = _serving_kernels()  # first: it may import what goes on with a pending request
    covered = _ops_taken_over()
    torchs = _torchs_implementations()
    pending, awaited = registry.request.pending, registry.request._awaits_first_call
    before, active = registry.snapshot(), registry.current()
    yield registry
    if registry.request.pending != pending:
        registry.request.supersede()  # what the test left pending is not to be gone on with
    try:
        registry.reset(before)  # a RestoreError leaves it only when the rest has been put back
    finally:
        _restore_torchs_implementations(torchs)
        _restore_pending(registry, pending, awaited)
    if registry.current() != active:
        pytest.fail(
            f"{registry.current()!r} is active after the test, {active!r} was before; something "
            "activates implementations while the registry is reset, such as a running thread"
        )
    if active is None:
        _fail_if_served(serving)
    _fail_if_covered(covered)


def _fail_if_served(before: dict[str, Any]) -> None:
    left = [
        f"{kernels.name} on {device_type}"
        for device_type, kernels in _serving_kernels().items()
        if kernels is not before.get(device_type)
    ]
    if left:
        pytest.fail(
            f"nothing is active, but torch's attention is still served by {', '.join(left)}; the "
            "handle that register_fn returned must remove everything that it installed"
        )


def _fail_if_covered(before: dict[str, set[str]]) -> None:
    left = [
        f"aten::{op} on {device_type}"
        for device_type, ops in _ops_taken_over().items()
        for op in sorted(ops - before.get(device_type, set()))
    ]
    if left:
        pytest.fail(
            f"a kernel that was registered from Python during the test still stands at "
            f"{', '.join(left)}; whoever registered it must take it away again, a provider in "
            "the remove() of its handle"
        )


def _serving_kernels() -> dict[str, Any]:
    """The kernel sets that stand behind torch's operators now, by device type."""
    if not _torch_is_imported():  # nothing can be installed
        return {}
    from flash_attention_registry.sdpa import installed_kernel_sets

    return dict(installed_kernel_sets())


def _ops_taken_over() -> dict[str, set[str]]:
    """The ops at which a kernel stands that is neither torch's nor a router, by device type."""
    if not _torch_is_imported():
        return {}
    from flash_attention_registry.sdpa.ops import ROUTED_OPS
    from flash_attention_registry.sdpa.router import ops_taken_over

    return {device_type: set(ops_taken_over(device_type)) for device_type in ROUTED_OPS}


def _torch_is_imported() -> bool:
    return sys.modules.get("torch") is not None  # None: somebody hides it


def _torchs_implementations() -> dict[Any, Any]:
    """What torch's own registry lists; nothing as long as torch is not imported."""
    torch = torch_state.loaded()
    return {} if torch is None else dict(torch._FLASH_ATTENTION_IMPLS)


def _restore_torchs_implementations(before: dict[Any, Any]) -> None:
    """Let torch's registry list what it did, and what torch and our registry have added since.

    Torch registers its own when a module of it is imported, which may have happened meanwhile and
    happens once; ours are listed by our registry, which has been reset.
    """
    torch = torch_state.loaded()
    if torch is None:
        return
    implementations = torch._FLASH_ATTENTION_IMPLS
    kept = {name: fn for name, fn in implementations.items() if _is_torchs_or_ours(fn)}
    implementations.clear()
    implementations.update({**kept, **before})


def _is_torchs_or_ours(register_fn: object) -> bool:
    module = getattr(register_fn, "__module__", None) or ""
    return isinstance(register_fn, torch_impls.Activator) or module.startswith("torch.")


def _restore_pending(registry: Registry, pending: tuple[str, ...], awaited: bool) -> None:
    """Let pending be what of the environment's request was pending before the test."""
    request = registry.request
    if request.pending == pending:
        return
    request.ask(pending)
    request._awaits_first_call = awaited
    if pending and awaited and _torch_is_imported():
        from flash_attention_registry.sdpa.router import await_first_call

        # Who settled it during the test has ended the waiting for the first call.
        await_first_call("cuda", request.settle)
