"""Direct calls without a GPU: what is refused, and results with a CPU in the GPU's place."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fa4_cuda import flash_attn_func, flash_attn_varlen_func, kernel_set
from flash_attention_registry.sdpa import AttentionCall
from flash_attention_testkit import SdpaResult, assert_sdpa_parity

Change = dict[str, Any]
SEQUENCES = torch.tensor([0, 4, 4, 10], dtype=torch.int32)
KEYS = torch.tensor([0, 3, 8, 8], dtype=torch.int32)


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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


def leaves(packed: bool, heads: int = 4, heads_kv: int = 2) -> list[Tensor]:
    """A query longer than its keys, so that causal rows see none; or packed sequences."""
    shape = (10, heads, 64), (8, heads_kv, 64)
    if not packed:
        shape = (2, 9, heads, 64), (2, 5, heads_kv, 64)
    made = rows(*shape[0]), rows(*shape[1], seed=1), rows(*shape[1], seed=2)
    return [tensor.requires_grad_() for tensor in made]


def attend(tensors: list[Tensor], **options: Any) -> Any:
    if tensors[0].dim() == 3:
        return flash_attn_varlen_func(*tensors, SEQUENCES, KEYS, 6, 5, **options)
    return flash_attn_func(*tensors, **options)


MASKS: dict[str, Change] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "left window, causal": {"window_size": (2, 7), "causal": True},
    "right window 0": {"window_size": (-1, 0)},
    "scale": {"softmax_scale": -0.3},
}
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


@PACKED
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_are_attentions(
    anywhere: kernel_set.CudaKernels,
    on_cpu: ctypes.CDLL,
    packed: bool,
    options: Change,
    deterministic: bool,
) -> None:
    tensors = leaves(packed)
    out, lse, mask = attend(tensors, **options, deterministic=deterministic, return_attn_probs=True)
    assert mask is None
    grad_out = rows(*out.shape, seed=3)
    grads = torch.autograd.grad(out, tensors, grad_out)
    assert on_cpu.was_deterministic() == deterministic
    left, right = options.get("window_size", (-1, -1))
    assert_sdpa_parity(
        options,
        SdpaResult(out.detach(), lse, *grads),
        *(tensor.detach() for tensor in tensors),
        grad_out=grad_out,
        causal=options.get("causal", False),
        window_left=left,
        window_right=right,
        scale=options.get("softmax_scale"),
        cu_seqlens_query=SEQUENCES if packed else None,
        cu_seqlens_key=KEYS if packed else None,
    )


def test_gradients_are_deterministic_too_if_torch_is_to_be(
    anywhere: kernel_set.CudaKernels, on_cpu: ctypes.CDLL
) -> None:
    tensors = leaves(packed=False)
    out = attend(tensors)
    torch.use_deterministic_algorithms(True)
    try:
        torch.autograd.grad(out, tensors, torch.ones_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    assert on_cpu.was_deterministic() == 1


def test_lse_is_not_differentiable(anywhere: kernel_set.CudaKernels) -> None:
    out, lse, _ = attend(leaves(packed=False), return_attn_probs=True)
    assert out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize(
    ("batch", "lengths"), [(0, (5, 7)), (2, (0, 7)), (2, (5, 0)), (2, (0, 0))], ids=str
)
def test_nothing_to_attend_gives_gradients_of_zero(
    anywhere: kernel_set.CudaKernels, batch: int, lengths: tuple[int, int]
) -> None:
    shapes = (batch, lengths[0], 4, 64), *((batch, lengths[1], 2, 64),) * 2
    tensors = [rows(*shape).requires_grad_() for shape in shapes]
    out, lse, _ = attend(tensors, return_attn_probs=True)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    for grad, tensor in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


def test_packed_sequences_may_all_be_empty(anywhere: kernel_set.CudaKernels) -> None:
    tensors = [rows(10, 4, 64), rows(0, 2, 64), rows(0, 2, 64)]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    none = torch.zeros(4, dtype=torch.int32)
    out = flash_attn_varlen_func(*tensors, SEQUENCES, none, 6, 0)
    assert (out == 0).all()
    for grad, tensor in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True):
        assert grad.shape == tensor.shape
        assert (grad == 0).all()


GRADIENTS_OF_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "one number": lambda grad: grad[..., :1, :1, :1].expand(grad.shape),
    "columns outside": lambda grad: grad.mT.contiguous().mT,
    "odd rows": lambda grad: torch.cat([grad, grad[..., :4]], -1)[..., :64],
    "misaligned": lambda grad: torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(grad.shape),
}


@PACKED
@pytest.mark.parametrize("name", GRADIENTS_OF_OUT)
def test_the_gradient_of_out_may_lie_anyhow(
    anywhere: kernel_set.CudaKernels, packed: bool, name: str
) -> None:
    tensors = leaves(packed)
    out = attend(tensors, causal=True)
    grad_out = GRADIENTS_OF_OUT[name](rows(*out.shape, seed=3))
    found = torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
    expected = torch.autograd.grad(out, tensors, grad_out.contiguous())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_last_dimension_with_gaps_is_copied(anywhere: kernel_set.CudaKernels) -> None:
    plain = leaves(packed=False)
    gapped = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in plain]
    assert gapped[0].stride(-1) == 2
    grad_out = rows(*plain[0].shape, seed=3)
    found = torch.autograd.grad(attend(gapped), plain, grad_out)
    expected = torch.autograd.grad(attend(plain), plain, grad_out)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@PACKED
def test_compiled_without_a_graph_break(
    anywhere: kernel_set.CudaKernels, on_cpu: ctypes.CDLL, packed: bool
) -> None:
    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend([query * 2, key, value], causal=True, deterministic=True).sin()

    tensors = leaves(packed)
    expected = step(*tensors)
    grad_out = rows(*expected.shape, seed=3)
    expected_grads = torch.autograd.grad(expected, tensors, grad_out)
    attend(tensors).sum().backward()
    assert on_cpu.was_deterministic() == 0
    torch._dynamo.reset()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors)
    assert torch.equal(found, expected)
    found_grads = torch.autograd.grad(found, tensors, grad_out)
    assert on_cpu.was_deterministic() == 1
    for one, other in zip(found_grads, expected_grads, strict=True):
        assert torch.equal(one, other)


@PACKED
def test_the_operator_says_its_own_shapes_and_derivative(
    anywhere: kernel_set.CudaKernels, packed: bool
) -> None:
    rest = (SEQUENCES, KEYS, 6, 5) if packed else (None, None, 0, 0)
    arguments = (*leaves(packed), *rest, 0.125, False, 5, 3, False)
    torch.library.opcheck(torch.ops.fa4_cuda.attention, arguments, rtol=0, atol=0)


def test_a_backward_that_is_not_launched_says_why(
    anywhere: kernel_set.CudaKernels, on_cpu: ctypes.CDLL
) -> None:
    tensors = leaves(packed=False)
    out = attend(tensors)
    on_cpu.pretend(-700)
    with pytest.raises(RuntimeError, match=r"backward kernel was not launched: .*CUDA error 700"):
        out.sum().backward()


def test_sequences_too_many_for_a_backward_are_refused_before_the_forward(
    anywhere: kernel_set.CudaKernels,
) -> None:
    count, longest = 2**18, 2**16
    query = torch.zeros(2 * longest, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    offsets = torch.full((count + 1,), longest, dtype=torch.int32)
    offsets[0] = 0
    with pytest.raises(NotImplementedError, match="too many rows or tiles"):
        flash_attn_varlen_func(query, query, query, offsets, offsets, longest, longest)


def test_gradients_where_keys_are_not_in_use_are_refused(
    anywhere: kernel_set.CudaKernels,
) -> None:
    """Of the kernel set alone: none of torch's backwards knows of such keys."""
    query, key, value = (tensor.detach() for tensor in leaves(packed=True))
    offsets = torch.tensor([0, 4, 8], dtype=torch.int32)
    used = torch.tensor([3, 1], dtype=torch.int32)
    query = query[:8]
    call = AttentionCall(
        query, key, value, 0.125, False, None, None, offsets, offsets, 4, 4, seqused_key=used
    )
    assert anywhere.supports(call) is None
    out, lse = anywhere.forward(call)
    with pytest.raises(NotImplementedError, match="seqused_key"):
        anywhere.backward(call, rows(*out.shape, seed=3), out, lse)
