from __future__ import annotations

import pytest
import torch

from flash_attention_registry.sdpa import Capabilities
from flash_attention_testkit import case_grid
from flash_attention_testkit.cases import Family, Layout

GRIDS = ("quick", "standard", "exhaustive")
FEATURES = ("causal", "gqa", "varlen", "window")


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
    assert quick < 55, "for a CPU, in Triton's interpreter too"
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


def test_there_is_no_empty_and_no_other_grid() -> None:
    with pytest.raises(ValueError, match="no case grid 'fast'; choose one of \\['quick'"):
        case_grid("fast", capabilities())
    with pytest.raises(ValueError, match="is empty: the capabilities declare dtypes \\[\\]"):
        case_grid("quick", capabilities(dtypes=[]))
    with pytest.raises(ValueError, match="and head dims \\[\\]"):
        case_grid("quick", capabilities(head_dims=[]))
