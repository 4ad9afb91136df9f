"""Builds of the kernels beside each other and beside cuDNN, in one process on a Hopper GPU.

    python packages/fa4-cuda/build_kernels.py --define ON_TRIAL
    python packages/fa4-cuda/tests/compare_builds.py --direction backward \\
        --build shipped=packages/fa4-cuda/src/fa4_cuda/lib/libfa4_cuda.so \\
        --build trial=packages/fa4-cuda/build/ON_TRIAL/libfa4_cuda.so \\
        256:1024:full 256:1024:causal

For the choice between variants in the laboratory; records come from `flash-attention-bench`. A cell
is head_dim:length:mask, the mask `full`, `causal` or `window1024`: causal, with so many keys. All
have 16384 tokens and 2048 columns in bf16. Each round times everything once and begins with another
one, since the GPU runs at its power cap and the first to run would win. Printed are the TFLOP/s of
the median round and the ratio to cuDNN, or for windows, which it does not know, to the first build.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fa4_cuda import kernel_set
from fa4_cuda.kernel_set import CudaKernels
from fa4_cuda.library import load_from
from flash_attention_registry.sdpa import AttentionCall

TOKENS, COLUMNS = 16384, 2048
TURN_MS = 30.0
"""What is timed at once, at least."""

CELLS = [
    f"{head_dim}:{length}:{mask}"
    for head_dim in (64, 128, 256)
    for length in (1024, 4096, 16384)
    for mask in ("full", "causal")
]


class Cell(NamedTuple):
    """One problem."""

    head_dim: int
    length: int
    mask: str

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Read head_dim:length:mask."""
        head_dim, length, mask = text.split(":")
        if mask not in ("full", "causal") and not mask.removeprefix("window").isdecimal():
            raise argparse.ArgumentTypeError(f"{mask!r} is no mask: full, causal or window1024")
        return cls(int(head_dim), int(length), mask)

    def __str__(self) -> str:
        """As it is given."""
        return f"{self.head_dim}:{self.length}:{self.mask}"

    @property
    def window(self) -> int | None:
        """How many keys a row sees, if so."""
        return int(self.mask[6:]) if self.mask.startswith("window") else None

    def pairs(self) -> int:
        """Pairs of a row and a key that it sees, of one head."""
        if self.mask == "full":
            return self.length**2
        width = min(self.window or self.length, self.length)
        return width * self.length - width * (width - 1) // 2

    def call(self) -> AttentionCall:
        """The request, with fresh numbers."""
        batch, heads = TOKENS // self.length, COLUMNS // self.head_dim
        shape = (batch, self.length, heads, self.head_dim)
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        left = None if self.window is None else self.window - 1
        return AttentionCall(q, k, v, self.head_dim**-0.5, self.mask != "full", left)


def runs_of(
    cell: Cell, builds: dict[str, ctypes.CDLL], direction: str, deterministic: bool
) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    call, kernels = cell.call(), CudaKernels()
    out, lse = kernels.forward(call)
    grad_out = torch.randn_like(out)

    def ours(library: ctypes.CDLL) -> object:
        kernel_set.load = lambda: library
        if direction == "forward":
            return kernels.forward(call)
        return kernels.backward(call, grad_out, out, lse, deterministic=deterministic)

    runs: dict[str, Callable[[], object]] = {
        name: partial(ours, library) for name, library in builds.items()
    }
    if cell.window is None:
        runs = {"cuDNN": cudnn(call, grad_out, direction)} | runs
    return runs


def cudnn(call: AttentionCall, grad_out: Tensor, direction: str) -> Callable[[], object]:
    """The same by torch's cuDNN backend, heads first as torch has them."""
    q, k, v, upstream = (
        tensor.transpose(1, 2) for tensor in (call.query, call.key, call.value, grad_out)
    )
    leaves = [tensor.detach().requires_grad_(direction == "backward") for tensor in (q, k, v)]

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*leaves, is_causal=call.causal)

    if direction == "forward":
        return forward
    out = forward()
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def milliseconds(run: Callable[[], object], count: int) -> float:
    """Of one run, when `count` follow each other."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / count


def medians(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    counts = {}
    for name, run in runs.items():
        run()
        counts[name] = max(2, math.ceil(TURN_MS / milliseconds(run, 2)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(milliseconds(runs[name], counts[name]))
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Time the cells that are asked for, and tell the geometric means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--build", action="append", required=True, metavar="NAME=LIBRARY")
    parser.add_argument("--direction", choices=("forward", "backward"), default="backward")
    parser.add_argument("--deterministic", action="store_true", help="gradients that repeat")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("cells", nargs="*", type=Cell.parse, default=list(map(Cell.parse, CELLS)))
    options = parser.parse_args()
    paths = dict(one.split("=") for one in options.build)
    builds = {name: load_from(Path(path)) for name, path in paths.items()}
    products = 4 if options.direction == "forward" else 10
    logarithms: dict[str, list[float]] = {}
    print(torch.cuda.get_device_name(), options.direction)
    for cell in options.cells:
        runs = runs_of(cell, builds, options.direction, options.deterministic)
        found = medians(runs, options.rounds)
        base = next(iter(found.values()))
        work = products * cell.pairs() * TOKENS // cell.length * COLUMNS
        told = []
        for name, ms in found.items():
            told.append(f"{name} {work / ms / 1e9:.0f} ({base / ms:.3f})")
            logarithms.setdefault(name, []).append(math.log(base / ms))
        print(f"{cell}  " + "  ".join(told), flush=True)
    means = (f"{name} {math.exp(statistics.mean(x)):.3f}" for name, x in logarithms.items())
    print("geometric mean  " + "  ".join(means))


if __name__ == "__main__":
    main()
