"""The demonstration (`hatch run demo`): what it shows, and that it notices broken kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"
# Enough for the curves of two backends to part.
STEPS = "3"

SABOTAGED = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import quickstart
from fa4_triton.kernel_set import TritonKernels
{{change}}
sys.exit(quickstart.main(["--steps", "{STEPS}"]))
"""


def run(*arguments: str, interpreted: bool = True) -> subprocess.CompletedProcess[str]:
    """Run Python, on the CPU unless told otherwise."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_demo_shows_everything_and_succeeds() -> None:
    # All its steps: over a few, the gap between two of torch's own backends is no yardstick yet.
    done = run(str(EXAMPLES / "quickstart.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    headings = [
        line
        for line, next_line in zip(
            done.stdout.splitlines(), done.stdout.splitlines()[1:], strict=False
        )
        if next_line and set(next_line) == {"-"}
    ]
    assert headings == [
        "Machine",
        "Installed implementations",
        "Training on torch's own kernels",
        "Activating",
        "Training on fa4-triton",
        "Which kernels ran in that training",
        "Compared with float64",
        "Restoring",
        "Result",
    ]
    assert "FAILED" not in done.stdout
    assert "available, but not recommended here" in done.stdout
    assert "active: fa4-triton" in done.stdout
    assert "_for_cpu: 64 served, 0 on stock" in done.stdout
    assert "_for_cpu_backward: 64 served, 0 on stock" in done.stdout
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert any(line.startswith(f"{name} ") for line in done.stdout.splitlines())
    assert "bit for bit" in done.stdout
    assert "fa4-triton                 [################################]" in done.stderr


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        pytest.param(
            "del TritonKernels.forward_heads_first\n"
            "TritonKernels.supports = lambda self, call: 'switched off'",
            ["calls of attention were served", "no forward op was served"],
            id="no call is served",
        ),
        pytest.param(
            "del TritonKernels.forward_heads_first\n"
            "forward = TritonKernels.forward\n"
            "TritonKernels.forward = lambda self, call: forward(\n"
            "    self, call._replace(scale=call.scale * 1.05)\n"
            ")",
            ["out, lse, dq, dk and dv are within their limits"],
            id="a wrong scale",
        ),
        pytest.param(
            "backward = TritonKernels.backward\n"
            "TritonKernels.backward = lambda self, *given: tuple(\n"
            "    -grad for grad in backward(self, *given)\n"
            ")",
            ["the curves differ by up to", "out, lse, dq, dk and dv are within their limits"],
            id="gradients of the wrong sign",
        ),
    ],
)
def test_demo_fails_with_broken_kernels(change: str, noticed: list[str]) -> None:
    done = run("-c", SABOTAGED.format(change=change))
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("  FAILED  ")]
    for text in noticed:
        assert any(text in line for line in failed), done.stdout


def test_demo_fails_where_no_implementation_can_be_used() -> None:
    done = run(
        "-c",
        SABOTAGED.format(
            change="import fa4_triton.provider\n"
            "fa4_triton.provider.why_unavailable = lambda: 'out of order'"
        ),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not available: out of order" in done.stdout
    assert "Training on fa4-triton" not in done.stdout


def test_demo_refuses_a_training_without_steps() -> None:
    done = run(str(EXAMPLES / "quickstart.py"), "--steps", "0")
    assert done.returncode == 2
    assert "--steps must be at least 1, got 0" in done.stderr


@pytest.mark.gpu
def test_demo_on_a_gpu_shows_the_times_of_both() -> None:
    done = run(str(EXAMPLES / "quickstart.py"), interpreted=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert "attention, forward and backward" in done.stdout
