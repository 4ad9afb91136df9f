from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from flash_attention_registry.sdpa import Capabilities
from flash_attention_testkit import SdpaCase, assert_sdpa_parity, legal_cases, make_inputs

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


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


def test_any_legal_case_is_one_that_a_correct_kernel_passes(flash_style) -> None:
    dtypes, head_dims = set(), set()

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(legal_cases(longest=70), st.integers(0, 2**32))
    def check(case: SdpaCase, seed: int) -> None:
        dtypes.add(case.dtype)
        head_dims.add(case.head_dim)
        inputs = make_inputs(case, seed)
        tensors = (inputs.query, inputs.key, inputs.value)
        actual = flash_style()(*tensors, grad_out=inputs.grad_out, **inputs.options)
        assert_sdpa_parity(case, actual, *tensors, grad_out=inputs.grad_out, **inputs.options)

    check()
    assert dtypes == {torch.float16, torch.bfloat16}
    assert head_dims <= set(range(8, 257, 8))
    assert len(head_dims) > 9


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
        max_examples=2000,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],  # any will do, be it the smallest or not
    )
    assert condition(hypothesis.find(legal_cases(EVERYTHING), condition, settings=settings))


def test_hypothesis_is_needed_only_for_the_strategy() -> None:
    code = """
import sys
sys.modules["hypothesis"] = None
from flash_attention_testkit import case_grid, legal_cases, make_inputs
try:
    legal_cases()
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "legal_cases needs hypothesis" in done.stdout
    assert "pip install hypothesis" in done.stdout
