"""What a diagnosis asks of torch: facts, counts, what is in the way, a call that is really made."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from flash_attention_registry.default import (
    current_flash_attention_impl,
    use_flash_attention_impl,
)
from flash_attention_registry.doctor.findings import AttentionRun, Gpu, TorchFacts, Trap
from flash_attention_registry.errors import describe
from flash_attention_registry.registration import TORCH_PREFIX

from . import overrides, router
from .counters import dispatch_counts
from .ops import ROUTED_OPS
from .probe import (
    CAUSAL,
    NOT_ROUTED,
    active_on,
    backend_of,
    default_device_type,
    plain_torch,
    query_of,
    typical_calls,
)
from .watch import CallWatch

__all__ = ["counts", "run_once", "torch_facts", "traps", "typical_calls"]

Counts: TypeAlias = dict[str, dict[str, Any]]
"""By aten op: `served`, a number, and `declined`, numbers by reason."""


def torch_facts() -> TorchFacts:
    """Return what torch says of itself and of the GPUs that it sees."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(Gpu(index, properties.name, f"{properties.major}.{properties.minor}"))
    return TorchFacts(
        version=str(torch.__version__),
        cuda=torch.version.cuda,
        cudnn=None if cudnn is None else str(cudnn),
        driver=_driver(),
        gpus=tuple(gpus),
    )


def _driver() -> str | None:
    """Return the version of the NVIDIA driver where the system tells it: on Linux."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"Kernel Module .*?\s(\d+(?:\.\d+)+)\s", text)
    return None if found is None else found[1]


def counts() -> Counts:
    """Return `dispatch_counts()` without the ops that were not called."""
    return {
        op: {"served": count.served, "declined": dict(count.declined)}
        for op, count in dispatch_counts().items()
        if count.served or count.declined
    }


def traps() -> tuple[Trap, ...]:
    """Return what in torch, or between torch and a GPU, keeps kernels from being used."""
    found = []
    bypassed = overrides.why_bypassed()
    if bypassed is not None:
        found.append(Trap(bypassed, "What was compiled with it has to be compiled again."))
    interpreted = os.environ.get("TRITON_INTERPRET", "")
    if interpreted.lower() in ("1", "true", "yes", "on", "y") and torch.cuda.is_available():
        found.append(
            Trap(
                f"TRITON_INTERPRET={interpreted} is set and there is a GPU: Triton's kernels are "
                f"interpreted on the CPU, slowly, and do not serve calls on the GPU",
                "Unset it before Python starts.",
            )
        )
    if not (current_flash_attention_impl() or "").startswith(TORCH_PREFIX):
        found += [trap for device_type in ROUTED_OPS for trap in _override_traps(device_type)]
    return tuple(found)


def _override_traps(device_type: str) -> Iterator[Trap]:
    taken_over = router.ops_taken_over(device_type)
    if taken_over:
        yield Trap(
            f"another library's Python kernel stands in place of "
            f"{', '.join('aten::' + op for op in taken_over)} ({device_type}) and takes its calls",
            "Take its override away, and activate again what is to be used.",
        )


def run_once(name: str | None = None) -> AttentionRun:
    """Make one call of `scaled_dot_product_attention`, forward and backward, and see who served it.

    It is bfloat16 and causal, `[B, H, S, D]` = `[1, 4, 128, 64]`, on the GPU or, if there is none,
    on the CPU.

    Args:
        name: The implementation or family to activate meanwhile; None leaves what is active.

    Returns:
        What came of it, and of no other call that is made meanwhile. An error is in it and is not
        raised.
    """
    device_type = default_device_type()
    scope = nullcontext() if name is None else use_flash_attention_impl(name)
    active = made_on = None
    counted: Counts = {}
    try:
        with scope, plain_torch(device_type):
            installed = router.installed_kernel_sets()
            active, made_on = active_on(installed, device_type), device_type
            query = query_of(CAUSAL, device_type)
            with CallWatch(query) as watch:
                counted = watch.counts
                out = F.scaled_dot_product_attention(query, query, query, is_causal=True)
                torch.autograd.grad(out.float().square().sum(), query)
            backend = backend_of(CAUSAL, query, None)
    except (Exception, SystemExit) as error:
        return AttentionRun(name, active, made_on, False, counted, describe(error))
    served, reason = _verdict(active, sorted(installed), backend, counted)
    return AttentionRun(name, active, made_on, served, counted, reason)


def _verdict(
    active: str | None, installed: list[str], backend: str | None, counted: Counts
) -> tuple[bool | None, str | None]:
    """Return whether forward and backward were served, None if unknown, and why not."""
    if active is None:
        return None, "no implementation is active"
    if not installed:
        return None, f"{active} {NOT_ROUTED}"
    declined = [f"{op}: {why}" for op, count in counted.items() for why in count["declined"]]
    if declined:
        return False, "; ".join(declined)
    served = sum(count["served"] for count in counted.values())
    if served >= 2:
        return True, None
    which = "neither forward nor backward" if served == 0 else "only one of forward and backward"
    return False, (
        f"{which} reached {active}, which is installed for {', '.join(installed)}; torch chose "
        f"{backend or 'an unknown backend'}"
    )
