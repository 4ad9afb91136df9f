"""A page shows a record's figures, all of them and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from flash_attention_testkit.bench.markdown import BEGIN, END, markdown, with_table


def row(impl: str, **more: Any) -> dict[str, Any]:
    plain = {"direction": "forward", "head_dim": 64, "seq_len": 1024, "causal": True}
    heads = {"batch": 2, "heads": 8, "kv_heads": 8, "dtype": "bfloat16"}
    return {"impl": impl, **plain, **heads, "ms": 0.1, "tflops": 123.4, **more}


def record(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    environment = {
        **{"gpu": "a GPU", "torch": "2.11", "cudnn": "9", "triton": "3.6"},
        **{"git_commit": "abc", "date": "2026-01-02"},
    }
    return {"environment": environment, "rows": list(rows), **more}


RATIOS = {"ratio_to_flash": 1.5, "ratio_to_cudnn": 0.75}
STOCK = (row("torch:cudnn", tflops=164.5), row("torch:flash", tflops=82.3))


def lines_of(*rows: dict[str, Any], **more: Any) -> list[str]:
    return markdown(record(*rows, **more), "results/x.json").splitlines()


def test_a_cell_is_a_line_with_everybodys_speed_and_ratios_of_those_not_torchs() -> None:
    lines = lines_of(*STOCK, row("mine", **RATIOS))
    assert lines[0] == (
        "`results/x.json`: a GPU, torch 2.11, cuDNN 9, Triton 3.6, commit `abc`, 2026-01-02."
    )
    assert lines[2:5] == [
        "| direction | D | S | mask | FlashAttention-2 | cuDNN | mine | over FA2 | over cuDNN |",
        "|---|---|---|---|---|---|---|---|---|",
        "| forward | 64 | 1024 | causal | 82 | 164 | 123 | 1.50 | 0.75 |",
    ]
    assert "- forward over FlashAttention-2: geometric mean 1.50, worst cell 1.50" in lines


def test_who_has_no_figures_in_a_cell_has_a_dash() -> None:
    lines = lines_of(*STOCK, row("mine", **RATIOS), row("torch:cudnn", seq_len=4096))
    assert "| forward | 64 | 4096 | causal | - | 123 | - | - | - |" in lines


def test_rows_from_before_determinism_was_noted_join_those_that_were_not_to_repeat() -> None:
    old = row("torch:flash", direction="backward", tflops=82.3)
    new = row("mine", direction="backward", deterministic=False)
    repeating = row("mine", direction="backward", deterministic=True)
    assert lines_of(old, new, repeating)[4:7] == [
        "| backward | 64 | 1024 | causal | 82 | 123 |",
        "| backward, deterministic | 64 | 1024 | causal | - | 123 |",
        "",
    ]


def test_several_implementations_are_named_with_their_ratios() -> None:
    lines = lines_of(*STOCK, row("mine", **RATIOS), row("yours", **RATIOS))
    assert lines[2].endswith(
        "| mine over FA2 | mine over cuDNN | yours over FA2 | yours over cuDNN |"
    )
    assert "TFLOP/s; the last four columns are ratios of speed within the cell." in lines
    assert "- yours, forward over cuDNN: geometric mean 0.75, worst cell 0.75" in lines


def test_decoding_is_told_in_microseconds_and_bytes() -> None:
    lines = lines_of(row("torch:flash", gbs=2000.4, kv_heads=2, causal=False))
    assert lines[2] == "| B | Hq, Hkv | D | S | FlashAttention-2 |"
    assert lines[4] == "| 2 | 8, 2 | 64 | 1024 | 100.0 us, 2000 |"


def test_each_grid_has_a_table_where_there_are_several() -> None:
    lines = lines_of(row("a", grid="gqa", kv_heads=2), row("a", grid="varlen", seq_lens=[3, 1024]))
    assert lines.count("**gqa**") == lines.count("**varlen**") == 1
    assert "| forward | 8, 2 | 64 | 1024 | causal | 123 |" in lines
    assert "| forward | 64 | 1024 packed | causal | 123 |" in lines


def test_ceilings_host_times_and_an_early_end_are_told() -> None:
    text = "\n".join(
        lines_of(
            row("a"),
            ceilings={"matmul_tflops": 720.4, "copy_gbs": 3000.2},
            host_us={"served a": 40.2},
            finished=False,
        )
    )
    assert "ran at 720 TFLOP/s there, a copy at 3000 GB/s." in text
    assert "The run did not finish." in text
    assert text.endswith("- served a: 40 us")


def test_a_table_replaces_what_is_between_the_markers() -> None:
    page = f"before\n\n{BEGIN}\nold\n{END}\nafter\n"
    once = with_table(page, "| new |")
    assert once == f"before\n\n{BEGIN}\n\n| new |\n\n{END}\nafter\n"
    assert with_table(once, "| new |") == once
    with pytest.raises(ValueError, match="lacks the markers"):
        with_table("# a page", "| new |")


def test_a_page_may_speak_of_the_markers() -> None:
    page = f"write `{BEGIN}` and `{END}`\n\n{BEGIN}\n{END}\n"
    assert with_table(page, "| new |") == page.replace(f"\n{END}", f"\n\n| new |\n\n{END}")
    with pytest.raises(ValueError, match="on a line of its own"):
        with_table(f"write `{BEGIN}` and `{END}`\n", "| new |")
