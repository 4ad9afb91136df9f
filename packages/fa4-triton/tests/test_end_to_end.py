"""From `F.scaled_dot_product_attention` to the kernels and back, through the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fa4_triton
import flash_attention_registry as registry
from flash_attention_registry.sdpa import dispatch_counts, reset_dispatch_counts
from flash_attention_testkit import SdpaResult, assert_sdpa_parity

CPU_OP = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture
def registered(flash_attention_registry_reset: Any) -> Iterator[None]:
    """Our implementation registered, nothing active, counts of zero."""
    fa4_triton.register()
    reset_dispatch_counts()
    yield
    reset_dispatch_counts()


@pytest.fixture
def active(registered: None) -> None:
    registry.activate_flash_attention_impl("fa4-triton")


def attend(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, **options: Any) -> Any:
    """Out and gradients of torch's function, of `[B, S, H, D]` inputs and in their layout."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), **options)
    out = out.transpose(1, 2)
    return SdpaResult(out.detach(), None, *torch.autograd.grad(out, leaves, grad_out))


def results(result: SdpaResult) -> tuple[Tensor | None, ...]:
    return result.out, result.dq, result.dk, result.dv


@pytest.mark.usefixtures("registered")
def test_activation_serves_forward_and_backward_and_restore_gives_stocks_bits(
    inputs: Callable[..., Any],
) -> None:
    given = inputs(lengths=(70, 70), heads=(2, 2), batch=2)
    tensors = given.query, given.key, given.value
    before = attend(*tensors, given.grad_out, is_causal=True)
    assert dispatch_counts().served == 0

    registry.activate_flash_attention_impl("fa4-triton")
    assert registry.current_flash_attention_impl() == "fa4-triton"
    served = attend(*tensors, given.grad_out, is_causal=True)
    assert (dispatch_counts().served, dispatch_counts().declined) == (2, 0)
    assert_sdpa_parity("active", served, *tensors, grad_out=given.grad_out, causal=True)

    registry.restore_flash_attention_impl()
    assert registry.current_flash_attention_impl() is None
    after = attend(*tensors, given.grad_out, is_causal=True)
    assert dispatch_counts().served == 2
    for one, other in zip(results(before), results(after), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("heads", [(4, 1), (6, 2)], ids=["mqa", "gqa"])
def test_grouped_heads_are_served(inputs: Callable[..., Any], heads: tuple[int, int]) -> None:
    given = inputs(lengths=(20, 50), heads=heads, head_dim=32, dtype="fp16")
    tensors = given.query, given.key, given.value
    result = attend(*tensors, given.grad_out, enable_gqa=True)
    assert dispatch_counts().served == 2
    assert_sdpa_parity(heads, result, *tensors, grad_out=given.grad_out)


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize("scale", [0.0, -0.2, 0.5])
def test_scale_reaches_the_kernels(inputs: Callable[..., Any], scale: float) -> None:
    given = inputs(lengths=(30, 30))
    tensors = given.query, given.key, given.value
    result = attend(*tensors, given.grad_out, scale=scale)
    assert dispatch_counts().served == 2
    assert_sdpa_parity(scale, result, *tensors, grad_out=given.grad_out, scale=scale)


@pytest.mark.usefixtures("active")
@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ({"dtype": torch.float32}, {}, "dtype torch.float32 is not supported"),
        ({"head_dim": 512}, {}, "head_dim 512 is not supported"),
        ({"head_dim": 20}, {}, "head_dim 20 is not supported"),
        ({}, {"attn_mask": True}, "attn_bias is not supported"),
        ({"lengths": (20, 30)}, {"is_causal": True}, "top-left aligned"),
    ],
    ids=["float32", "head_dim 512", "head_dim 20", "mask", "top-left causal"],
)
def test_what_is_not_served_runs_on_stock_and_is_counted(
    shape: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    rows, rows_kv = shape.get("lengths", (20, 20))
    generator = torch.Generator().manual_seed(0)

    def normal(length: int) -> Tensor:
        size = (1, length, 2, shape.get("head_dim", 64))
        return torch.randn(size, generator=generator).to(shape.get("dtype", torch.bfloat16))

    tensors = normal(rows), normal(rows_kv), normal(rows_kv), normal(rows)
    if "attn_mask" in options:
        options = {"attn_mask": torch.ones(rows, rows_kv, dtype=torch.bool).tril()}
    found = attend(*tensors, **options)
    counts = dispatch_counts()
    assert counts.served == 0
    for op in (CPU_OP, f"{CPU_OP}_backward"):
        assert [why for why in counts[op].declined if reason in why], counts
    registry.restore_flash_attention_impl()
    stock = attend(*tensors, **options)
    for one, other in zip(results(found), results(stock), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("active")
def test_dropout_is_stocks(device: str, inputs: Callable[..., Any]) -> None:
    given = inputs(lengths=(20, 20), heads=(2, 2))
    tensors = given.query, given.key, given.value
    torch.manual_seed(0)
    found = attend(*tensors, given.grad_out, dropout_p=0.5)
    assert dispatch_counts().served == 0
    registry.restore_flash_attention_impl()
    torch.manual_seed(0)
    stock = attend(*tensors, given.grad_out, dropout_p=0.5)
    for one, other in zip(results(found), results(stock), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("active")
def test_dtypes_that_differ_get_torchs_own_error(inputs: Callable[..., Any]) -> None:
    given = inputs(lengths=(20, 20))
    with pytest.raises(RuntimeError, match="dtype"):
        attend(given.query, given.key.half(), given.value, given.grad_out)


@pytest.mark.usefixtures("active")
def test_a_forward_by_us_and_a_backward_by_stock_are_right(inputs: Callable[..., Any]) -> None:
    given = inputs(lengths=(70, 70), heads=(2, 2))
    leaves = given.requiring_grad()
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), is_causal=True)
    out = out.transpose(1, 2)
    registry.restore_flash_attention_impl()
    grads = torch.autograd.grad(out, leaves, given.grad_out)
    assert dispatch_counts().served == 1
    assert_sdpa_parity(
        "mixed",
        SdpaResult(out.detach(), None, *grads),
        *(given.query, given.key, given.value),
        grad_out=given.grad_out,
        causal=True,
    )


@pytest.mark.usefixtures("registered")
def test_the_family_leaves_stock_in_place_where_stock_wins(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The family's other member, which it may well take where that is installed.
    monkeypatch.setenv("FLASH_ATTENTION_IMPL_DISABLE", "fa4-cuda")
    with pytest.raises(registry.FamilyUnavailableError, match="fa4-triton: not recommended here"):
        registry.activate_flash_attention_impl("FA4")
    assert registry.current_flash_attention_impl() is None


@pytest.mark.usefixtures("registered")
def test_an_unknown_name_changes_nothing() -> None:
    registry.activate_flash_attention_impl("fa4-triton")
    with pytest.raises(ValueError, match="Unknown flash attention impl 'fa4-tritn'"):
        registry.activate_flash_attention_impl("fa4-tritn")
    assert registry.current_flash_attention_impl() == "fa4-triton"


@pytest.mark.usefixtures("registered")
def test_the_report_says_available_and_why_not_recommended(device: str) -> None:
    (report,) = (
        one for one in registry.explain_flash_attention_impls() if one.name == "fa4-triton"
    )
    assert report.available
    assert not report.recommended
    assert report.family == "FA4"
