"""The training benchmark works, here on stock's CPU kernels."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "docs/benchmarks/train_gpt.py"


def test_it_trains_and_writes_a_record_and_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, figure = tmp_path / "record.json", tmp_path / "figure.svg"
    own = {key: value for key, value in os.environ.items() if key != "FLASH_ATTENTION_IMPL"}
    arguments = ["run", "--size", "smoke", "--impl", "--commit", "abc", "--output", str(record)]
    command = [sys.executable, str(SCRIPT), *arguments, "--seed", "1", "2"]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    made = json.loads(record.read_text(encoding="utf-8"))
    runs = [(run["name"], run["seed"], run["torch_backend"]) for run in made["runs"]]
    native, math = ("native", "flash"), ("torch:math", "math")  # of the CPU
    assert runs == [(name, seed, backend) for seed in (1, 2) for name, backend in (native, math)]
    for run in made["runs"]:
        assert len(run["losses"]) == made["settings"]["steps"]
        assert run["losses"][-1] < run["losses"][0] - 0.3
        assert run["tokens_per_second"] > 0
        assert run["served"] == run["declined"] == {}
    script = runpy.run_path(str(SCRIPT))
    assert script["table"](made) == done.stdout.rstrip("\n")
    assert "stock's math" in done.stdout
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "plot", str(record), "-o", str(figure)])
    script["main"]()
    assert "record.json sha256:" in figure.read_text(encoding="utf-8")


def run_of(name: str, backend: str, seed: int, loss: float) -> dict[str, Any]:
    """A run whose smoothed loss is the same at every step."""
    ours = name == "FA4"
    return {
        "name": name,
        "seed": seed,
        "asked_for": name if ours else None,
        "active": "fa4-cuda" if ours else None,
        "torch_backend": backend,
        "losses": [loss] * 20,
    }


def test_ours_is_as_far_from_stock_as_the_geometric_mean_says() -> None:
    script = runpy.run_path(str(SCRIPT))
    losses = {"FA4": (0.0, 0.0), "native": (1.0, 8.0), "torch:flash": (4.0, 16.0)}
    backends = {"FA4": "cudnn", "native": "cudnn", "torch:flash": "flash"}
    runs = [
        run_of(name, backends[name], seed, loss)
        for name, both in losses.items()
        for seed, loss in zip((1, 2), both, strict=True)
    ]
    # cuDNN again, with one of the seeds: it tells nothing of how far stock's backends lie apart
    runs.append(run_of("torch:cudnn", "cudnn", 2, 8.5))
    pairs = script["pairs_of"]({"runs": runs})
    assert [(pair.kind, pair.gaps) for pair in pairs] == [
        ("stock", {1: 3.0, 2: 8.0}),
        ("fa4-cuda", {1: 1.0, 2: 8.0}),
        ("fa4-cuda", {1: 4.0, 2: 16.0}),
        ("again", {2: 0.5}),
    ]
    ours, stock = (1 * 8 * 4 * 16) ** (1 / 4), (3 * 8) ** (1 / 2)
    assert script["verdicts"](pairs) == [
        f"fa4-cuda lies {ours:.5f} from stock's backends, which lie {stock:.5f} from each other: "
        f"{ours / stock:.2f} times as far."
    ]


def test_a_backend_that_was_forced_and_did_not_run_ends_the_run() -> None:
    check = runpy.run_path(str(SCRIPT))["check"]
    check("torch:flash", "flash")
    check("native", "cudnn")
    with pytest.raises(SystemExit, match="torch:flash was asked for, but attention went to cudnn"):
        check("torch:flash", "cudnn")
