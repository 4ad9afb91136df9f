"""What the registry does, shown on one small training: `hatch run demo`.

Prints what is installed and why it is or is not usable here, trains a transformer on torch's own
attention kernels and on an implementation from the registry, compares both with each other and
with float64, proves which kernels ran, and gives torch its own back. Ends with status 1 if any of
this does not hold.

Without a GPU the kernels run in Triton's interpreter, on the CPU: the results are right, and slow.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from byte_transformer import Size, Training, cut_batches, largest_gap, read_text, train
from console import Verdict, heading, progress, say, table
from one_call import (
    CAUSAL_ARGUMENTS,
    Inputs,
    attend,
    make_inputs,
    measure_parity,
    milliseconds,
    two_backends,
)
from torch import Tensor
from torch.nn.attention import sdpa_kernel

import flash_attention_registry as registry
from flash_attention_registry.sdpa import DispatchCounts, dispatch_counts, reset_dispatch_counts

ROOT = Path(__file__).resolve().parents[2]
FAMILY = "FA4"
EXACT_NAME = "fa4-triton"
STEPS = 32
SEED = 0

# What the interpreter does in 20 ms takes a GPU some microseconds.
SIZES = {
    "cpu": Size(layers=2, query_heads=4, key_heads=2, head_dim=32, batch=1, seq_len=64),
    "cuda": Size(layers=4, query_heads=8, key_heads=2, head_dim=64, batch=16, seq_len=1024),
}
# For parity: more than one block of keys, and a last one that is not full.
PARITY_SHAPES = {"cpu": (2, 113), "cuda": (2, 1000)}


class Demonstration:
    """What the sections share: the device, the model's size, the text, the findings."""

    def __init__(self, device: str, steps: int) -> None:
        """Read the text and make the inputs."""
        self.device = device
        self.steps = steps
        self.size = SIZES[device]
        self.text, self.documents = read_text(ROOT)
        self.verdict = Verdict()
        # The small one is compared, the large one (as in training) is timed.
        self.small, self.large = (
            self._inputs(*shape)
            for shape in (PARITY_SHAPES[device], (self.size.batch, self.size.seq_len))
        )

    def _inputs(self, batch: int, seq_len: int) -> Inputs:
        heads = self.size.query_heads, self.size.key_heads
        return make_inputs(batch, seq_len, heads, self.size.head_dim, device=self.device, seed=SEED)

    def train(self, label: str | None = None, seed: int = SEED) -> Training:
        """Train a new model, with a progress bar if there is a label for it.

        The same seed gives the same weights to begin with, and the same batches.
        """
        batches = cut_batches(self.text, self.size, self.steps, seed)
        shown = batches if label is None else progress(label, batches)
        return train(self.size, shown, device=self.device, seed=seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; return the exit status."""
    parser = argparse.ArgumentParser(description="Train on torch's own attention and on FA4.")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"steps of each training (default: {STEPS})"
    )
    steps: int = parser.parse_args(arguments).steps
    if steps < 1:
        parser.error(f"--steps must be at least 1, got {steps}")

    demo = Demonstration(choose_device(), steps)
    show_installed()
    stock_out = attend(demo.small)
    stock, yardstick = train_on_stock(demo)
    stock_times = measure_times(demo, stock)
    name = activate()
    if name is None:
        return 1
    served, counts = train_on_served(demo, name)
    compare_curves(demo, name, stock, served, yardstick)
    show_counts(demo, counts)
    check_parity(demo, counts)
    if stock_times:
        show_times(name, stock_times, measure_times(demo, served))
    restore(demo, stock_out)

    heading("Result")
    if demo.verdict.failed:
        print("  FAILED: " + "\n          ".join(demo.verdict.failed))
        return 1
    print(f"  The model trained on {name} as on torch's own kernels, and torch has them back.")
    return 0


def choose_device() -> str:
    """Take the GPU if there is one, else have Triton interpret its kernels; say which."""
    heading("Machine")
    print(f"torch {torch.__version__}, Python {platform.python_version()}")
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        print(torch.cuda.get_device_name())
        return "cuda"
    why = "TRITON_INTERPRET=1 is set"
    if not torch.cuda.is_available():
        why = "torch finds no GPU, so this program has set TRITON_INTERPRET=1"
        # In time: Triton reads it when it is first imported, and torch alone does not import it.
        os.environ["TRITON_INTERPRET"] = "1"
    say(
        f"CPU: {why}. Triton's kernels run in its interpreter, which shows what they compute and "
        "not how fast they are: there are no times below."
    )
    torch.set_num_threads(1)  # for matrices this small, threads wait more than they work
    return "cpu"


def show_installed() -> None:
    """Print every implementation, and why it is or is not usable and recommended."""
    heading("Installed implementations")
    say(registry.format_reports(registry.explain_flash_attention_impls()))


def train_on_stock(demo: Demonstration) -> tuple[Training, float]:
    """Train on torch's own kernels, and find out how far two of these are apart.

    Returns:
        The training, and the largest gap between the loss curves of two of torch's own backends.
    """
    heading("Training on torch's own kernels")
    print(
        f"Text:   {len(demo.text)} bytes, {demo.documents} documents of this repository\n"
        f"Model:  {demo.size}\n"
        f"Steps:  {demo.steps}, each on {demo.size.batch} x {demo.size.seq_len} bytes"
    )
    stock = demo.train("torch's own")
    backends = two_backends(demo.small)
    names = " and ".join(backend.name for backend in backends)
    curves: list[Training] = []
    for backend in progress("two of its backends", list(backends)):
        with sdpa_kernel(backend):
            curves.append(demo.train())
    yardstick = largest_gap(*curves)
    say(
        f"Rounding alone moves a loss curve: with {names} it differs by up to {yardstick:.4f} nats "
        "per byte (trained from the same seed on the same batches)."
    )
    demo.verdict.check(yardstick > 0, "these two differ, so that their distance is a yardstick")
    return stock, yardstick


def activate() -> str | None:
    """Activate the family, or the exact name where the family leaves torch's kernels in place."""
    heading("Activating")
    try:
        print(f'activate_flash_attention_impl("{FAMILY}")')
        registry.activate_flash_attention_impl(FAMILY)
    except (registry.FamilyUnavailableError, registry.UnknownImplError) as error:
        say(f"  refused: {error}")
        try:
            print(f'activate_flash_attention_impl("{EXACT_NAME}"): an exact name is obeyed')
            registry.activate_flash_attention_impl(EXACT_NAME)
        except (registry.ImplUnavailableError, registry.UnknownImplError) as final:
            say(f"  refused: {final}")
            return None
    name = registry.current_flash_attention_impl()
    print(f"  active: {name}")
    return name


def train_on_served(demo: Demonstration, name: str) -> tuple[Training, DispatchCounts]:
    """Train on the active implementation, from the same seed; return the counts of it too."""
    heading(f"Training on {name}")
    print("The same model, seed and batches, the same code.")
    reset_dispatch_counts()
    served = demo.train(name)
    return served, dispatch_counts()


def compare_curves(
    demo: Demonstration, name: str, stock: Training, served: Training, yardstick: float
) -> None:
    """Print both loss curves side by side, and check how far they are apart."""
    shown = sorted({*range(0, demo.steps, max(1, demo.steps // 8)), demo.steps - 1})
    rows = []
    for step in shown:
        losses = stock.losses[step], served.losses[step]
        rows.append(
            [f"{step + 1}", *(f"{loss:.4f}" for loss in losses), f"{losses[1] - losses[0]:+.4f}"]
        )
    table(["step", "loss, torch's own", f"loss, {name}", "difference"], rows)
    gap = largest_gap(stock, served)
    demo.verdict.check(
        gap <= 2 * yardstick,
        f"the curves differ by up to {gap:.4f}; the limit is {2 * yardstick:.4f}, twice what "
        "torch's own do",
    )


def show_counts(demo: Demonstration, counts: DispatchCounts) -> None:
    """Print and check which kernels ran in the training."""
    heading("Which kernels ran in that training")
    print(counts)
    backward = sum(counts[op].served for op in counts if op.endswith("_backward"))
    forward = counts.served - backward
    expected = demo.size.layers * demo.steps
    demo.verdict.check(
        forward == backward == expected and counts.declined == 0,
        f"all {expected} forward and {expected} backward calls of attention were served",
    )


def check_parity(demo: Demonstration, counts: DispatchCounts) -> None:
    """Compare the op that the training called, and its gradients, with float64."""
    heading("Compared with float64")
    op = next((op for op in CAUSAL_ARGUMENTS if op in counts and counts[op].served), None)
    if op is None:
        demo.verdict.check(False, "no forward op was served that could be compared")
        return
    shape = " x ".join(map(str, demo.small.query.shape))
    say(
        f"One call and its gradients, query {shape} (batch, length, heads, head_dim), causal. The "
        "limits are what rounding to bfloat16 explains."
    )
    reset_dispatch_counts()
    report = measure_parity(op, demo.small)
    print(report)
    served = dispatch_counts().served
    demo.verdict.check(served == 2, "this call and its backward were served")
    demo.verdict.check(report.passed, "out, lse, dq, dk and dv are within their limits")
    if not report.passed:
        print(report.failure_text())


def measure_times(demo: Demonstration, training: Training) -> list[float]:
    """Return the milliseconds of a training step and of attention alone; none without a GPU."""
    if demo.device == "cpu":
        return []
    warm = training.seconds[len(training.seconds) // 2 :]
    return [1000 * median(warm), milliseconds(demo.large)]


def show_times(name: str, stock: list[float], served: list[float]) -> None:
    """Print the times on both, without a verdict."""
    heading("Times")
    rows = [
        [label, f"{before:.3f} ms", f"{after:.3f} ms", f"{before / after:.2f}"]
        for label, before, after in zip(
            ("training step", "attention, forward and backward"), stock, served, strict=True
        )
    ]
    table(["median", "torch's own", name, "times as fast"], rows)


def restore(demo: Demonstration, stock_out: Tensor) -> None:
    """Give torch its kernels back, and check that they are."""
    heading("Restoring")
    print("restore_flash_attention_impl()")
    registry.restore_flash_attention_impl()
    before = dispatch_counts()
    restored = attend(demo.small)
    after = dispatch_counts()
    check = demo.verdict.check
    check(registry.current_flash_attention_impl() is None, "nothing is active")
    check(torch.equal(restored, stock_out), "the output is the one from before, bit for bit")
    check(
        (after.served, after.declined) == (before.served, before.declined),
        f"and the counts stay as they were: {after.served} served",
    )


if __name__ == "__main__":
    sys.exit(main())
