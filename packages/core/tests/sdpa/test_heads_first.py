"""The shortcut that a kernel set may have for SDPA's own layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attention_registry.errors import CallDeclinedError
from flash_attention_registry.sdpa import dispatch_counts, install, serving

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


def test_a_subclass_that_overrides_what_it_stands_for_goes_the_long_way(
    heads_first_kernels: Any, tensors: list[Tensor], cuda_op: CudaOp
) -> None:
    class Declining(heads_first_kernels):
        def supports(self, call: Any) -> str | None:
            return "never"

    class Counting(heads_first_kernels):
        forwards = 0

        def forward(self, call: Any) -> tuple[Tensor, Tensor]:
            self.forwards += 1
            return super().forward(call)

    counting = Counting()
    install(counting, "cuda")
    cuda_op(FLASH, *tensors)
    assert (counting.forwards, counting.shortcuts) == (1, 0)
    install(Declining(), "cuda")
    with pytest.raises(RuntimeError, match="no CUDA kernel to fall back to"):
        cuda_op(FLASH, *tensors)
    assert dispatch_counts()[FLASH].declined == {"never": 1}


def test_methods_of_an_instance_override_too(
    heads_first_kernels: Any, tensors: list[Tensor], cuda_op: CudaOp
) -> None:
    kernels = heads_first_kernels()
    kernels.supports = lambda call: "never"
    install(kernels, "cuda")
    with pytest.raises(RuntimeError, match="no CUDA kernel to fall back to"):
        cuda_op(FLASH, *tensors)
    assert kernels.shortcuts == 0


def test_it_is_taken_from_a_subclass_that_overrides_all(
    heads_first_kernels: Any, tensors: list[Tensor], cuda_op: CudaOp
) -> None:
    class Own(heads_first_kernels):
        def supports(self, call: Any) -> str | None:
            return super().supports(call)

        def forward_heads_first(self, *arguments: Any) -> str | None:
            return super().forward_heads_first(*arguments)

    kernels = Own()
    install(kernels, "cuda")
    cuda_op(FLASH, *tensors)
    assert kernels.shortcuts == 1


def test_a_wrapper_does_not_lend_it_by_delegation(
    heads_first_kernels: Any, tensors: list[Tensor], cuda_op: CudaOp
) -> None:
    class Wrapper:
        def __init__(self, wrapped: Any) -> None:
            self.wrapped = wrapped

        def supports(self, call: Any) -> str | None:
            return "never"

        def __getattr__(self, name: str) -> Any:
            return getattr(self.wrapped, name)

    wrapped = heads_first_kernels()
    kernels: Any = Wrapper(wrapped)
    install(kernels, "cuda")
    with pytest.raises(RuntimeError, match="no CUDA kernel to fall back to"):
        cuda_op(FLASH, *tensors)
    assert wrapped.shortcuts == 0


def test_a_new_shape_keeps_no_tensor_of_its_size(
    heads_first_kernels: Any, tensors: list[Tensor], cuda_op: CudaOp
) -> None:
    """Patterns are for outputs whose sizes are few and small."""
    install(heads_first_kernels(), "cuda")
    cuda_op(FLASH, *tensors)
    before = serving.pattern.cache_info().misses
    cuda_op(FLASH, *(torch.randn(2, 4, 11, 16).to(torch.bfloat16) for _ in range(3)))
    assert serving.pattern.cache_info().misses == before


@pytest.mark.parametrize(
    ("returned", "text"),
    [((None, None), "a tuple"), (True, "a bool"), ("", "an empty string")],
    ids=["results", "bool", "empty"],
)
def test_what_is_neither_none_nor_a_reason_is_not_taken_for_a_result(
    heads_first_kernels: Any, tensors: list[Tensor], returned: object, text: str
) -> None:
    class Talking(heads_first_kernels):
        def forward_heads_first(self, *_: Any) -> object:
            return returned

    expected = F.scaled_dot_product_attention(*tensors, enable_gqa=True)
    install(Talking(f"talking {text}"), "cpu")
    with pytest.warns(RuntimeWarning, match=f"forward_heads_first.. returned {text}; it returns"):
        assert torch.equal(F.scaled_dot_product_attention(*tensors, enable_gqa=True), expected)
    assert dispatch_counts().served == 0


def test_a_wrapper_without_a_dict_has_no_shortcut_of_what_it_wraps(
    heads_first_kernels: Any, tensors: list[Tensor]
) -> None:
    class Wrapper:
        __slots__ = ("wrapped",)

        def __init__(self, wrapped: Any) -> None:
            self.wrapped = wrapped

        def supports(self, call: Any) -> str | None:
            return "never"

        def __getattr__(self, name: str) -> Any:
            return getattr(self.wrapped, name)

    kernels = heads_first_kernels()
    kernels.forward_heads_first = kernels.forward_heads_first  # in its own dictionary
    install(Wrapper(kernels), "cpu")
    F.scaled_dot_product_attention(*tensors, enable_gqa=True)
    assert kernels.shortcuts == 0
    assert dispatch_counts().declined == 1
