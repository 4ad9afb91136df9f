"""The shortcut that a kernel set may have for SDPA's own layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention_registry.errors import CallDeclinedError
from flash_attention_registry.sdpa import dispatch_counts, install

FLASH = "_scaled_dot_product_flash_attention"
CUDNN = "_scaled_dot_product_cudnn_attention"
CudaOp = Callable[..., Any]


@pytest.fixture
def tensors() -> list[Tensor]:
    """Query, key and value `[B, H, S, D]`, four query heads on two key heads."""
    return [torch.randn(2, heads, 6, 16).to(torch.bfloat16) for heads in (4, 2, 2)]


@pytest.mark.parametrize("op", [FLASH, CUDNN])
def test_it_takes_dense_calls_and_gives_what_forward_gives(
    op: str, heads_first_kernels: type, plain_kernels: type, tensors: list[Tensor], cuda_op: CudaOp
) -> None:
    options = (0.0, True) if op == FLASH else (None, True, 0.0, True)
    install(plain_kernels(), "cuda")
    expected = cuda_op(op, *tensors, *options, scale=0.3)
    kernels = heads_first_kernels()
    install(kernels, "cuda")
    found = cuda_op(op, *tensors, *options, scale=0.3)
    assert kernels.shortcuts == 1
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[1].stride() == expected[1].stride()
    assert dispatch_counts()[op].served == 2


def test_its_reason_is_counted(
    heads_first_kernels: type, tensors: list[Tensor], cuda_op: CudaOp
) -> None:
    install(heads_first_kernels(head_dims=(64,)), "cuda")
    with pytest.raises(RuntimeError, match="no CUDA kernel to fall back to"):
        cuda_op(FLASH, *tensors)
    assert dispatch_counts()[FLASH].declined == {"head_dim 16 is not supported": 1}


def test_its_reason_is_an_error_where_strictness_is_asked_for(
    heads_first_kernels: type,
    tensors: list[Tensor],
    cuda_op: CudaOp,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_IMPL_STRICT", "1")
    install(heads_first_kernels(head_dims=(64,)), "cuda")
    with pytest.raises(CallDeclinedError, match="head_dim 16 is not supported"):
        cuda_op(FLASH, *tensors)


def test_a_bias_goes_the_long_way(
    heads_first_kernels: type, tensors: list[Tensor], cuda_op: CudaOp
) -> None:
    kernels = heads_first_kernels()
    install(kernels, "cuda")
    bias = torch.zeros(2, 4, 6, 6, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="no CUDA kernel to fall back to"):
        cuda_op(CUDNN, *tensors, bias, True)
    assert kernels.shortcuts == 0
    assert dispatch_counts()[CUDNN].declined == {"attn_bias is not supported": 1}
