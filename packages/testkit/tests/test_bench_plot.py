"""Records become panels without matplotlib, and files with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from flash_attention_testkit.bench.panels import Panel, names_of, panels
from flash_attention_testkit.bench.plot import draw
from flash_attention_testkit.bench.record import fingerprint


def row(impl: str, seq_len: int, tflops: float, **more: Any) -> dict[str, Any]:
    plain = {"direction": "forward", "head_dim": 64, "causal": False, "ms": 2.0}
    heads = {"batch": 1, "heads": 8, "kv_heads": 8}
    return {"impl": impl, "seq_len": seq_len, "tflops": tflops, **plain, **heads, **more}


def record(*rows: dict[str, Any], gpu: str = "one") -> dict[str, Any]:
    return {"environment": {"gpu": gpu}, "rows": list(rows)}


def only_panel(*rows: dict[str, Any], **options: Any) -> Panel:
    ((panel,),) = panels({"x.json": record(*rows)}, **options)
    return panel


def test_head_dims_stand_side_by_side_masks_and_directions_below_each_other() -> None:
    found = panels(
        {
            "x.json": record(
                row("a", 1, 1.0, direction="backward"),
                row("a", 1, 1.0, causal=True),
                row("a", 1, 1.0, head_dim=128),
                row("a", 1, 1.0),
            )
        }
    )
    assert [[panel.title for panel in line] for line in found] == [
        ["forward, full, head dim 64", "forward, full, head dim 128"],
        ["forward, causal, head dim 64"],
        ["backward, full, head dim 64"],
    ]


def test_a_series_has_its_points_with_both_quartiles() -> None:
    panel = only_panel(row("a", 1024, 8.0, ms_quartiles=[1.0, 4.0]), row("b", 4096, 3.0))
    assert panel.unit == "TFLOP/s"
    assert panel.points == ["S 1024", "S 4096"]
    assert panel.series == {"a": {"S 1024": (8.0, 4.0, 16.0)}, "b": {"S 4096": (3.0, 3.0, 3.0)}}


def test_ratios_leave_out_the_one_that_they_are_to_and_who_has_none() -> None:
    panel = only_panel(
        row("torch:cudnn", 1024, 8.0, ratio_to_cudnn=1.0),
        row("a", 1024, 4.0, ratio_to_cudnn=0.5),
        row("b", 1024, 4.0, ratio_to_cudnn=None),
        ratio_to="cudnn",
    )
    assert panel.is_ratio
    assert panel.unit == "speed over cuDNN"
    assert panel.series == {"a": {"S 1024": (0.5, 0.5, 0.5)}}


def test_rows_can_be_chosen() -> None:
    rows = [
        row("a", 1, 1.0, grid="gqa"),
        row("a", 2, 1.0, grid="own"),
        row("a", 3, 1.0, grid="own", direction="backward"),
        row("b", 4, 1.0, grid="own"),
    ]
    panel = only_panel(*rows, directions=["forward"], grids=["own"], impls=["a"])
    assert panel.points == ["S 2"]


def test_torchs_kernels_come_first_under_the_names_they_are_known_by() -> None:
    lines = [[only_panel(row("a", 1, 1.0), row("torch:cudnn", 1, 1.0), row("torch:flash", 1, 1.0))]]
    assert names_of(lines) == ["FlashAttention-2", "cuDNN", "a"]


@pytest.mark.parametrize(
    ("gpus", "names"),
    [(("one", "two"), {"a (one)", "a (two)"}), (("one", "one"), {"a (x.json)", "a (y.json)"})],
)
def test_series_of_several_records_are_told_apart(gpus, names) -> None:
    records = {
        name: record(row("a", 1, 1.0), gpu=gpu)
        for name, gpu in zip(("x.json", "y.json"), gpus, strict=True)
    }
    ((panel,),) = panels(records)
    assert set(panel.series) == names


def test_decoding_has_a_line_of_its_own_in_bytes() -> None:
    panel = only_panel(row("a", 4096, 1.0, gbs=900.0, kv_heads=2))
    assert panel.unit == "GB/s"
    assert panel.series["a"] == {"B 1\nheads 8/2\nS 4096": (900.0, 900.0, 900.0)}


def test_groups_of_heads_and_packed_sequences_are_told_from_plain_ones() -> None:
    found = panels(
        {
            "x.json": record(
                row("a", 8, 1.0), row("a", 8, 1.0, kv_heads=2), row("a", 8, 1.0, seq_lens=[1, 8])
            )
        }
    )
    assert [[panel.title for panel in line] for line in found] == [
        ["forward, full, head dim 64"],
        ["forward, full, heads 8/2, head dim 64"],
        ["forward, 2 packed sequences, head dim 64"],
    ]
    assert found[-1][0].points == ["full"]


def test_cells_that_differ_in_their_batch_only_do_not_hide_each_other() -> None:
    panel = only_panel(row("a", 1024, 1.0), row("a", 1024, 2.0, batch=4))
    assert [value for value, _, _ in panel.series["a"].values()] == [1.0, 2.0]


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("ratio_to", [None, "cudnn"])
def test_a_figure_is_drawn_and_says_of_which_record(
    suffix: str, ratio_to: str | None, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    path = tmp_path / f"figure.{suffix}"
    mine = record(
        row("a", 1024, 8.0, ms_quartiles=[1.0, 4.0], ratio_to_cudnn=1.2),
        row("b", 4096, 0.3, ratio_to_cudnn=0.1),
        *(row("a", 1024, 1.0, head_dim=dim, ratio_to_cudnn=1.0) for dim in (32, 96, 128)),
        *(row("a", length, 1.0, gbs=9.0, ratio_to_cudnn=1.0) for length in (1, 2, 3, 4)),
    )
    draw({"mine.json": mine, "other.json": mine}, path, ratio_to=ratio_to)
    drawn = path.read_bytes()
    assert drawn.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert f"mine.json sha256:{fingerprint(mine)}".encode() in drawn


def test_a_figure_is_the_same_from_the_same_record(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    for name in ("one.svg", "two.svg"):
        draw({"x.json": record(row("a", 1024, 8.0))}, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_without_matplotlib_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"flash-attention-testkit\[bench\]"):
        draw({"x.json": record(row("a", 1, 1.0))}, tmp_path / "figure.png")


@pytest.mark.parametrize(
    ("rows", "name", "said"),
    [([row("a", 1, 1.0)], "x.gif", "png or .svg"), ([], "x.png", "nothing to draw")],
)
def test_what_cannot_be_drawn_is_said(rows, name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        draw({"x.json": record(*rows)}, tmp_path / name)
