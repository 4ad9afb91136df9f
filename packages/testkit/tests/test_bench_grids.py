"""Grids are what the papers measure, and work is counted as they count it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flash_attention_testkit.bench.grids import GRIDS, Cell, own_grid


def cell(**changes) -> Cell:
    fields = {
        "direction": "forward",
        "head_dim": 64,
        "seq_len": 128,
        "causal": False,
        "batch": 2,
        "heads": 4,
        "kv_heads": 4,
    }
    return Cell(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "flops"),
    [
        ({}, 4 * 2 * 4 * 128 * 128 * 64),
        ({"causal": True}, 2 * 2 * 4 * 128 * 128 * 64),
        ({"direction": "backward"}, 10 * 2 * 4 * 128 * 128 * 64),
        ({"kv_heads": 1}, 4 * 2 * 4 * 128 * 128 * 64),
        ({"query_len": 1}, 4 * 2 * 4 * 1 * 128 * 64),
        ({"seq_lens": (3, 128)}, 4 * 4 * (9 + 128 * 128) * 64),
    ],
)
def test_flops_are_counted_as_the_papers_count_them(changes, flops) -> None:
    assert cell(**changes).flops == flops


def test_a_decoding_step_reads_each_key_and_value_once() -> None:
    assert cell(query_len=1, kv_heads=2).key_value_bytes == 2 * (2 * 128) * 2 * 64 * 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_heads": 3}, "choose a divisor"),
        ({"seq_len": 0}, "at least 1"),
        ({"dtype": "int8"}, "dtype one of"),
        ({"direction": "sideways"}, "direction must be"),
        ({"grad_layout": "dhsb"}, "grad_layout must be"),
        ({"causal": True, "query_len": 1}, "without the mask"),
        ({"deterministic": True}, "measure it with the backward"),
    ],
)
def test_a_cell_that_no_kernel_could_run_is_refused(changes, said) -> None:
    with pytest.raises(ValueError, match=said):
        cell(**changes)


def test_anchors_are_the_papers_grid() -> None:
    cells = list(GRIDS["anchors"]())
    assert len(cells) == len(set(cells)) == 36
    assert {one.batch * one.seq_len for one in cells} == {16384}
    assert {one.heads * one.head_dim for one in cells} == {2048}
    assert {(one.head_dim, one.seq_len) for one in cells} == {
        (dim, length) for dim in (64, 128, 256) for length in (1024, 4096, 16384)
    }


def test_every_named_grid_is_what_its_name_says() -> None:
    assert all(one.is_decode and one.direction == "forward" for one in GRIDS["decode"]())
    assert all(sum(one.seq_lens) == 16384 for one in GRIDS["varlen"]())
    assert all(one.kv_heads < one.heads for one in GRIDS["gqa"]())
    assert max(one.flops for one in GRIDS["small"]()) < 1e8
    deterministic = list(GRIDS["deterministic"]())
    assert all(one.deterministic for one in deterministic)
    assert [replace(one, deterministic=False) for one in deterministic] == [
        one for one in GRIDS["anchors"]() if one.direction == "backward"
    ]


def test_an_own_grid_is_every_combination_and_defaults_to_the_anchors() -> None:
    cells = list(
        own_grid(
            head_dims=(128,), seq_lens=(512, 1024), heads=(8,), kv_heads=(2, 8), causal=(True,)
        )
    )
    assert len(cells) == 2 * 2 * 2
    assert {(one.seq_len, one.batch) for one in cells} == {(512, 32), (1024, 16)}
    assert {one.kv_heads for one in cells} == {2, 8}
