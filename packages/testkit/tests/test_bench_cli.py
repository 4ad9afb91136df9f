"""The command measures what it is asked for, and says so where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash_attention_testkit.bench.cli import main

TINY = ("--head-dim", "32", "--seq-len", "16", "--batch", "1", "--heads", "1", "--rounds", "1")


def bench(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flash_attention_testkit.bench", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def test_without_a_device_it_says_that_there_is_nothing_to_measure() -> None:
    done = bench()
    assert done.returncode == 1
    assert done.stdout == ""
    assert "nothing to measure" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


def test_the_interpreter_runs_a_grid_and_the_record_says_whose_times_they_are(
    tmp_path: Path,
) -> None:
    pytest.importorskip("fa4_triton", reason="needs an implementation to measure")
    path = tmp_path / "record.json"
    # What the environment asks for must not become `native`.
    done = bench(
        *("fa4-triton", *TINY, "--output", str(path)),
        TRITON_INTERPRET="1",
        FLASH_ATTENTION_IMPL="fa4-triton",
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    impls = {row["impl"]: row["ms"] for row in record["rows"]}
    assert set(impls) == {"native", "torch:flash", "fa4-triton"}
    assert impls["native"] < impls["fa4-triton"]
    assert len(record["rows"]) == 3 * 4
    assert "Triton's interpreter" in record["environment"]["times"]
    assert "Triton's interpreter" in done.stdout
    assert "4/4 done" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grid", "anchors", "--heads", "8"], "not both"),
        (["--heads", "8", "--kv-heads", "3"], "choose a divisor"),
        (["--grid", "decode", "--direction", "backward"], "has no backward cells"),
        (["--rounds", "0"], "at least 1"),
        (["--only"], "needs the names"),
        (["nobody"], "unknown: nobody; there are native"),
        (["--output", "no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_a_command_line_that_means_nothing_is_refused(
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("flash_attention_testkit.bench.cli._device", lambda: "cpu")
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_plot_says_what_is_wrong_with_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", str(tmp_path / "missing.json"), "-o", str(tmp_path / "x.png")]) == 1
    assert "missing.json" in capsys.readouterr().err


def test_pure_parts_load_no_torch() -> None:
    code = (
        "import sys\n"
        "import flash_attention_testkit.bench.cli, flash_attention_testkit.bench.timing\n"
        "import flash_attention_testkit.bench.plot\n"
        "print({'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
