"""One cell after the other: every implementation's figures in it, or why it has none."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from flash_attention_registry.sdpa.router import routed_ops
from flash_attention_testkit.bench.backends import (
    STOCK,
    Inputs,
    make_inputs,
    mode_of,
    operation,
    running_on,
    why,
)
from flash_attention_testkit.bench.grids import Cell
from flash_attention_testkit.bench.timing import (
    Clock,
    Contestant,
    CudaClock,
    HostClock,
    Spread,
    host_microseconds,
    interleaved,
)

__all__ = ["CellFigures", "Figures", "ceilings", "clock_of", "host_times", "measure_cell"]

CEILING_BUDGET_S = 0.5


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of one implementation in one cell.

    Attributes:
        ms: Time of one call on the device, over the rounds.
        rounds: How many there were.
        host_us: The host's time until a call returns.
        peak_mib: Memory that one call takes beyond its inputs; None where it is not counted.
    """

    ms: Spread
    rounds: int
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
    cell: Cell, names: Sequence[str], budget_s: float, device: str, clock: Clock
) -> CellFigures:
    """Measure every implementation in one cell, in turns.

    Args:
        cell: What to run.
        names: Of `backends.STOCK`, or registered.
        budget_s: Seconds for the rounds that count.
        device: `"cuda"` or `"cpu"`.
        clock: Of that device.

    Raises:
        StaysInstalledError: An implementation could not be left.
    """
    result = CellFigures()
    try:
        inputs = make_inputs(cell, device)
    except Exception as error:
        result.skipped = dict.fromkeys(names, f"its inputs cannot be made: {why(error)}")
        return result
    contestants: dict[str, Contestant] = {}
    for name in names:
        try:
            contestants[name] = _contestant(cell, inputs, name, device)
        except Exception as error:
            result.skipped[name] = why(error)
    turns, failed = interleaved(contestants, clock, budget_s, why)
    result.skipped.update(failed)
    for name, taken in turns.items():
        peak = None
        if device == "cuda":
            try:
                peak = _peak_mib(contestants[name])
            except Exception as error:
                result.skipped[name] = why(error)
                continue
        ms = Spread.of([turn.ms for turn in taken])
        host_us = Spread.of([turn.host_us for turn in taken]).median
        result.measured[name] = Figures(ms, len(taken), host_us, peak)
    return result


def _contestant(cell: Cell, inputs: Inputs, name: str, device: str) -> Contestant:
    """Prepare a cell for one implementation and see that its kernels really run."""
    said: list[str] = []
    try:
        # Torch says in warnings why a backend cannot run, and in the error only that none can.
        with warnings.catch_warnings(record=True) as caught, running_on(name, device):
            warnings.simplefilter("always")
            try:
                run = operation(cell, inputs, name)
                with mode_of(cell):
                    run()
            finally:
                said = [str(one.message).partition(" (Triggered")[0] for one in caught]
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not said:
            raise
        raise RuntimeError(f"{error} {'; '.join(said)}") from error
    return Contestant(run, functools.partial(_turn, cell, name, device))


@contextlib.contextmanager
def _turn(cell: Cell, name: str, device: str) -> Iterator[None]:
    """Where a contestant's calls run on its kernels, and as the cell asks."""
    with running_on(name, device), mode_of(cell):
        yield


def _peak_mib(contestant: Contestant) -> float:
    """Memory of one call on the current GPU beyond what was allocated before."""
    with contestant.scope():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contestant.run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def host_times(names: Sequence[str]) -> dict[str, float]:
    """Host microseconds of one call of SDPA without gradients, `[1, 8, 128, 64]` bf16 causal.

    The GPU is faster than the host here, so this is what a small call costs. Torch's kernels are
    timed twice: `stock` is before the registry stands at torch's ops, `empty router` when it does
    and nothing is active. If it did from the beginning, there is no `stock`.
    """
    tensor = torch.randn(1, 8, 128, 64, device="cuda", dtype=torch.bfloat16)

    def call() -> object:
        return F.scaled_dot_product_attention(tensor, tensor, tensor, is_causal=True)

    taken = {}
    stock = [name for name in names if name in STOCK]
    for name in [*stock, *(name for name in names if name not in STOCK), *stock]:
        served = "empty router" if routed_ops("cuda") else "stock"
        label = f"{served if name in STOCK else 'served'} {name}"
        try:
            with torch.no_grad(), warnings.catch_warnings(), running_on(name, "cuda"):
                warnings.simplefilter("ignore")
                found = host_microseconds(call, torch.cuda.synchronize, 30)
        except Exception as error:
            why(error)  # its rows say it; what ends everything is raised
        else:
            taken[label] = round(found, 1)
    return taken


def ceilings(clock: Clock) -> dict[str, float]:
    """What the GPU gives, if its memory suffices to see.

    Returns:
        `matmul_tflops` of an 8192 x 8192 x 8192 bf16 matrix product, and `copy_gbs`, bytes read
        and bytes written, of a copy of 1 GiB.
    """
    found = {}
    side, size = 8192, 1 << 30
    with contextlib.suppress(torch.OutOfMemoryError):
        a, b, product = (
            torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        ms = _alone(lambda: torch.mm(a, b, out=product), clock)
        found["matmul_tflops"] = float(f"{2 * side**3 / ms / 1e9:.4g}")
    with contextlib.suppress(torch.OutOfMemoryError):
        source, target = (torch.ones(size, device="cuda", dtype=torch.int8) for _ in range(2))
        ms = _alone(lambda: target.copy_(source), clock)
        found["copy_gbs"] = float(f"{2 * size / ms / 1e6:.4g}")
    return found


def _alone(run: Callable[[], object], clock: Clock) -> float:
    """Median milliseconds of a call that competes with nothing."""

    def fail(error: Exception) -> str:
        raise error

    turns, _ = interleaved({"": Contestant(run)}, clock, CEILING_BUDGET_S, fail)
    return Spread.of([turn.ms for turn in turns[""]]).median
