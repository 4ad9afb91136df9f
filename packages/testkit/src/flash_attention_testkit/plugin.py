"""The pytest plugin: loaded by pytest wherever the testkit is installed, and light for that.

It imports neither torch nor the registry: the fixture imports the registry when a test asks for it,
and torch is imported when a test is marked ``gpu``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from flash_attention_registry import Registry

pytest.register_assert_rewrite("flash_attention_testkit.parity")


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker ``gpu`` known, so that ``--strict-markers`` accepts it."""
    config.addinivalue_line(
        "markers", "gpu: needs a CUDA device; skipped, with the reason, where there is none"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where they cannot run, and say why."""
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    reason = _why_no_gpu() if marked else None
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str | None:
    try:
        import torch
    except ModuleNotFoundError:
        return "needs torch, which is not installed"
    if not torch.cuda.is_available():
        return f"needs a CUDA device, and torch {torch.__version__} finds none"
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y"):
        return "Triton interprets in this process; GPU tests run in their own: pytest -m gpu"
    return None


@pytest.fixture
def flash_attention_registry_reset() -> Iterator[Registry]:
    """The process's registry, put back afterwards to what it was before the test.

    The test may register, activate and leave active what it likes. Afterwards its implementation
    is removed through its handle, and registrations, listeners and the scan of installed providers
    are as they were, as is the implementation that was active. The test errs if an implementation
    of it cannot be removed, or if kernels it installed still serve torch's operators.
    """
    from flash_attention_registry import default_registry

    registry = default_registry()
    before = registry.snapshot()
    active = registry.current()
    serving = _serving_kernels()
    yield registry
    registry.reset(before)  # a RestoreError leaves it only when the rest has been put back
    if registry.current() != active:
        pytest.fail(
            f"{registry.current()!r} is active after the test, {active!r} was before; something "
            "activates implementations while the registry is reset, such as a running thread"
        )
    left = [
        f"{kernels.name} on {device_type}"
        for device_type, kernels in _serving_kernels().items()
        if active is None and kernels is not serving.get(device_type)
    ]
    if left:
        pytest.fail(
            f"nothing is active, but torch's attention is still served by {', '.join(left)}; the "
            "handle that register_fn returned must remove everything that it installed"
        )


def _serving_kernels() -> dict[str, Any]:
    """The kernel sets that stand behind torch's operators now, by device type."""
    if "flash_attention_registry.sdpa" not in sys.modules:  # nothing can be installed
        return {}
    from flash_attention_registry.sdpa import installed_kernel_sets

    return dict(installed_kernel_sets())
