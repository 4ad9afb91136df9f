from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from flash_attention_registry.sdpa import Capabilities
from flash_attention_testkit import SdpaCase, legal_cases, make_inputs

hypothesis = pytest.importorskip("hypothesis")


def declaring(*features: str) -> Capabilities:
    return Capabilities(
        device_types=frozenset({"cpu"}),
        dtypes=frozenset({torch.float16}),
        head_dims=(16, 40),
        features=frozenset(features),
        deterministic="always",
    )


EVERYTHING = declaring("causal", "gqa", "varlen", "window")


@pytest.mark.parametrize("declared", [EVERYTHING, declaring(), declaring("causal")])
def test_cases_are_declared_and_have_inputs(declared: Capabilities) -> None:
    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(legal_cases(declared, longest=24))
    def check(case: SdpaCase) -> None:
        assert case.is_declared(declared)
        assert max(case.seq_q, case.seq_k) <= 24
        assert case.heads <= 4
        inputs = make_inputs(case, 0)
        assert inputs.query.numel() > 0
        assert inputs.key.numel() > 0
        assert inputs.query.isfinite().all()

    check()


@pytest.mark.parametrize(
    "condition",
    [
        lambda case: case.lengths is not None and (0, 0) in case.lengths,
        lambda case: case.window_right is not None,
        lambda case: case.family == "masked-rows",
        lambda case: case.layout == "packed QKV slice" and case.lengths is not None,
        lambda case: case.heads == 4 and case.kv_heads == 1,
    ],
    ids=["empty sequence", "right window", "masked rows", "packed slice", "one key head"],
)
def test_every_kind_of_case_is_found(condition) -> None:
    settings = hypothesis.settings(
        max_examples=2000, deadline=None, derandomize=True, database=None
    )
    assert condition(hypothesis.find(legal_cases(EVERYTHING), condition, settings=settings))


def test_hypothesis_is_needed_only_for_the_strategy() -> None:
    code = """
import sys
sys.modules["hypothesis"] = None
from flash_attention_registry.sdpa import Capabilities
from flash_attention_testkit import case_grid, legal_cases, make_inputs
try:
    legal_cases(None)
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "legal_cases needs hypothesis" in done.stdout
    assert "pip install hypothesis" in done.stdout
