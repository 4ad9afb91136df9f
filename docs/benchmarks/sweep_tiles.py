"""Time candidate tiles of the portable Triton kernels: the evidence for the table in `tiles.py`.

    python docs/benchmarks/sweep_tiles.py --commit "$(git rev-parse HEAD)" --output sweep.json

Every candidate is compiled first, in a pool of processes, then checked against torch's flash
kernels and timed beside them, in rounds whose order rotates. A row's `share` is the kernel's time
over that of torch's forward (for `forward`) or of torch's whole backward (for the others: `dq` and
`dkdv`, or `dq`, `dk` and `dv` make one) on the same inputs: 16384 tokens, heads * head_dim = 2048,
bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fa4_triton.kernels.backward import dkdv_kernel, dq_kernel
from fa4_triton.kernels.forward import forward_kernel
from fa4_triton.launch import Variant
from fa4_triton.plan import Device, Request, plan_key_gradients, plan_queries
from fa4_triton.tiles import Kernel, Tile, architecture
from flash_attention_testkit.bench.environment import environment
from flash_attention_testkit.bench.grids import TOKENS, WIDTH
from flash_attention_testkit.bench.timing import Clock, CudaClock

LOG2_E = math.log2(math.e)
SHAPES = [(m, n) for m in (32, 64, 128) for n in (32, 64, 128) if m * n >= 2048]
OPTIONS = [(4, 2), (4, 3), (8, 2), (8, 3)]
KERNELS: dict[int, tuple[Kernel, ...]] = {
    64: ("forward", "dq", "dkdv"),
    128: ("forward", "dq", "dkdv"),
    256: ("forward", "dq", "dkdv", "dk", "dv"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """What a candidate is timed on."""

    head_dim: int
    seq_len: int
    causal: bool


class Inputs:
    """Tensors [B, S, H, D] of a problem, and what torch's flash kernels make of them."""

    def __init__(self, problem: Problem) -> None:
        """Draw them, and run stock."""
        torch.manual_seed(0)
        batch, heads = max(1, TOKENS // problem.seq_len), WIDTH // problem.head_dim
        shape = (batch, problem.seq_len, heads, problem.head_dim)
        self.problem = problem
        self.q, self.k, self.v, self.do = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)
        )
        aten = torch.ops.aten
        q, k, v, do = (tensor.transpose(1, 2) for tensor in (self.q, self.k, self.v, self.do))
        results = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, problem.causal)
        out, self.lse, *rest = results
        saved = (*rest[:4], 0.0, problem.causal, *rest[4:6])

        def stock_backward() -> Any:
            return aten._scaled_dot_product_flash_attention_backward(
                do, q, k, v, out, self.lse, *saved
            )

        self.out = out.transpose(1, 2)
        self.delta = (self.out.float() * self.do.float()).sum(-1).transpose(1, 2).contiguous()
        self.grads = [grad.transpose(1, 2) for grad in stock_backward()]
        self.stock = {
            "forward": lambda: aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, problem.causal
            ),
            "backward": stock_backward,
        }


def candidates(kernel: Kernel, head_dim: int) -> Iterator[Tile]:
    """Tiles worth a look: accumulators of at most 128 and at least 16 registers a thread."""
    accumulators = 2 if kernel == "dkdv" else 1
    for m, n in SHAPES:
        rows = m if kernel in ("forward", "dq") else n
        for warps, stages in OPTIONS:
            registers = accumulators * rows * head_dim / (32 * warps)
            if 16 <= registers <= 128 and m * n / (32 * warps) <= 64:
                yield Tile(m, n, warps, stages)


def runner(kernel: Kernel, shape: Tile, inputs: Inputs) -> tuple[Callable[[], None], list[Tensor]]:
    """(how to launch a candidate, its poisoned outputs)."""
    q, k, v, do = inputs.q, inputs.k, inputs.v, inputs.do
    scale = inputs.problem.head_dim**-0.5
    request = Request(q.shape, k.shape, inputs.problem.causal, None, None, None)
    properties = torch.cuda.get_device_properties(0)
    device = Device(
        architecture((properties.major, properties.minor)),
        properties.L2_cache_size,
        properties.multi_processor_count,
    )

    def poisoned(like: Tensor) -> Tensor:
        return torch.full_like(like, math.nan)

    stats: tuple[Tensor, ...]
    floats: tuple[float, ...] = (scale,)
    if kernel == "forward":
        outputs = [poisoned(q), poisoned(inputs.lse)]
        operands, stats = (q, k, v, outputs[0]), (outputs[1],)
        floats = (scale * LOG2_E, math.inf)
        function = forward_kernel
    elif kernel == "dq":
        outputs = [poisoned(q), poisoned(inputs.lse)]
        operands, stats = (q, k, v, do, inputs.out, outputs[0]), (inputs.lse, outputs[1])
        function = dq_kernel
    else:
        outputs = [poisoned(k), poisoned(v)]
        operands, stats = (q, k, v, do, *outputs), (inputs.lse, inputs.delta)
        function = dkdv_kernel
    strides = tuple(tensor.stride() for tensor in operands)
    aligned = (1 << len(operands)) - 1
    if kernel in ("forward", "dq"):
        plan = plan_queries(kernel, device, request, strides, aligned, shape=shape)
    else:
        plan = plan_key_gradients(kernel, device, request, strides, aligned, shape=shape)
    variant = Variant(function, plan.tile, plan.constants)
    tensors = (*operands, *stats, None, None)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    scalars = floats + plan.scalars
    return lambda: variant.launch(0, plan.programs, tensors, pointers, scalars), outputs


