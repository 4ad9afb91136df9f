"""The documents show the committed benchmark records, and nothing else."""

from __future__ import annotations

import json
import re
import runpy
import statistics
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import pytest

from fa4_triton.evidence import MEASURED
from flash_attention_testkit.bench.markdown import markdown, with_table
from flash_attention_testkit.bench.record import fingerprint, read_record

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "docs" / "benchmarks"
RECORDS = sorted((BENCHMARKS / "results").glob("*.json"))
FIGURES = sorted([*BENCHMARKS.glob("*.svg"), *BENCHMARKS.glob("*.png")])
PAGES = {
    "nvidia-h200-fa4-triton.json": ROOT / "docs/kernels/fa4-triton-portable.md",
    "nvidia-h100-fa4-triton.json": ROOT / "docs/benchmarks.md",
    "nvidia-h100-fa4-triton-hopper.json": ROOT / "docs/kernels/fa4-triton.md",
    "nvidia-h100-fa4-cuda.json": ROOT / "docs/kernels/fa4-cuda-forward.md",
    "nvidia-h100-fa4-cuda-backward.json": ROOT / "docs/kernels/fa4-cuda-backward.md",
}
FINGERPRINT = re.compile(rb"([\w.-]+\.json) sha256:([0-9a-f]{64})")


def record(name: str) -> dict[str, Any]:
    return read_record(BENCHMARKS / "results" / name)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_its_record(name: str) -> None:
    page = PAGES[name].read_text(encoding="utf-8")
    source = f"docs/benchmarks/results/{name}"
    assert with_table(page, markdown(record(name), source)) == page, (
        f"run: flash-attention-bench table {source} --into {PAGES[name].relative_to(ROOT)}"
    )


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.name)
def test_a_figure_shows_a_record_as_it_is_now(path: Path) -> None:
    shown = FINGERPRINT.findall(path.read_bytes())
    assert shown, f"{path.name} does not say of which record it is: draw it again"
    for name, drawn in shown:
        there = json.loads((BENCHMARKS / "results" / name.decode()).read_text(encoding="utf-8"))
        assert fingerprint(there).encode() == drawn, (
            f"{name.decode()} has changed since {path.name} was drawn: draw it again"
        )


def test_every_figure_is_on_a_page() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    assert FIGURES
    assert [path.name for path in FIGURES if f"benchmarks/{path.name}" not in pages] == []


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_a_record_says_where_and_on_what_it_was_measured(path: Path) -> None:
    environment = json.loads(path.read_text(encoding="utf-8"))["environment"]
    for field in ("gpu", "torch", "cuda", "cudnn", "triton", "git_commit", "date"):
        assert environment[field], field


def test_deterministic_gradients_of_the_cuda_kernels_cost_at_most_15_percent() -> None:
    ms: dict[str, list[float]] = {"anchors": [], "deterministic": []}
    for row in record("nvidia-h100-fa4-cuda-backward.json")["rows"]:
        if row["impl"] == "fa4-cuda":
            ms[row["grid"]].append(row["ms"])
    ratios = [slow / fast for slow, fast in zip(ms["deterministic"], ms["anchors"], strict=True)]
    assert len(ratios) == 18
    assert statistics.geometric_mean(ratios) < 1.15


def test_the_page_shows_the_training_runs() -> None:
    path = BENCHMARKS / "results" / "nvidia-h100-train-gpt.json"
    runs = json.loads(path.read_text(encoding="utf-8"))
    table = runpy.run_path(str(BENCHMARKS / "train_gpt.py"))["table"](runs)
    assert table in (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")


def test_a_model_trains_faster_on_the_cuda_kernels_and_on_nothing_else() -> None:
    path = BENCHMARKS / "results" / "nvidia-h100-train-gpt.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    calls = found["settings"]["layers"] * found["settings"]["steps"]
    runs = runpy.run_path(str(BENCHMARKS / "train_gpt.py"))["by_name"](found)
    assert set(runs["FA4"]) == set(runs["native"]) == {1, 2, 3}
    for seed, ours in runs["FA4"].items():
        stock = runs["native"][seed]
        assert ours["active"] == "fa4-cuda"
        assert list(ours["served"].values()) == [calls, calls]
        assert not ours["declined"]
        assert not stock["served"]
        assert ours["tokens_per_second"] > 1.02 * stock["tokens_per_second"]
        for peak in ("peak_requested_mib", "peak_allocated_mib"):
            assert ours[peak] <= stock[peak]


def test_a_model_trained_on_the_cuda_kernels_is_as_near_to_stock_as_stocks_backends() -> None:
    path = BENCHMARKS / "results" / "nvidia-h100-train-gpt.json"
    script = runpy.run_path(str(BENCHMARKS / "train_gpt.py"))
    pairs = script["pairs_of"](json.loads(path.read_text(encoding="utf-8")))
    kinds = {kind: [pair for pair in pairs if pair.kind == kind] for kind in ("stock", "fa4-cuda")}
    assert {kind: len(found) for kind, found in kinds.items()} == {"stock": 3, "fa4-cuda": 3}
    assert script["mean_gap"](kinds["fa4-cuda"]) < 2 * script["mean_gap"](kinds["stock"])


def test_the_bars_of_the_portable_kernels_are_met() -> None:
    """What the notebook promises: faster than FlashAttention-2, and nowhere much slower."""
    rows = record("nvidia-h200-fa4-triton.json")["rows"]
    for direction, mean, worst in (("forward", 1.2, 0.98), ("backward", 1.05, 0.95)):
        ratios = [
            row["ratio_to_flash"]
            for row in rows
            if row["impl"] == "fa4-triton" and row["direction"] == direction
        ]
        product = 1.0
        for ratio in ratios:
            product *= ratio
        assert len(ratios) == 18
        assert product ** (1 / len(ratios)) >= mean
        assert min(ratios) >= worst


EVIDENCE = [
    (capability, direction)
    for capability, evidence in MEASURED.items()
    for direction in evidence.records
]


@pytest.mark.parametrize(("capability", "direction"), EVIDENCE, ids=str)
def test_what_is_recommended_rests_on_a_record(capability: Any, direction: Any) -> None:
    """The numbers of `fa4_triton.evidence` are geometric means of a committed record."""
    evidence = MEASURED[capability]
    told = evidence.speeds[direction]
    found: dict[int, list[float]] = {}
    for row in record(evidence.records[direction])["rows"]:
        if (row["impl"], row["grid"], row["direction"]) == ("fa4-triton", "anchors", direction):
            found.setdefault(row["head_dim"], []).append(row["ratio_to_cudnn"])
    means = {head_dim: geometric_mean(ratios) for head_dim, ratios in found.items()}
    assert {len(ratios) for ratios in found.values()} == {6}
    assert told == {head_dim: round(mean, 2) for head_dim, mean in means.items()}
