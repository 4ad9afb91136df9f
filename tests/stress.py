"""Calls attention from many threads while one more switches implementations as fast as it can.

    python stress.py SECONDS IMPLEMENTATION... [--device cuda] [--threads 8]

An implementation is `stock`, `plain-1` or `plain-2` (attention in float32), `plain-wrong` (whose
results are not attention's) or the name of an installed one. Every result is compared with
what stock gave before. Prints one line of JSON, the fields of `Outcome`; a crash is an exit status.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# The threads of this program are enough; torch's own would only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
from plain_kernels import HEAD_DIM, PlainKernels
from torch import Tensor

import flash_attention_registry as registry
from flash_attention_registry.sdpa import dispatch_counts, install, reset_dispatch_counts

STOCK = "stock"
# Of elements: what rounding to bfloat16 on different ways leaves of values around 1.
TOLERANCE = 5e-2
SHARE_OF_BACKWARDS = 0.4
# Queries, keys, heads of both, and whether the call is causal: no two threads' calls look alike.
SHAPES = [(32, 32, 2, 2, True), (48, 48, 4, 2, True), (33, 17, 2, 2, False), (64, 64, 2, 1, False)]


@dataclass
class Outcome:
    """What happened, in sum.

    Attributes:
        calls: Calls of scaled_dot_product_attention.
        backwards: How many of them were followed by a backward.
        wrong: Results that are not stock's within the tolerance.
        errors: What was raised, in threads and by switching; the first few.
        failed: How often something was raised.
        switches: Transitions of the registry.
        served: Forwards and backwards that kernel sets ran, as the registry counts them.
        served_by: The same as the plain kernel sets count them.
        declined: Calls that an active kernel set did not run, with the reasons.
        restored: Whether stock gives, in the end, the bits that it gave in the beginning.
    """

    calls: int = 0
    backwards: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    failed: int = 0
    switches: Counter[str] = field(default_factory=Counter)
    served: int = 0
    served_by: Counter[str] = field(default_factory=Counter)
    declined: dict[str, int] = field(default_factory=dict)
    restored: bool = False


class Problem:
    """One call, its gradients, and what stock makes of them."""

    def __init__(self, number: int, device: str) -> None:
        """Make inputs that no other number has, and let stock, which is active, solve it."""
        rows, columns, heads, kv_heads, self.causal = SHAPES[number % len(SHAPES)]
        generator = torch.Generator().manual_seed(number)

        def normal(heads: int, rows: int) -> Tensor:
            made = torch.randn(1, heads, rows, HEAD_DIM, generator=generator)
            return made.to(device, torch.bfloat16)

        self.inputs = [normal(heads, rows), normal(kv_heads, columns), normal(kv_heads, columns)]
        self.inputs = [tensor.requires_grad_() for tensor in self.inputs]
        self.grad_out = normal(heads, rows)
        self.expected = self.solve(backward=True)

    def solve(self, backward: bool) -> list[Tensor]:
        """Out, and the gradients if they are asked for."""
        out = F.scaled_dot_product_attention(*self.inputs, is_causal=self.causal, enable_gqa=True)
        if not backward:
            return [out.detach()]
        return [out.detach(), *torch.autograd.grad(out, self.inputs, self.grad_out)]

    def is_right(self, found: list[Tensor]) -> bool:
        """Whether results, as many as there are, are stock's within the tolerance."""
        return all(
            torch.allclose(mine, theirs, atol=TOLERANCE, rtol=TOLERANCE)
            for mine, theirs in zip(found, self.expected, strict=False)
        )


