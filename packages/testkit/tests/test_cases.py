from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from flash_attention_registry.sdpa import Capabilities
from flash_attention_testkit import SdpaCase

CASE = SdpaCase(2, 4, 2, 113, 203, 64, torch.bfloat16)


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


def test_features_are_what_a_call_asks_for() -> None:
    assert CASE.features == {"gqa"}
    assert replace(CASE, kv_heads=4).features == frozenset()
    every = replace(CASE, causal=True, window_left=0, lengths=((113, 203), (1, 1)))
    assert every.features == {"gqa", "causal", "window", "varlen"}


def test_declared_is_what_dtype_head_dim_and_features_allow() -> None:
    declared = Capabilities(
        device_types=frozenset({"cpu"}),
        dtypes=frozenset({torch.bfloat16}),
        head_dims=(64,),
        features=frozenset({"causal", "gqa"}),
        deterministic="never",
    )
    assert CASE.is_declared(declared)
    for change in ({"head_dim": 72}, {"dtype": torch.float16}, {"window_left": 0}):
        assert not replace(CASE, **change).is_declared(declared)