def error(kernel: Kernel, outputs: list[Tensor], inputs: Inputs) -> float:
    """Largest relative error against torch's kernels, NaN where something was not written."""
    expected: dict[str, list[Tensor]] = {
        "forward": [inputs.out, inputs.lse],
        "dq": [inputs.grads[0], inputs.delta],
        "dkdv": inputs.grads[1:],
    }
    if kernel == "dk":
        pairs = [(outputs[0], inputs.grads[1])]
    elif kernel == "dv":
        pairs = [(outputs[1], inputs.grads[2])]
    else:
        pairs = list(zip(outputs, expected[kernel], strict=True))
    errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs]
    return max(errors) if not any(map(math.isnan, errors)) else math.nan


def compile_one(job: tuple[Kernel, int, Tile]) -> str | None:
    """Compile a candidate, masked and not, into Triton's cache; why it cannot be, or None."""
    kernel, head_dim, shape = job
    try:
        for causal in (False, True):
            run, _ = runner(kernel, shape, Inputs(Problem(head_dim, 256, causal)))
            run()
        torch.cuda.synchronize()
    except Exception as reason:
        return f"{type(reason).__name__}: {reason}".splitlines()[0][:120]
    return None


def time_all(
    problem: Problem, jobs: list[tuple[Kernel, int, Tile]], rounds: int, clock: Clock
) -> Iterator[dict[str, Any]]:
    """One row for each candidate that is right."""
    inputs = Inputs(problem)
    runs: dict[Any, Callable[[], Any]] = dict(inputs.stock)
    for kernel, _, shape in jobs:
        run, outputs = runner(kernel, shape, inputs)
        run()
        found = error(kernel, outputs, inputs)
        if not found < 1e-2:
            print(f"wrong: {kernel} {shape} on {problem}: relative error {found}")
            continue
        runs[kernel, shape] = run
    names = list(runs)
    times: dict[Any, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn * len(names) // rounds
        for name in names[first:] + names[:first]:
            times[name].append(clock.turn(runs[name], 5).ms)
    taken = {name: statistics.median(values) for name, values in times.items()}
    for name in names:
        if isinstance(name, str):
            continue
        kernel, shape = name
        base = taken["forward" if kernel == "forward" else "backward"]
        yield {
            "kernel": kernel,
            **asdict(problem),
            **asdict(shape),
            "ms": round(taken[name], 4),
            "share": round(taken[name] / base, 3),
        }


def main() -> None:
    """Compile, check, time, print the best of each kernel, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--commit", required=True, help="git commit of the measured code")
    parser.add_argument("--output", type=Path, required=True, help="where the JSON record goes")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    jobs = [
        (kernel, head_dim, shape)
        for head_dim, kernels in KERNELS.items()
        for kernel in kernels
        for shape in candidates(kernel, head_dim)
    ]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        failures = dict(zip(jobs, pool.map(compile_one, jobs), strict=True))
    jobs = [job for job in jobs if failures[job] is None]
    clock = CudaClock()
    rows: list[dict[str, Any]] = []
    for head_dim, kernels in KERNELS.items():
        mine = [job for job in jobs if job[1] == head_dim]
        for seq_len in (1024, 4096):
            for causal in (False, True):
                problem = Problem(head_dim, seq_len, causal)
                rows += time_all(problem, mine, options.rounds, clock)
                for kernel in kernels:
                    best = sorted(
                        (row["share"], row["m"], row["n"], row["warps"], row["stages"])
                        for row in rows
                        if row["kernel"] == kernel
                        and (row["head_dim"], row["seq_len"], row["causal"])
                        == (head_dim, seq_len, causal)
                    )
                    print(f"{problem} {kernel}: {best[:4]}", flush=True)
    record = {
        "environment": environment("cuda", options.commit, ["fa4-triton"]),
        "failures": [
            {"kernel": kernel, "head_dim": head_dim, **asdict(shape), "reason": reason}
            for (kernel, head_dim, shape), reason in failures.items()
            if reason is not None
        ],
        "rows": rows,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
