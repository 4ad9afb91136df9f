from __future__ import annotations

import pytest
import torch

from flash_attention_testkit import faithful_sdpa, reference_sdpa


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_have_a_kernels_dtypes(dtype: torch.dtype, make_inputs) -> None:
    query, key, value, grad_out = make_inputs(0, dtype, queries=9, keys=12)

    result = faithful_sdpa(query, key, value, grad_out=grad_out)

    assert result.lse.dtype == torch.float32
    assert {result.out.dtype, result.dq.dtype, result.dk.dtype, result.dv.dtype} == {dtype}


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [(torch.float16, 5e-5, 5e-4), (torch.bfloat16, 4e-4, 4e-3), (torch.float32, 0, 1e-6)],
    ids=str,
)
def test_errors_are_those_of_the_dtype(
    dtype: torch.dtype, least: float, most: float, make_inputs
) -> None:
    query, key, value, grad_out = make_inputs(1, dtype, queries=113, keys=203)
    exact = reference_sdpa(query, key, value, grad_out=grad_out, causal=True)

    result = faithful_sdpa(query, key, value, grad_out=grad_out, causal=True)

    for name in ("out", "dq", "dk", "dv"):
        truth = getattr(exact, name)
        relative = (getattr(result, name) - truth).norm() / truth.norm()
        assert least <= relative <= most, name


def test_probabilities_are_rounded_before_they_meet_the_values() -> None:
    # Two keys: weights 1 and p. Whether p is rounded to bf16 shows in the first element alone.
    query = torch.tensor([1.0]).bfloat16().view(1, 1, 1, 1)
    key = torch.tensor([1.0, 0.5]).bfloat16().view(1, 2, 1, 1)
    value = torch.tensor([0.0, 1.0]).bfloat16().view(1, 2, 1, 1)

    result = faithful_sdpa(query, key, value, scale=1.0)

    weight = torch.tensor(-0.5).double().exp()
    expected = weight.bfloat16().double() / (1 + weight)
    assert result.out.item() == expected.bfloat16().item()


def test_mixed_dtypes_are_refused() -> None:
    x = torch.zeros(1, 2, 1, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"value is torch\.bfloat16 and query torch\.float16"):
        faithful_sdpa(x, x, x.bfloat16())


def test_unknown_options_are_refused() -> None:
    x = torch.zeros(1, 2, 1, 8, dtype=torch.float16)
    with pytest.raises(TypeError, match="is_causal"):
        faithful_sdpa(x, x, x, is_causal=True)
