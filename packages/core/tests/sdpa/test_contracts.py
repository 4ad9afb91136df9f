"""Results of every CUDA op: what torch's meta functions declare, with the right numbers.

The routers stand at the CUDA key and are called with CPU tensors, which needs no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention_registry.sdpa import dispatch_counts, install
from flash_attention_registry.sdpa.flash import LSE_OF_EMPTY_ROWS

CudaOp = Callable[..., Any]
B, HQ, HKV, SQ, SK, D = 2, 4, 2, 5, 7, 16


@pytest.fixture(autouse=True, params=["plain_kernels", "heads_first_kernels"])
def kernels(request: pytest.FixtureRequest) -> Any:
    """The plain kernel set, with and without the shortcut, installed for CUDA."""
    kernel_set = request.getfixturevalue(request.param)()
    install(kernel_set, "cuda")
    return kernel_set


def bhsd(heads: int, rows: int) -> Tensor:
    return torch.randn(B, heads, rows, D).to(torch.bfloat16)


def bshd(heads: int, rows: int) -> Tensor:
    return torch.randn(B, rows, heads, D).to(torch.bfloat16).transpose(1, 2)


def packed_qkv(heads: int, rows: int) -> Tensor:
    return torch.randn(B, rows, 3, heads, D).to(torch.bfloat16)[:, :, 1].transpose(1, 2)


def expanded(heads: int, rows: int) -> Tensor:
    return torch.randn(1, heads, rows, D).to(torch.bfloat16).expand(B, -1, -1, -1)


LAYOUTS = [bhsd, bshd, packed_qkv, expanded]


def described(result: Any) -> list[Any]:
    """Shape, dtype and strides of each tensor of a result, other values as they are."""
    parts = [result] if isinstance(result, Tensor) else list(result)
    return [
        (part.shape, part.dtype, part.stride()) if isinstance(part, Tensor) else part
        for part in parts
    ]


def on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def assert_as_meta_declares(op: str, result: Any, *args: Any, **kwargs: Any) -> None:
    declared = getattr(torch.ops.aten, op)(
        *map(on_meta, args), **{name: on_meta(value) for name, value in kwargs.items()}
    )
    assert described(result) == described(declared)


def expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse of `[B, H, S, D]` inputs in float64; `mask` is true where a key is seen."""
    group = query.shape[1] // key.shape[1]
    q, k, v = (tensor.double() for tensor in (query, key, value))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def bottom_right(rows: int, columns: int, left: int | None, right: int | None) -> Tensor:
    row = torch.arange(rows)[:, None] + columns - rows
    column = torch.arange(columns)[None, :]
    mask = torch.ones(rows, columns, dtype=torch.bool)
    if left is not None:
        mask &= column >= row - left
    if right is not None:
        mask &= column <= row + right
    return mask


