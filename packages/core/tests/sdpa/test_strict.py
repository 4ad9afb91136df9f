"""A strict environment: a call that is not served is an error, and no call ends up on stock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flash_attention_registry import CallDeclinedError, EnvironmentVariableError
from flash_attention_registry.environment import STRICT
from flash_attention_registry.sdpa import (
    AttentionCall,
    dispatch_counts,
    install,
    installed_kernel_sets,
    router,
)

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
CUDA_FORWARD = "_scaled_dot_product_flash_attention"


def query(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 2, 8, 16, generator=generator).to(dtype).requires_grad_()


def attend(tensor: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(tensor, tensor, tensor)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STRICT, "1")


def test_a_declined_call_raises_with_op_reason_and_way_out(
    strict: None, plain_kernels: type
) -> None:
    install(plain_kernels("choosy"), "cpu")
    with pytest.raises(CallDeclinedError) as caught:
        attend(query(torch.float32))
    assert str(caught.value) == (
        f"choosy does not serve this call of aten::{FORWARD}: dtype torch.float32 is not "
        f"supported. It is an error because {STRICT} is set; unset it to let torch's own kernel "
        "run such calls."
    )
    assert isinstance(caught.value, RuntimeError)
    assert dispatch_counts()[FORWARD].declined == {"dtype torch.float32 is not supported": 1}


def test_a_declined_backward_raises_too(strict: None, plain_kernels: type) -> None:
    install(plain_kernels(features=frozenset({"causal"})), "cpu")
    out = attend(query())
    with pytest.raises(CallDeclinedError, match=f"aten::{BACKWARD}: .*backward"):
        out.sum().backward()


def test_a_call_of_a_cuda_op_raises_too(
    strict: None, plain_kernels: type, cuda_op: Callable[..., Any]
) -> None:
    install(plain_kernels(), "cuda")
    tensor = query().detach()
    with pytest.raises(CallDeclinedError, match=f"aten::{CUDA_FORWARD}: dropout_p > 0"):
        cuda_op(CUDA_FORWARD, tensor, tensor, tensor, 0.1)


def test_a_call_that_is_served_is_served(strict: None, plain_kernels: type) -> None:
    install(plain_kernels(), "cpu")
    tensor = query()
    attend(tensor).sum().backward()
    assert (dispatch_counts().served, dispatch_counts().declined) == (2, 0)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no luck"), torch.OutOfMemoryError("no memory"), ZeroDivisionError()],
    ids=lambda error: type(error).__name__,
)
def test_what_a_kernel_raises_is_raised_as_it_is(
    strict: None, plain_kernels: type, error: Exception
) -> None:
    install(plain_kernels(error=error), "cpu")
    with pytest.raises(type(error)) as caught:
        attend(query())
    assert caught.value is error
    assert dispatch_counts().served == dispatch_counts().declined == 0


def test_what_a_backward_raises_is_raised_as_it_is(strict: None, plain_kernels: type) -> None:
    kernels = plain_kernels()
    install(kernels, "cpu")
    out = attend(query())
    kernels.error = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        out.sum().backward()


def test_the_next_call_is_served_after_an_error(strict: None, plain_kernels: type) -> None:
    kernels = plain_kernels(error=RuntimeError("once"))
    install(kernels, "cpu")
    with pytest.raises(RuntimeError, match="once"):
        attend(query())
    kernels.error = None
    with pytest.raises(CallDeclinedError):
        attend(query(torch.float32))
    attend(query())
    assert dispatch_counts()[FORWARD].served == 1


def test_attention_that_a_kernel_set_uses_itself_is_stocks_all_the_same(
    strict: None, plain_kernels: type
) -> None:
    class UsesAttention(plain_kernels):  # type: ignore[misc]  # a fixture gives the class
        def forward(self, call: AttentionCall) -> Any:
            attend(query())
            return super().forward(call)

    install(UsesAttention(), "cpu")
    attend(query())
    assert dispatch_counts()[FORWARD].served == 1
    assert dispatch_counts()[FORWARD].declined == {"called from inside a kernel set": 1}


def test_the_variable_is_read_at_the_installation(
    monkeypatch: pytest.MonkeyPatch, plain_kernels: type
) -> None:
    handle = install(plain_kernels(), "cpu")
    monkeypatch.setenv(STRICT, "1")
    attend(query(torch.float32))
    handle.remove()
    install(plain_kernels(), "cpu")
    monkeypatch.delenv(STRICT)
    with pytest.raises(CallDeclinedError):
        attend(query(torch.float32))


def test_with_nothing_installed_calls_are_stocks(strict: None, plain_kernels: type) -> None:
    expected = attend(query(torch.float32))
    install(plain_kernels(), "cpu").remove()
    assert torch.equal(attend(query(torch.float32)), expected)


def test_a_value_that_is_no_boolean_refuses_the_installation_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, plain_kernels: type
) -> None:
    monkeypatch.setenv(STRICT, "maybe")
    with pytest.raises(EnvironmentVariableError, match="'maybe' is neither yes nor no"):
        install(plain_kernels(), "cpu")
    assert router._slots["cpu"].library is None
    monkeypatch.delenv(STRICT)
    first = plain_kernels("first")
    install(first, "cpu")
    monkeypatch.setenv(STRICT, "maybe")
    with pytest.raises(EnvironmentVariableError):
        install(plain_kernels("second"), "cpu")
    assert installed_kernel_sets() == {"cpu": first}
