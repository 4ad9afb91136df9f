"""Records become panels without matplotlib, and files with it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flash_attention_testkit.bench.plot import draw, panels


def row(impl: str, seq_len: int, tflops: float, **more) -> dict:
    plain = {"direction": "forward", "head_dim": 64, "causal": False, "ms": 2.0}
    heads = {"batch": 1, "heads": 8, "kv_heads": 8}
    return {"impl": impl, "seq_len": seq_len, "tflops": tflops, **plain, **heads, **more}


def record(*rows: dict, gpu: str = "one") -> dict:
    return {"environment": {"gpu": gpu}, "rows": list(rows)}


def test_there_is_a_panel_for_each_direction_mask_and_head_dim_side_by_side() -> None:
    found = panels(
        [record(row("a", 1, 1.0), row("a", 1, 1.0, causal=True), row("a", 1, 1.0, head_dim=128))]
    )
    assert [panel.title for panel in found] == [
        "forward, full, D 64",
        "forward, full, D 128",
        "forward, causal, D 64",
    ]


def test_a_series_has_its_points_with_both_quartiles() -> None:
    (panel,) = panels([record(row("a", 1024, 8.0, ms_quartiles=[1.0, 4.0]), row("b", 4096, 3.0))])
    assert panel.points == ["1024", "4096"]
    assert panel.series == {"a": {"1024": (8.0, 4.0, 16.0)}, "b": {"4096": (3.0, 3.0, 3.0)}}


def test_series_of_several_gpus_are_told_apart() -> None:
    (panel,) = panels([record(row("a", 1, 1.0)), record(row("a", 1, 2.0), gpu="two")])
    assert set(panel.series) == {"a (one)", "a (two)"}


def test_decoding_has_a_panel_of_its_own_in_bytes() -> None:
    (panel,) = panels([record(row("a", 4096, 1.0, gbs=900.0, kv_heads=2))])
    assert panel.unit == "GB/s"
    assert panel.series["a"] == {"B1 H8/2 S4096": (900.0, 900.0, 900.0)}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_figure_is_drawn(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    path = tmp_path / f"figure.{suffix}"
    draw([record(row("a", 1024, 8.0, ms_quartiles=[1.0, 4.0]), row("b", 4096, 3.0))], path)
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_without_matplotlib_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"flash-attention-testkit\[bench\]"):
        draw([record(row("a", 1, 1.0))], tmp_path / "figure.png")


@pytest.mark.parametrize(
    ("records", "name", "said"),
    [([record(row("a", 1, 1.0))], "x.gif", "png or .svg"), ([record()], "x.png", "no rows")],
)
def test_what_cannot_be_drawn_is_said(records, name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        draw(records, tmp_path / name)