class Stress:
    """The threads, what stops them and what they report."""

    def __init__(self, implementations: list[str], device: str, threads: int) -> None:
        """Prepare problems on stock, and register the plain kernel sets."""
        self.implementations = implementations
        self.device = device
        self.threads = threads
        self.outcome = Outcome()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._problems = [Problem(number, device) for number in range(4 * threads)]
        self._plain = [
            PlainKernels("plain-1"),
            PlainKernels("plain-2"),
            PlainKernels("plain-wrong", factor=1.5),
        ]
        for kernels in self._plain:
            registry.register_flash_attention_impl(
                kernels.name,
                register_fn=lambda kernels=kernels: install(kernels, device),
            )

    def run(self, seconds: float) -> Outcome:
        """Run all threads for so long, then put stock back and add up."""
        self._activate_each_once()
        reset_dispatch_counts()
        for kernels in self._plain:
            kernels.served = 0
        workers = [threading.Thread(target=self._attend, args=(i,)) for i in range(self.threads)]
        workers.append(threading.Thread(target=self._switch))
        for worker in workers:
            worker.start()
        time.sleep(seconds)
        self._stop.set()
        for worker in workers:
            worker.join()
        self._change_to(STOCK)
        return self._add_up()

    def _activate_each_once(self) -> None:
        """Let what happens once, such as compiling, happen before it counts."""
        for name in self.implementations:
            self._change_to(name)
            for problem in self._problems[: len(SHAPES)]:
                problem.solve(backward=True)

    def _attend(self, number: int) -> None:
        """Call attention until it is time to stop, as thread `number`."""
        chance = random.Random(number)
        with contextlib.ExitStack() as stack:
            if self.device == "cuda":
                torch.cuda.synchronize()  # what the problems were made on is another stream
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
            while not self._stop.is_set():
                backward = chance.random() < SHARE_OF_BACKWARDS
                problem = chance.choice(self._problems)
                try:
                    right = problem.is_right(problem.solve(backward))
                except Exception:
                    self._note_error()
                    continue
                with self._lock:
                    self.outcome.calls += 1
                    self.outcome.backwards += backward
                    self.outcome.wrong += not right

    def _switch(self) -> None:
        """Change to an implementation at random until it is time to stop."""
        chance = random.Random(0)
        while not self._stop.is_set():
            name = chance.choice(self.implementations)
            try:
                self.outcome.switches[name] += self._change_to(name)
            except Exception:
                self._note_error()

    def _change_to(self, name: str) -> bool:
        """Make `name` the active one; tell whether it was not."""
        wanted = None if name == STOCK else name
        before = registry.current_flash_attention_impl()
        if wanted is not None:
            registry.activate_flash_attention_impl(wanted)
        elif before is not None:
            registry.restore_flash_attention_impl()
        after = registry.current_flash_attention_impl()
        if after != wanted:
            raise RuntimeError(f"{name} was asked for, and {after} is active")
        return before != after

    def _note_error(self) -> None:
        with self._lock:
            self.outcome.failed += 1
            if len(self.outcome.errors) < 5:
                self.outcome.errors.append(traceback.format_exc())

    def _add_up(self) -> Outcome:
        """Complete the outcome; stock is active and no other thread runs."""
        counts, outcome = dispatch_counts(), self.outcome
        outcome.served = counts.served
        outcome.served_by = Counter({k.name: k.served for k in self._plain if k.served})
        for op in counts:
            for reason, number in counts[op].declined.items():
                outcome.declined[f"{op}: {reason}"] = number
        outcome.restored = all(
            torch.equal(problem.solve(backward=False)[0], problem.expected[0])
            for problem in self._problems
        )
        return outcome


def main() -> None:
    """Read the arguments, run, print the outcome."""
    parser = argparse.ArgumentParser(description="Switch implementations under load.")
    parser.add_argument("seconds", type=float)
    parser.add_argument("implementations", nargs="+")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=8)
    options: Any = parser.parse_args()
    # A hundredth of the usual: threads are interrupted in more places.
    sys.setswitchinterval(5e-5)
    stress = Stress(options.implementations, options.device, options.threads)
    print(json.dumps(vars(stress.run(options.seconds))))


if __name__ == "__main__":
    main()
