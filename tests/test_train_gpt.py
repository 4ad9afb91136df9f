"""The training benchmark works, here on stock's CPU kernels."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "docs/benchmarks/train_gpt.py"


def test_it_trains_and_writes_a_record_and_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, figure = tmp_path / "record.json", tmp_path / "figure.svg"
    own = {key: value for key, value in os.environ.items() if key != "FLASH_ATTENTION_IMPL"}
    arguments = ["run", "--size", "smoke", "--impl", "--commit", "abc", "--output", str(record)]
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    made = json.loads(record.read_text(encoding="utf-8"))
    assert [run["name"] for run in made["runs"]] == ["native", "torch:math"]
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