def close(actual: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(actual.double(), reference.double(), atol=2e-2, rtol=2e-2)


def expected_grads(grad_out: Tensor, *qkv: Tensor, **options: Any) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().double().requires_grad_() for tensor in qkv]
    out, _ = expected(*leaves, **options)
    return torch.autograd.grad(out, leaves, grad_out.double())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_flash_forward(layout: Callable[..., Tensor], causal: bool, cuda_op: CudaOp) -> None:
    query, key, value = layout(HQ, SQ), layout(HKV, SK), layout(HKV, SK)
    op = "_scaled_dot_product_flash_attention"
    result = cuda_op(op, query, key, value, 0.0, causal, scale=0.3)
    assert_as_meta_declares(op, result, query, key, value, 0.0, causal, scale=0.3)
    mask = bottom_right(SQ, SK, None, 0) if causal else None
    out, lse = expected(query, key, value, mask, 0.3)
    close(result[0], out)
    close(result[1], lse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sdpa_flash_backward(layout: Callable[..., Tensor], cuda_op: CudaOp) -> None:
    query, key, value = layout(HQ, SQ), layout(HKV, SK), layout(HKV, SK)
    out, lse, _, _, max_q, max_k, seed, offset, _ = cuda_op(
        "_scaled_dot_product_flash_attention", query, key, value
    )
    grad_out = torch.randn(B, HQ, D, SQ).to(torch.bfloat16).mT
    op = "_scaled_dot_product_flash_attention_backward"
    inputs = grad_out, query, key, value, out, lse, None, None, max_q, max_k, 0.0, False
    grads = cuda_op(op, *inputs, seed, offset)
    assert_as_meta_declares(op, grads, *inputs, seed, offset)
    for grad, reference in zip(grads, expected_grads(grad_out, query, key, value), strict=True):
        close(grad, reference)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_pair(layout: Callable[..., Tensor], causal: bool, cuda_op: CudaOp) -> None:
    query, key, value = layout(HQ, SQ), layout(HKV, SQ), layout(HKV, SQ)
    op = "_scaled_dot_product_cudnn_attention"
    result = cuda_op(op, query, key, value, None, True, 0.0, causal)
    assert_as_meta_declares(op, result, query, key, value, None, True, 0.0, causal)
    mask = bottom_right(SQ, SQ, None, 0) if causal else None
    out, lse = expected(query, key, value, mask)
    close(result[0], out)
    close(result[1], lse[..., None])

    grad_out = torch.randn(()).to(torch.bfloat16).expand(query.shape)
    seed, offset = result[6:8]
    inputs = grad_out, query, key, value, result[0], result[1], seed, offset
    inputs = *inputs, None, None, None, SQ, SQ, 0.0, causal
    grads = cuda_op(f"{op}_backward", *inputs)
    assert_as_meta_declares(f"{op}_backward", grads, *inputs)
    references = expected_grads(grad_out, query, key, value, mask=mask)
    for grad, reference in zip(grads, references, strict=True):
        close(grad, reference)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [(None, None), (2, 1), (-1, 1), (2, -1), (-1, 0)])
def test_flash_pair_dense(
    layout: Callable[..., Tensor], window: tuple[int | None, int | None], cuda_op: CudaOp
) -> None:
    heads_first = layout(HQ, SQ), layout(HKV, SK), layout(HKV, SK)
    query, key, value = (tensor.transpose(1, 2) for tensor in heads_first)
    left, right = window
    options = {"scale": -0.2, "window_size_left": left, "window_size_right": right}
    inputs = query, key, value, None, None, SQ, SK, 0.0, False
    result = cuda_op("_flash_attention_forward", *inputs, False, **options)
    assert_as_meta_declares("_flash_attention_forward", result, *inputs, False, **options)
    mask = bottom_right(SQ, SK, *(None if bound == -1 else bound for bound in window))
    out, lse = expected(*heads_first, mask, -0.2)
    close(result[0].transpose(1, 2), out)
    close(result[1], lse)

    grad_out = torch.randn(query.shape).to(torch.bfloat16)
    inputs = grad_out, query, key, value, result[0], result[1], None, None, SQ, SK, 0.0, False
    inputs = *inputs, result[2], result[3]
    grads = cuda_op("_flash_attention_backward", *inputs, **options)
    assert_as_meta_declares("_flash_attention_backward", grads, *inputs, **options)
    references = expected_grads(grad_out.transpose(1, 2), *heads_first, mask=mask, scale=-0.2)
    for grad, reference in zip(grads, references, strict=True):
        close(grad.transpose(1, 2), reference)


