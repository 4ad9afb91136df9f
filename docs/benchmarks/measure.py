"""Measure an implementation against torch's flash and cuDNN kernels, in one process, on one GPU.

    python docs/benchmarks/measure.py fa4-triton --commit "$(git rev-parse HEAD)" --output a.json

The grid is the FlashAttention papers': 16384 tokens, 2048 = heads * head_dim, bf16, head dims 64,
128 and 256, sequences of 1024, 4096 and 16384, with and without causal mask, forward and backward.
FLOPs are counted as there: 4 B H S^2 D forward, half of it under a causal mask, 2.5 times that
backward. Cards run at their power cap, so whoever is timed first runs cooler: implementations take
turns in rounds, the order rotates from round to round, and a cell's figure is the median of rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attention_registry import use_flash_attention_impl

TOKENS = 16384
WIDTH = 2048  # heads * head_dim
HEAD_DIMS = (64, 128, 256)
SEQ_LENS = (1024, 4096, 16384)
STOCK = {
    "torch:flash": SDPBackend.FLASH_ATTENTION,
    "torch:cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid."""

    direction: str
    head_dim: int
    seq_len: int
    causal: bool
    batch: int
    heads: int
    kv_heads: int
    dtype: str = "bfloat16"

    @property
    def flops(self) -> float:
        """Operations of one run, as the papers count them."""
        forward = 4.0 * self.batch * self.heads * self.seq_len**2 * self.head_dim
        if self.causal:
            forward /= 2
        return forward if self.direction == "forward" else 2.5 * forward


def grid() -> Iterator[Cell]:
    """The papers' grid, forward first."""
    for direction in ("forward", "backward"):
        for head_dim in HEAD_DIMS:
            for seq_len in SEQ_LENS:
                for causal in (False, True):
                    heads = WIDTH // head_dim
                    yield Cell(
                        direction, head_dim, seq_len, causal, TOKENS // seq_len, heads, heads
                    )


@contextlib.contextmanager
def running_on(impl: str) -> Iterator[None]:
    """Plain SDPA runs on `impl` inside: one of `STOCK`, or a registered implementation."""
    if impl in STOCK:
        with sdpa_kernel(STOCK[impl]):
            yield
    else:
        with use_flash_attention_impl(impl):
            yield


def operation(cell: Cell, impl: str, tensors: list[Tensor], grad: Tensor) -> Callable[[], Any]:
    """What is timed: a call of SDPA, or of the gradients of one."""
    if cell.direction == "forward":
        plain = [tensor.detach() for tensor in tensors]
        return lambda: F.scaled_dot_product_attention(*plain, is_causal=cell.causal)
    with running_on(impl):
        out = F.scaled_dot_product_attention(*tensors, is_causal=cell.causal)
    return lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True)


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Mean time of one run on the GPU, over `repeats` in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def measure(cell: Cell, impls: list[str], rounds: int) -> dict[str, float]:
    """Median milliseconds of each implementation in one cell."""
    torch.manual_seed(0)
    shape = (cell.batch, cell.seq_len, cell.heads, cell.head_dim)
    q, k, v, grad = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)
    )
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    runs = {impl: operation(cell, impl, tensors, grad) for impl in impls}
    repeats = {}
    for impl, run in runs.items():
        with running_on(impl):
            milliseconds(run, 3)
            repeats[impl] = max(3, min(100, round(25 / milliseconds(run, 3))))
    times: dict[str, list[float]] = {impl: [] for impl in impls}
    for turn in range(rounds):
        first = turn % len(impls)
        for impl in impls[first:] + impls[:first]:
            with running_on(impl):
                times[impl].append(milliseconds(runs[impl], repeats[impl]))
    return {impl: statistics.median(taken) for impl, taken in times.items()}


def host_microseconds(run: Callable[[], Any], calls: int = 300) -> float:
    """Median over batches of the host's time for one call, the GPU drained between batches."""
    batches = []
    for _ in range(15):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls // 10):
            run()
        batches.append((time.perf_counter() - begin) / (calls // 10) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(batches[1:])


def host_times(impl: str) -> dict[str, float]:
    """Host microseconds of one SDPA call without gradients, [1, 8, 128, 64] bf16 causal.

    Before anything was installed; through the routers with nothing active; and served.
    """
    x = torch.randn(1, 8, 128, 64, device="cuda", dtype=torch.bfloat16)

    def call() -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    taken: dict[str, float] = {}
    with torch.no_grad():
        for name, backend in STOCK.items():
            with sdpa_kernel(backend):
                host_microseconds(call)
                taken[f"stock {name}"] = host_microseconds(call)
        with use_flash_attention_impl(impl):
            host_microseconds(call)
            taken[f"served {impl}"] = host_microseconds(call)
        for name, backend in STOCK.items():
            with sdpa_kernel(backend):
                host_microseconds(call)
                taken[f"empty router {name}"] = host_microseconds(call)
    return {name: round(value, 1) for name, value in taken.items()}


def ceilings() -> dict[str, float]:
    """What this card gives: TFLOP/s of a bf16 matrix product, GB/s read and written by a copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    product = statistics.median(milliseconds(lambda: a @ b, 20) for _ in range(5))
    copy = statistics.median(milliseconds(lambda: target.copy_(source), 5) for _ in range(5))
    return {
        "matmul_tflops": round(2 * 8192**3 / product / 1e9, 1),
        "copy_gbs": round(2 * 4 * source.numel() / copy / 1e6, 1),
    }


def environment(commit: str) -> dict[str, str]:
    """What the figures depend on."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": triton.__version__,
        "git_commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def summary(rows: list[dict[str, Any]], impl: str) -> str:
    """Geometric mean and worst cell of the ratios to torch's flash and cuDNN."""
    lines = []
    for direction in ("forward", "backward"):
        mine = [row for row in rows if row["impl"] == impl and row["direction"] == direction]
        for base in ("ratio_to_flash", "ratio_to_cudnn"):
            ratios = [row[base] for row in mine]
            mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
            lines.append(f"{direction} {base}: geometric mean {mean:.3f}, worst {min(ratios):.3f}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("impl", help="a registered implementation, such as fa4-triton")
    parser.add_argument("--commit", required=True, help="git commit of the measured code")
    parser.add_argument("--output", type=Path, required=True, help="where the JSON record goes")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    impls = [*STOCK, options.impl]
    host = host_times(options.impl)  # first: "stock" means nothing has been installed yet
    print(json.dumps(host, indent=1), flush=True)
    rows: list[dict[str, Any]] = []
    for cell in grid():
        taken = measure(cell, impls, options.rounds)
        for impl in impls:
            row = {
                "impl": impl,
                **asdict(cell),
                "ms": round(taken[impl], 4),
                "tflops": round(cell.flops / taken[impl] / 1e9, 1),
                "ratio_to_cudnn": round(taken["torch:cudnn"] / taken[impl], 3),
                "ratio_to_flash": round(taken["torch:flash"] / taken[impl], 3),
            }
            rows.append(row)
        last = rows[-1]
        print(
            f"{cell.direction:8} D {cell.head_dim:3} S {cell.seq_len:5} "
            f"{'causal' if cell.causal else 'full':6} {last['tflops']:6.1f} TFLOP/s, "
            f"{last['ratio_to_flash']:.2f} x flash, {last['ratio_to_cudnn']:.2f} x cuDNN",
            flush=True,
        )
    print(summary(rows, options.impl))
    record = {
        "environment": environment(options.commit),
        "ceilings": ceilings(),
        "host_us": host,
        "rows": rows,
    }
    print(record["ceilings"])
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
