"""A record holds what was measured, a table shows it, and both say what was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flash_attention_testkit.bench.grids import Cell
from flash_attention_testkit.bench.measure import CellFigures, Figures
from flash_attention_testkit.bench.record import (
    fingerprint,
    means,
    read_record,
    rows_of,
    skipped_of,
    write_record,
)
from flash_attention_testkit.bench.table import bar, render
from flash_attention_testkit.bench.timing import Spread

CELL = Cell("forward", 64, 1000, False, 1, 1, 1)  # 0.256 GFLOP
DECODE = Cell("forward", 64, 1000, False, 1, 1, 1, query_len=1)  # 256 kB


def figures(**ms: float) -> CellFigures:
    found = CellFigures()
    for name, value in ms.items():
        spread = Spread(value, value * 0.9, value * 1.1)
        found.measured[name.replace("_", ":")] = Figures(spread, 6, 12.34, None)
    return found


@pytest.fixture
def record():
    found = figures(torch_flash=2.0, torch_cudnn=1.0, mine=0.5)
    found.skipped["torch:efficient"] = "no such kernel"
    return {
        "environment": {"gpu": "a GPU"},
        "rows": rows_of("own", CELL, found, {"matmul_tflops": 1.024}),
        "skipped": skipped_of("own", CELL, found),
        "host_us": {"mine": 20.0},
    }


def test_a_row_has_the_fields_of_the_record_format(record) -> None:
    row = record["rows"][-1]
    assert row["impl"] == "mine"
    assert row["grid"] == "own"
    assert row["ms"] == 0.5
    assert row["rounds"] == 6
    assert row["ms_quartiles"] == [0.45, 0.55]
    assert row["tflops"] == 0.512
    assert row["gbs"] is None
    assert row["ratio_to_flash"] == 4.0
    assert row["ratio_to_cudnn"] == 2.0
    assert row["ratio_to_native"] is None
    assert row["share_of_ceiling"] == 0.5
    fields = {"direction", "head_dim", "seq_len", "causal", "batch", "heads", "kv_heads", "dtype"}
    assert fields <= row.keys()


def test_decoding_is_told_in_bytes_and_shares_the_ceiling_of_a_copy() -> None:
    (row,) = rows_of("decode", DECODE, figures(mine=1.0), {"matmul_tflops": 1.0, "copy_gbs": 0.512})
    assert row["gbs"] == 0.256
    assert row["share_of_ceiling"] == 0.5
    (row,) = rows_of("decode", DECODE, figures(mine=1.0), {"matmul_tflops": 1.0})
    assert row["share_of_ceiling"] is None


def test_means_are_geometric_by_grid_and_leave_out_who_is_compared_with_itself(record) -> None:
    slower = rows_of("own", CELL, figures(torch_flash=1.0, mine=1.0), {})
    other = rows_of("other", CELL, figures(torch_flash=1.0, mine=10.0), {})
    found = {
        (one.impl, one.grid, one.base): (one.mean, one.worst)
        for one in means([*record["rows"], *slower, *other])
    }
    assert found["mine", "own", "ratio_to_flash"] == (pytest.approx(2.0), 1.0)
    assert found["mine", "other", "ratio_to_flash"] == (pytest.approx(0.1), 0.1)
    assert ("torch:flash", "own", "ratio_to_flash") not in found


def test_a_fingerprint_tells_records_apart_and_does_not_depend_on_their_layout(record) -> None:
    again = json.loads(json.dumps(record, indent=3, sort_keys=True))
    assert fingerprint(again) == fingerprint(record)
    again["rows"][0]["ms"] += 1e-4
    assert fingerprint(again) != fingerprint(record)


def test_a_written_record_reads_back_the_same(record, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, record)
    assert read_record(path) == record
    assert [one.name for one in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "lacks environment and rows"),
        (json.dumps({"environment": {}, "rows": [{"impl": "x"}]}), "row 0 lacks"),
    ],
)
def test_a_file_that_is_no_record_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_record(path)


def test_the_table_shows_rows_means_host_times_and_reasons(record) -> None:
    text = render(record)
    (mine,) = [line for line in text.splitlines() if line.split()[6:8] == ["mine", "0.5"]]
    assert mine.split()[7:] == [
        *("0.5", "0.45-0.55", "0.512", "TF", "4.000", "2.000", "-", "-", "50.0%", "12.3", "-")
    ]
    assert "mine own forward over torch:flash: geometric mean 4.000, worst 4.000" in text
    assert "Host time of a small call: mine 20.0 us" in text
    assert "torch:efficient, 1 cell: no such kernel" in text


def test_the_table_says_whose_gradients_were_to_repeat() -> None:
    cells = [
        Cell("backward", 64, 8, False, 1, 1, 1, deterministic=asked) for asked in (False, True)
    ]
    rows = [row for cell in cells for row in rows_of("own", cell, figures(mine=0.5), {})]
    lines = render({"environment": {}, "rows": rows}).splitlines()
    assert [line.split("  ")[0] for line in lines if " mine " in line] == [
        *("backward", "backward, deterministic")
    ]


def test_the_table_says_that_a_run_did_not_finish(record) -> None:
    assert "did not finish" not in render(record)
    assert "did not finish" in render({**record, "finished": False})


def test_the_table_shows_records_of_the_older_form() -> None:
    row = {
        **{"impl": "mine", "direction": "forward", "head_dim": 64, "seq_len": 1024},
        **{"causal": True, "batch": 1, "heads": 8, "kv_heads": 2, "ms": 1.0, "tflops": 2.0},
    }
    text = render({"environment": {}, "rows": [row]})
    assert "forward    1  8/2  1024  64  causal  mine" in text


def test_the_bar_grows() -> None:
    assert bar(0, 4, "a", 8) == "[........] 0/4 a"
    assert bar(3, 4, "b", 8) == "[######..] 3/4 b"
    assert bar(0, 0, "c", 2) == "[..] 0/0 c"
