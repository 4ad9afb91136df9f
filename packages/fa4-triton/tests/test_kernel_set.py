"""What the router relies on in a kernel set, beside right numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fa4_triton.kernel_set import TritonKernels
from flash_attention_registry.sdpa import AttentionCall, KernelSet


def test_the_kernel_set_has_every_part_of_one() -> None:
    assert isinstance(TritonKernels(), KernelSet)


def test_output_goes_where_the_call_says(device: str, inputs: Any, run: Any) -> None:
    given = inputs(lengths=(30, 30), heads=(2, 1))
    expected = run(given)
    buffer = torch.full((1, 30, 4, 64), math.nan, dtype=torch.bfloat16, device=device)
    call = AttentionCall(
        given.query, given.key, given.value, 64**-0.5, False, out=buffer[:, :, 1:3]
    )
    out, _ = TritonKernels().forward(call)
    assert out is call.out
    assert torch.equal(buffer[:, :, 1:3], expected.out)
    assert buffer[:, :, [0, 3]].isnan().all()


@pytest.mark.parametrize("value", [0.0, -math.inf])
def test_lse_of_empty_rows_is_what_the_op_asks(inputs: Any, value: float) -> None:
    given = inputs(lengths=(30, 10))
    call = AttentionCall(given.query, given.key, given.value, 0.1, True, lse_of_empty_rows=value)
    kernels = TritonKernels()
    out, lse = kernels.forward(call)
    assert (lse[..., :20] == value).all()
    assert lse[..., 20:].isfinite().all()
    assert (out[:, :20] == 0).all()
    dq, _, _ = kernels.backward(call, given.grad_out, out, lse)
    assert (dq[:, :20] == 0).all()
    assert dq.isfinite().all()


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["mha", "gqa"])
def test_repeats_give_the_same_bits(inputs: Any, run: Any, heads: tuple[int, int]) -> None:
    given = inputs(lengths=(70, 130), heads=heads)
    first = run(given, causal=True)
    for _ in range(3):
        again = run(given, causal=True)
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(getattr(first, name), getattr(again, name)), name


def test_memory_of_these_tests_is_nan_until_written(
    inputs: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests above would not see an element that nobody wrote."""
    from fa4_triton.launch import Variant

    monkeypatch.setattr(Variant, "launch", lambda *_: None)
    result = run(inputs())
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert getattr(result, name).isnan().all(), name
