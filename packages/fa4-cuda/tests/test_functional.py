"""Direct calls, as far as they go without a GPU: what is refused, and shapes under compilation."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fa4_cuda import flash_attn_func, flash_attn_varlen_func, kernel_set, library
from flash_attention_registry.sdpa import AttentionCall

Change = dict[str, Any]


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def dense(**changes: Any) -> Any:
    q = rows(2, 8, 4, 64)
    return flash_attn_func(**{"q": q, "k": q, "v": q, **changes})


def packed(**changes: Any) -> Any:
    q, offsets = rows(10, 4, 64), torch.tensor([0, 4, 10], dtype=torch.int32)
    arguments = {
        **{"q": q, "k": q, "v": q, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets},
        **{"max_seqlen_q": 6, "max_seqlen_k": 6},
    }
    return flash_attn_varlen_func(**(arguments | changes))


@pytest.mark.parametrize("call", [dense, packed])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dropout_p": 0.1}, "fa4-cuda does not serve dropout_p=0.1"),
        ({"softcap": 30.0}, "softcap=30.0"),
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes"),
    ],
    ids=["dropout", "softcap", "alibi"],
)
def test_what_is_not_computed_is_refused(
    call: Callable[..., Any], change: Change, text: str
) -> None:
    with pytest.raises(NotImplementedError, match=text):
        call(**change)


@pytest.mark.parametrize(
    ("call", "change", "text"),
    [
        (dense, {"k": rows(2, 8, 3, 64), "v": rows(2, 8, 3, 64)}, "q has 4 heads and k 3"),
        (dense, {"v": rows(2, 9, 4, 64)}, "k has shape"),
        (dense, {"q": rows(8, 4, 64)}, r"q must be \[B, S, H, D\]"),
        (packed, {"cu_seqlens_q": torch.tensor([0, 10])}, r"cu_seqlens_q must be \[B \+ 1\] int32"),
    ],
)
def test_tensors_that_do_not_fit_are_a_value_error(
    call: Callable[..., Any], change: Change, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        call(**change)


def test_tensors_of_a_cpu_are_refused_with_the_reason() -> None:
    with pytest.raises(NotImplementedError, match="fa4-cuda does not serve this call: device type"):
        dense()


@pytest.mark.parametrize("strides", [(2048, 256, 64, 1), (2048, 64, 512, 1)])
def test_shapes_and_strides_are_known_without_running(strides: tuple[int, ...]) -> None:
    with FakeTensorMode():
        q = torch.empty_strided((2, 8, 4, 64), strides, device="cuda", dtype=torch.float16)
        out, lse, _ = flash_attn_func(q, q, q, return_attn_probs=True)
        assert (out.shape, out.stride(), out.dtype) == (q.shape, q.stride(), q.dtype)
        assert (lse.shape, lse.dtype, lse.device) == ((2, 4, 8), torch.float32, q.device)


@pytest.mark.parametrize("strides", [(2048, 256, 64, 1), (2048, 64, 512, 1)])
def test_shapes_and_strides_of_gradients_are_known_without_running(
    strides: tuple[int, ...],
) -> None:
    with FakeTensorMode():
        q, k = (
            torch.empty_strided((2, 8, heads, 64), strides, device="cuda", dtype=torch.float16)
            for heads in (4, 2)
        )
        lse = torch.empty(2, 4, 8, device="cuda")
        rest = (None, None, 0, 0, 0.125, True, None, None, False)
        grads = torch.ops.fa4_cuda.attention_backward(q, q, k, k, q, lse, *rest)
        for grad, tensor in zip(grads, (q, k, k), strict=True):
            like = torch.empty_like(tensor)
            assert (grad.shape, grad.stride()) == (like.shape, like.stride())
            assert (grad.dtype, grad.device) == (tensor.dtype, tensor.device)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch, on_cpu: ctypes.CDLL) -> kernel_set.CudaKernels:
    """The kernel set, asked about tensors of a CPU as if they were a Hopper's."""
    found = dataclasses.replace(
        kernel_set.CAPABILITIES,
        device_types=frozenset({"cpu"}),
        min_compute_capability=None,
        max_compute_capability=None,
    )
    monkeypatch.setattr(kernel_set, "CAPABILITIES", found)
    for module in (kernel_set, library):
        monkeypatch.setattr(module, "load", lambda: on_cpu)
    return kernel_set.CudaKernels()


Q = rows(2, 8, 4, 64)
ASKED: dict[str, tuple[AttentionCall, str | None]] = {
    "dense": (AttentionCall(Q, Q, Q, 1.0, True), None),
    "window": (AttentionCall(Q, Q, Q, -1.0, False, 3, 2**40), None),
    "float32": (AttentionCall(Q.float(), Q.float(), Q.float(), 1.0, True), "float32"),
    "head_dim 60": (AttentionCall(*(Q[..., :60],) * 3, 1.0, True), "head_dim 60"),
    "misaligned": (AttentionCall(*(Q[..., 1:57],) * 3, 1.0, True), "multiples of 16 bytes"),
    "alibi": (AttentionCall(Q, Q, Q, 1.0, True, alibi_slopes=torch.ones(4)), "alibi_slopes"),
    "seqused": (AttentionCall(Q, Q, Q, 1.0, True, seqused_key=torch.ones(2).int()), None),
    "gaps in out": (
        AttentionCall(Q, Q, Q, 1.0, True, out=rows(2, 8, 4, 128)[..., ::2]),
        "last dimension of out",
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_the_kernel_set_says_what_it_serves(anywhere: kernel_set.CudaKernels, case: str) -> None:
    call, reason = ASKED[case]
    found = anywhere.supports(call)
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_are_declared_deterministic_or_not(deterministic: bool) -> None:
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert kernel_set.CAPABILITIES.reason_to_decline_backward() is None
    finally:
        torch.use_deterministic_algorithms(False)
