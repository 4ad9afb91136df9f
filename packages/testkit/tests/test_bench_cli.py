"""The command measures what it is asked for, and says so where it cannot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash_attention_testkit.bench.cli import main

TINY = ("--head-dim", "32", "--seq-len", "16", "--batch", "1", "--heads", "1", "--budget", "0")


def bench(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flash_attention_testkit.bench", *words],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",  # threads that wait for each other take long on a busy machine
            **environment,
        },
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
    assert record["finished"]
    assert "Triton's interpreter" in record["environment"]["times"]
    assert "Triton's interpreter" in done.stdout
    assert "4/4 done" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grid", "anchors", "--heads", "8"], "not both"),
        (["--heads", "8", "--kv-heads", "3"], "choose a divisor"),
        (["--grid", "decode", "--direction", "backward"], "has no backward cells"),
        (["--budget", "-1"], "at least 0 seconds"),
        (["--budget", "nan"], "at least 0 seconds"),
        (["--register", "fa4_triton"], "takes MODULE:FUNCTION"),
        (["--register", "no_such_module:register"], "No module named 'no_such_module'"),
        (["--register", "math:no_such_function"], "no attribute 'no_such_function'"),
        (["--only"], "needs the names"),
        (["nobody"], "unknown: nobody; there are native"),
        (["--head-dim", "0"], "sizes must be at least 1, found head_dims [0]"),
        (["--seq-len", "1024", "0"], "sizes must be at least 1"),
        (["--batch", "0"], "sizes must be at least 1"),
        (["--output", "no/such/folder/x.json"], "there is no folder"),
        (["--output", "."], "--output . is a folder; name a file in it"),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_a_command_line_that_means_nothing_is_refused(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    assert said in capsys.readouterr().err


PROVIDER = """
import torch
from flash_attention_registry import register_flash_attention_impl
from flash_attention_registry.sdpa import Capabilities, install


class Zeros:
    name = "zeros"
    capabilities = Capabilities(
        device_types=frozenset({"cpu"}), dtypes=frozenset({torch.bfloat16}), head_dims=(32,),
        features=frozenset({"backward", "causal"}), deterministic="always",
    )
    supports = capabilities.reason_to_decline

    def forward(self, call):
        batch, rows, heads, _ = call.query.shape
        return torch.zeros_like(call.query), torch.zeros(batch, heads, rows)

    def backward(self, call, grad_out, out, lse):
        return tuple(torch.zeros_like(one) for one in (call.query, call.key, call.value))


def register():
    register_flash_attention_impl("zeros", register_fn=lambda: install(Zeros(), "cpu"))
"""


def test_an_implementation_that_is_not_installed_can_be_registered(tmp_path: Path) -> None:
    (tmp_path / "a_checkout.py").write_text(PROVIDER)
    path = tmp_path / "record.json"
    done = bench(
        *("zeros", *TINY, "--register", "a_checkout:register", "--output", str(path)),
        TRITON_INTERPRET="1",
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert "zeros" in {row["impl"] for row in json.loads(path.read_text())["rows"]}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flash_attention_testkit.bench.cli._device", lambda: "cpu")


@pytest.mark.usefixtures("on_cpu")
def test_a_run_that_is_interrupted_leaves_what_it_has_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flash_attention_testkit.bench import measure

    whole, cells = measure.measure_cell, []

    def interrupted(cell, *arguments):
        cells.append(cell)
        if len(cells) == 3:
            raise KeyboardInterrupt
        return whole(cell, *arguments)

    monkeypatch.setattr(measure, "measure_cell", interrupted)
    path = tmp_path / "record.json"
    assert main(["native", "--only", *TINY, "--output", str(path)]) == 1
    record = json.loads(path.read_text())
    assert len(record["rows"]) == 2
    assert not record["finished"]
    said = capsys.readouterr()
    assert "interrupted" in said.err
    assert "The run did not finish." in said.out


def test_a_record_is_shown_and_written_into_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("gpu", "torch", "cudnn", "triton", "git_commit", "date")
    row = {
        **{"impl": "mine", "direction": "forward", "head_dim": 64, "seq_len": 1024},
        **{"causal": True, "batch": 1, "heads": 8, "kv_heads": 8, "ms": 1.0, "tflops": 234.5},
    }
    record = {"environment": dict.fromkeys(names, "?"), "rows": [row]}
    path, page = tmp_path / "record.json", tmp_path / "page.md"
    path.write_text(json.dumps(record))
    page.write_text("<!-- record:begin -->\n<!-- record:end -->\n")
    assert main(["table", str(path)]) == 0
    assert "234.5 TF" in capsys.readouterr().out
    assert main(["table", str(path), "--into", str(page)]) == 0
    assert "| forward | 64 | 1024 | causal | 234 |" in page.read_text()
    page.write_text("a page")
    assert main(["table", str(path), "--into", str(page)]) == 1
    assert "lacks the markers" in capsys.readouterr().err
    assert page.read_text() == "a page"


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
        "import flash_attention_testkit.bench.markdown, flash_attention_testkit.bench.table\n"
        "print({'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
