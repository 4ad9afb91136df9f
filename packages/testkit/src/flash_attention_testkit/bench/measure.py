"""One cell after the other: every implementation's figures in it, or why it has none."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from flash_attention_testkit.bench.backends import check_served, operation, running_on, why
from flash_attention_testkit.bench.grids import Cell
from flash_attention_testkit.bench.timing import (
    Clock,
    Contestant,
    CudaClock,
    HostClock,
    Spread,
    host_microseconds,
    interleaved,
    repeats_for,
)

__all__ = ["CellFigures", "Figures", "ceilings", "clock_of", "measure_cell", "small_call_times"]


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of one implementation in one cell.

    Attributes:
        ms: Time of one run on the device.
        host_us: The host's time for one call.
        peak_mib: Memory that one call takes beyond its inputs; None where it is not counted.
    """

    ms: Spread
    host_us: float
    peak_mib: float | None


@dataclass(slots=True)
class CellFigures:
    """Figures by implementation, and reasons of those without."""

    measured: dict[str, Figures] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def clock_of(device: str) -> Clock:
    """The clock of a device type."""
    return CudaClock() if device == "cuda" else HostClock()


def measure_cell(
    cell: Cell, names: Sequence[str], rounds: int, device: str, clock: Clock
) -> CellFigures:
    """Measure every implementation in one cell, in turns.

    Args:
        cell: What to run.
        names: Of `backends.STOCK`, or registered.
        rounds: Turns of each.
        device: `"cuda"` or `"cpu"`.
        clock: Of that device.
    """
    result = CellFigures()
    contestants: dict[str, Contestant] = {}
    for name in names:
        try:
            contestants[name] = _contestant(cell, name, device)
        except Exception as error:
            result.skipped[name] = why(error)
    # The interpreter takes seconds for a run: one is a turn there.
    repeats: Callable[[float], int] = repeats_for if device == "cuda" else lambda _ms: 1
    times, failed = interleaved(contestants, clock, rounds, repeats, why)
    result.skipped.update(failed)
    for name, taken in times.items():
        spread = Spread.of(taken)
        # A batch of at most 50 ms: the device's queue takes it without making the host wait.
        calls = max(1, min(10, int(50 / max(spread.median, 1e-3))))
        try:
            with contestants[name].scope():
                run = contestants[name].run
                host = host_microseconds(run, clock, calls, 7 if device == "cuda" else 1)
                result.measured[name] = Figures(spread, host, _peak_mib(run, device))
        except Exception as error:
            result.skipped[name] = why(error)
    return result


def _contestant(cell: Cell, name: str, device: str) -> Contestant:
    """Prepare a cell for one implementation and see that its kernels really run."""
    said = ""
    try:
        # Torch says in warnings why a backend cannot run, and in the error only that none can.
        with warnings.catch_warnings(record=True) as caught, running_on(name):
            warnings.simplefilter("always")
            try:
                run = operation(cell, name, device)
                check_served(name, device, run)
            finally:
                said = "; ".join(str(one.message).partition(" (Triggered")[0] for one in caught)
    except RuntimeError as error:
        raise RuntimeError(f"{error} {said}") from error
    return Contestant(run, functools.partial(running_on, name))


def _peak_mib(run: Callable[[], object], device: str) -> float | None:
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def small_call_times(names: Sequence[str], device: str, clock: Clock) -> dict[str, float]:
    """Host microseconds of one call of SDPA without gradients, `[1, 8, 128, 64]` bf16 causal.

    The GPU is faster than the host here, so this is what a small call costs.
    """
    tensor = torch.randn(1, 8, 128, 64, device=device, dtype=torch.bfloat16)

    def call() -> object:
        return F.scaled_dot_product_attention(tensor, tensor, tensor, is_causal=True)

    taken = {}
    calls, batches = (30, 15) if device == "cuda" else (1, 1)
    for name in names:
        try:
            with torch.no_grad(), running_on(name), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check_served(name, device, call)
                taken[name] = round(host_microseconds(call, clock, calls, batches), 1)
        except Exception:  # its rows say why
            continue
    return taken


def ceilings(device: str, clock: Clock) -> dict[str, float]:
    """What this device gives: TFLOP/s of a bf16 matrix product, GB/s read and written by a copy."""
    side, numbers, repeats = (8192, 1 << 30, 10) if device == "cuda" else (512, 1 << 22, 3)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    tasks = {
        "product": Contestant(lambda: a @ b),
        "copy": Contestant(lambda: target.copy_(source)),
    }
    times, failed = interleaved(tasks, clock, 5, lambda _ms: repeats, why)
    found = {}
    if "product" not in failed:
        product = Spread.of(times["product"]).median
        found["matmul_tflops"] = float(f"{2 * side**3 / product / 1e9:.4g}")
    if "copy" not in failed:
        found["copy_gbs"] = float(f"{8 * numbers / Spread.of(times['copy']).median / 1e6:.4g}")
    return found
