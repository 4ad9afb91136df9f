from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from flash_attention_registry.sdpa import Capabilities
from flash_attention_testkit import SdpaCase, case_grid
from flash_attention_testkit.cases import Family, Layout

GRIDS = ("quick", "standard", "exhaustive")
FEATURES = ("causal", "gqa", "varlen", "window")
CASE = SdpaCase(2, 4, 2, 113, 203, 64, torch.bfloat16)


def capabilities(
    *features: str, dtypes=(torch.float16, torch.bfloat16), head_dims=(16, 64, 72)
) -> Capabilities:
    return Capabilities(
        device_types=frozenset({"cpu"}),
        dtypes=frozenset(dtypes),
        head_dims=head_dims,
        features=frozenset(features),
        deterministic="always",
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "bf16-2x113x203-h4kv2-d64-std-1"),
        ({"causal": True, "window_left": 7}, "bf16-2x113x203-h4kv2-d64-causal-left7-std-1"),
        (
            {"window_right": 3, "scale": -0.2, "layout": "BHSD", "family": "peaked"},
            "bf16-2x113x203-h4kv2-d64-right3-scale-0.2-BHSD-peaked",
        ),
        (
            {"lengths": ((113, 5), (0, 203)), "dtype": torch.float16},
            "fp16-varlen-113x5+0x203-h4kv2-d64-std-1",
        ),
        (
            {"seq_q": 203, "layout": "packed QKV slice"},
            "bf16-2x203x203-h4kv2-d64-packed-QKV-slice-std-1",
        ),
    ],
    ids=["plain", "causal", "window", "varlen", "packed"],
)
def test_an_id_tells_the_case(change, name: str) -> None:
    case = replace(CASE, **change)
    assert case.id == str(case) == name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_k": 0}, "must be at least 1"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads"),
        ({"window_left": -1}, "window_left must be at least 0"),
        ({"window_right": 0}, "causal is a right window of 0"),
        ({"causal": True, "window_right": 2}, "causal is a right window of 0"),
        ({"layout": "HSBD"}, "layouts are"),
        ({"family": "normal"}, "families"),
        ({"layout": "packed QKV slice"}, "as many query rows as keys"),
        ({"causal": True, "family": "masked-rows"}, "every row sees a key"),
        ({"lengths": ((113, 203),)}, "1 sequences of up to"),
        ({"lengths": ((113, 203), (3, -1))}, "lengths must be at least 0"),
        ({"lengths": ((113, 203), (3, 1)), "layout": "BHSD"}, "no batch to lay out otherwise"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_no_problem_is_refused_by_name(change, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        replace(CASE, **change)
    assert "bf16-" in str(caught.value), "it says which case"


def test_whether_rows_are_masked_is_read_off_the_mask() -> None:
    for queries, keys, causal, left, right in product(
        (1, 2, 5), (1, 2, 5), (False, True), (None, 0, 2), (None, 1, 3)
    ):
        if causal and right is not None:
            continue
        case = SdpaCase(1, 1, 1, queries, keys, 8, torch.float16, causal, left, right)
        last = 0 if causal else right
        sees = [
            any(
                (left is None or key >= row + keys - queries - left)
                and (last is None or key <= row + keys - queries + last)
                for key in range(keys)
            )
            for row in range(queries)
        ]
        assert case.has_masked_rows is (not all(sees)), case


def test_sequences_without_keys_have_masked_rows() -> None:
    case = replace(CASE, seq_q=4, seq_k=9, lengths=((4, 9), (2, 0)))
    assert case.has_masked_rows
    assert not replace(case, lengths=((4, 9), (0, 0))).has_masked_rows


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_asks_for_nothing_that_is_not_declared(grid: str) -> None:
    for declared in ((), ("causal",), ("gqa", "window"), FEATURES):
        cases = case_grid(grid, capabilities(*declared, dtypes=[torch.float16]))
        asked = {feature for case in cases for feature in case.features}
        assert asked == set(declared), "and for all that is"
        assert {case.dtype for case in cases} == {torch.float16}
        assert {case.head_dim for case in cases} <= {16, 64, 72}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_depends_on_no_provider_unless_one_is_named(grid: str) -> None:
    cases = case_grid(grid)

    assert cases == case_grid(grid, None)
    assert {case.dtype for case in cases} == {torch.float16, torch.bfloat16}
    assert {8, 64, 128, 256} <= {case.head_dim for case in cases} <= set(range(8, 257, 8))
    for features in ({"gqa"}, {"causal", "gqa"}, {"varlen", "window"}, {"causal", "gqa", "varlen"}):
        assert features in [case.features for case in cases]


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_has_every_family_layout_dtype_and_extreme_head_dim(grid: str) -> None:
    cases = case_grid(grid, capabilities(*FEATURES))

    assert {case.family for case in cases} == set(Family.__args__)
    assert {case.layout for case in cases} == set(Layout.__args__)
    assert {case.dtype for case in cases} == {torch.float16, torch.bfloat16}
    assert min(case.head_dim for case in cases) == 16
    assert any(case.seq_q > case.seq_k for case in cases if case.causal)
    assert any(case.scale == 0 for case in cases)
    if grid == "exhaustive":
        assert {case.head_dim for case in cases} == {16, 64, 72}


@pytest.mark.parametrize("grid", GRIDS)
def test_the_ids_of_a_grid_are_unique_and_repeat(grid: str) -> None:
    ids = [case.id for case in case_grid(grid, capabilities(*FEATURES))]
    assert len(set(ids)) == len(ids)
    assert ids == [case.id for case in case_grid(grid, capabilities(*FEATURES))]


def test_grids_grow() -> None:
    quick, standard, exhaustive = (len(case_grid(grid)) for grid in GRIDS)
    assert quick < 50, "for a CPU, in Triton's interpreter too"
    assert 200 < standard < 400, "for minutes on a GPU"
    assert exhaustive > 10 * standard


def test_the_quick_grid_is_small_in_every_case() -> None:
    for case in case_grid("quick"):
        scores = case.heads * sum(queries * keys for queries, keys in case.sequences)
        assert scores <= 4 * 113 * 203, case


def test_the_standard_grid_compiles_few_kernels() -> None:
    compiled = {
        (
            *(case.dtype, case.head_dim, case.causal, case.lengths is None),
            *(case.window_left is None, case.window_right is None, case.heads == case.kv_heads),
        )
        for case in case_grid("standard")
    }
    assert len(compiled) < 50


def test_features_are_what_a_call_asks_for() -> None:
    assert CASE.features == {"gqa"}
    assert replace(CASE, kv_heads=4).features == frozenset()
    every = replace(CASE, causal=True, window_left=0, lengths=((113, 203), (1, 1)))
    assert every.features == {"gqa", "causal", "window", "varlen"}
    assert every.is_declared(capabilities(*FEATURES))
    assert not every.is_declared(capabilities("gqa", "causal", "window"))
    assert not every.is_declared(capabilities(*FEATURES, head_dims=[16]))
    assert not every.is_declared(capabilities(*FEATURES, dtypes=[torch.float16]))


def test_there_is_no_empty_and_no_other_grid() -> None:
    with pytest.raises(ValueError, match="no case grid 'fast'; choose one of \\['quick'"):
        case_grid("fast", capabilities())
    with pytest.raises(ValueError, match="is empty: the capabilities declare dtypes \\[\\]"):
        case_grid("quick", capabilities(dtypes=[]))
    with pytest.raises(ValueError, match="and head dims \\[\\]"):
        case_grid("quick", capabilities(head_dims=[]))
