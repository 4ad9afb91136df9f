"""Through `F.scaled_dot_product_attention` on the CPU, where torch has stock kernels too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attention_registry.sdpa import dispatch_counts, install

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


def inputs(
    rows: int = 12, columns: int = 12, head_dim: int = 16, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, rows, head_dim), (2, 4, columns, head_dim), (2, 4, columns, head_dim)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def run(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """out and the gradients of a call that weighs every element differently."""
    out = F.scaled_dot_product_attention(*tensors, **options)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


def bitwise(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"is_causal": True}, id="causal"),
        pytest.param({"scale": -0.7}, id="scale"),
    ],
)
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_sdpa_is_served_and_equals_stock(
    options: dict[str, Any], layout: str, plain_kernels: type
) -> None:
    tensors = inputs()
    if layout == "bshd":
        tensors = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
        tensors = [t.requires_grad_() for t in tensors]
    stock = run(tensors, **options)
    install(plain_kernels(), "cpu")
    served = run(tensors, **options)
    for ours, theirs in zip(served, stock, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours.float(), theirs.float(), atol=3e-2, rtol=3e-2)
    counts = dispatch_counts()
    assert (counts[FORWARD].served, counts[BACKWARD].served, counts.declined) == (1, 1, 0)


def test_results_are_laid_out_as_the_meta_functions_declare(plain_kernels: type) -> None:
    install(plain_kernels(), "cpu")
    query, key, value = (tensor.detach() for tensor in inputs(rows=5, columns=7))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    arguments = out, query, key, value, out, lse, 0.0, False
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    results = [out, lse, *backward(*arguments)]
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    declared = [*forward(query.to("meta"), key.to("meta"), value.to("meta"))]
    on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    declared += backward(*on_meta)
    assert dispatch_counts().served == 2
    for result, meta in zip(results, declared, strict=True):
        assert result.shape == meta.shape
        assert result.dtype is meta.dtype
        assert result.stride() == meta.stride()


@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        pytest.param(
            inputs(),
            {"attn_mask": torch.ones(12, 12, dtype=torch.bool).tril()},
            "attn_bias is not supported",
            id="mask",
        ),
        pytest.param(
            inputs(dtype=torch.float32), {}, "dtype torch.float32 is not supported", id="float32"
        ),
        pytest.param(
            inputs(dtype=torch.float64),
            {},
            "torch.float64 has a float64 logsumexp in this op, which is not supported",
            id="float64",
        ),
        pytest.param(inputs(head_dim=512), {}, "head_dim 512 is not supported", id="head-dim-512"),
        pytest.param(
            inputs(columns=9),
            {"is_causal": True},
            "causal attention of unequal lengths is top-left aligned here: not supported",
            id="causal-unequal",
        ),
    ],
)
def test_declined_call_is_bitwise_stock(
    tensors: list[Tensor], options: dict[str, Any], reason: str, plain_kernels: type
) -> None:
    stock = run(tensors, **options)
    kernel_set = plain_kernels()
    install(kernel_set, "cpu")
    assert bitwise(run(tensors, **options), stock)
    assert dispatch_counts()[FORWARD].declined == {reason: 1}
    assert dispatch_counts()[BACKWARD].declined == {reason: 1}
    assert kernel_set.calls == []


def test_mask_reaches_a_kernel_set_that_serves_it(plain_kernels: type) -> None:
    kernel_set = plain_kernels(features=frozenset({"attn_bias"}))
    install(kernel_set, "cpu")
    mask = torch.zeros(12, 12, dtype=torch.bfloat16)
    F.scaled_dot_product_attention(*inputs(), attn_mask=mask)
    assert kernel_set.calls[0].attn_bias.shape[-2:] == (12, 12)
    assert kernel_set.calls[0].lse_of_empty_rows == 0.0


def test_fully_masked_row_has_lse_zero_in_stock() -> None:
    query, key, value = (tensor.detach() for tensor in inputs())
    mask = torch.full((12, 12), -torch.inf, dtype=torch.bfloat16)
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = forward(query, key, value, attn_mask=mask)
    assert (lse == 0).all()
    assert (out == 0).all()


def test_stock_is_back_bitwise_after_remove(plain_kernels: type) -> None:
    tensors = inputs()
    stock = run(tensors, is_causal=True)
    handle = install(plain_kernels(), "cpu")
    assert dispatch_counts().served == 0
    run(tensors, is_causal=True)
    handle.remove()
    assert bitwise(run(tensors, is_causal=True), stock)
    assert dispatch_counts().served == 2


@pytest.mark.parametrize("ours_first", [True, False])
def test_backward_after_a_switch_is_right(ours_first: bool, plain_kernels: type) -> None:
    tensors = inputs()
    expected = run(tensors)
    handle = install(plain_kernels(), "cpu")
    if not ours_first:
        handle.remove()
    out = F.scaled_dot_product_attention(*tensors)
    if ours_first:
        handle.remove()
    else:
        install(plain_kernels(), "cpu")
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    grads = torch.autograd.grad((out * weights).sum(), tensors)
    counts = dispatch_counts()
    assert (counts[FORWARD].served, counts[BACKWARD].served) == ((1, 0) if ours_first else (0, 1))
    for ours, theirs in zip(grads, expected[1:], strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("loss", [Tensor.sum, lambda out: out.mT.contiguous().mT.square().sum()])
def test_gradients_of_any_layout_are_served(
    loss: Callable[[Tensor], Tensor], plain_kernels: type
) -> None:
    tensors = inputs()
    expected = torch.autograd.grad(loss(F.scaled_dot_product_attention(*tensors)), tensors)
    install(plain_kernels(), "cpu")
    grads = torch.autograd.grad(loss(F.scaled_dot_product_attention(*tensors)), tensors)
    assert dispatch_counts()[BACKWARD].served == 1
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=3e-2, rtol=3e-2)


def test_graph_compiled_before_activation_is_served_and_left_without_recompiling(
    plain_kernels: type,
) -> None:
    frames = 0

    def count(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        nonlocal frames
        frames += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    class Attention(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True) * 2

    compiled = torch.compile(Attention(), backend=count, fullgraph=True)
    tensors = inputs(dtype=torch.float16)

    def step() -> list[Tensor]:
        out = compiled(*tensors)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), tensors)]

    torch._dynamo.reset()
    stock = step()
    handle = install(plain_kernels(), "cpu")
    served = step()
    counts = dispatch_counts()
    assert (counts[FORWARD].served, counts[BACKWARD].served, counts.declined) == (1, 1, 0)
    for ours, theirs in zip(served, stock, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=5e-2, rtol=5e-2)
    handle.remove()
    assert bitwise(step(), stock)
    assert frames == 1