def packed_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Three sequences, one of them empty, with their offsets."""
    offsets_query = torch.tensor([0, 5, 5, 8], dtype=torch.int32)
    offsets_key = torch.tensor([0, 4, 6, 13], dtype=torch.int32)
    query = torch.randn(8, HQ, D).to(torch.bfloat16)
    key, value = torch.randn(2, 13, HKV, D).to(torch.bfloat16)
    return query, key, value, offsets_query, offsets_key


def test_flash_pair_packed(cuda_op: CudaOp) -> None:
    query, key, value, offsets_query, offsets_key = packed_inputs()
    inputs = query, key, value, offsets_query, offsets_key, 5, 7, 0.0, True
    result = cuda_op("_flash_attention_forward", *inputs, False)
    assert_as_meta_declares("_flash_attention_forward", result, *inputs, False)
    grad_out = torch.randn(query.shape).to(torch.bfloat16)
    inputs = grad_out, query, key, value, *result[:2], offsets_query, offsets_key, 5, 7, 0.0, True
    inputs = *inputs, result[2], result[3]
    grads = cuda_op("_flash_attention_backward", *inputs)
    assert_as_meta_declares("_flash_attention_backward", grads, *inputs)

    q, k = slice(5, 8), slice(6, 13)
    one = [tensor.transpose(0, 1)[None] for tensor in (query[q], key[k], value[k])]
    mask = bottom_right(3, 7, None, 0)
    out, lse = expected(*one, mask)
    close(result[0][q].transpose(0, 1)[None], out)
    close(result[1][:, q][None], lse)
    references = expected_grads(grad_out[q].transpose(0, 1)[None], *one, mask=mask)
    for grad, rows, reference in zip(grads, (q, k, k), references, strict=True):
        close(grad[rows].transpose(0, 1)[None], reference)


@pytest.mark.parametrize("packed", [False, True])
def test_no_dropout_inplace_writes_out_and_returns_lse(packed: bool, cuda_op: CudaOp) -> None:
    op = "_flash_attention_forward_no_dropout_inplace"
    if not hasattr(torch.ops.aten, op):
        pytest.skip(f"torch {torch.__version__} has no {op}")
    query, key, value, *offsets = packed_inputs()
    if not packed:
        query, key, value = query[None], key[None], value[None]
        offsets = [None, None]
    inputs = query, key, value, *offsets, 5, 7, 0.0, False, False
    out = torch.full_like(query, math.nan)
    lse = cuda_op(op, out, *inputs)
    assert_as_meta_declares(op, lse, out, *inputs)
    reference = cuda_op("_flash_attention_forward", *inputs)
    assert torch.equal(out, reference[0])
    assert torch.equal(lse, reference[1])


def test_row_without_keys_reads_as_in_stock(cuda_op: CudaOp) -> None:
    query, key = bhsd(HQ, SK), bhsd(HQ, SQ)
    result = cuda_op("_scaled_dot_product_flash_attention", query, key, key, 0.0, True)
    assert (result[0][:, :, : SK - SQ] == 0).all()
    assert (result[1][:, :, : SK - SQ] == LSE_OF_EMPTY_ROWS).all()


def test_scale_is_the_callers_and_has_a_default(cuda_op: CudaOp, kernels: Any) -> None:
    query = bhsd(HQ, SQ)
    for scale in (None, 0.0, -1.5):
        cuda_op("_scaled_dot_product_flash_attention", query, query, query, scale=scale)
    assert [call.scale for call in kernels.calls] == [D**-0.5, 0.0, -1.5]


def test_kernels_that_allocate_are_copied_to_where_the_op_returns(
    cuda_op: CudaOp, kernels: Any, plain_kernels: type
) -> None:
    class Allocating(plain_kernels):  # type: ignore[misc]  # a fixture's class has no type
        def forward(self, call: Any) -> tuple[Tensor, Tensor]:
            out, lse = super().forward(call._replace(out=torch.zeros(call.query.shape)))
            return out, lse

    query = bshd(HQ, SQ)
    op = "_scaled_dot_product_flash_attention"
    expected_result = cuda_op(op, query, query, query)
    install(Allocating(), "cuda")
    result = cuda_op(op, query, query, query)
    assert result[0].stride() == query.stride()
    assert torch.equal(result[0], expected_result[0])


def test_auxiliary_outputs_are_fresh_in_every_call(cuda_op: CudaOp) -> None:
    query = bhsd(HQ, SQ)
    first, second = (
        cuda_op("_scaled_dot_product_flash_attention", query, query, query) for _ in range(2)
    )
    assert first[6].data_ptr() != second[6].data_ptr()
    assert first[6].data_ptr() != first[7].data_ptr()


def test_cudnn_backward_follows_who_ran_the_forward(cuda_op: CudaOp) -> None:
    query = bhsd(HQ, SQ)
    out, lse, *_, seed, offset, _ = cuda_op(
        "_scaled_dot_product_cudnn_attention", query, query, query, None, True
    )

    def backward(seed_: Tensor) -> Any:
        return cuda_op(
            "_scaled_dot_product_cudnn_attention_backward",
            *(out, query, query, query, out, lse, seed_, offset),
            *(None, None, None, SQ, SQ, 0.0, False),
        )

    assert len(backward(seed.detach())) == 3
    with pytest.raises(RuntimeError, match="no CUDA kernel"):
        backward(torch.zeros((), dtype=torch.int64))
    counts = dispatch_counts()["_scaled_dot_product_cudnn_attention_backward"]
    assert counts.served == 1
    assert counts.declined == {"forward was run by cuDNN": 1}
