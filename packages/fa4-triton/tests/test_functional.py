"""The functions known from flash-attn 2: results, gradients, compilation, refusals."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fa4_triton import flash_attn_func, flash_attn_varlen_func
from flash_attention_testkit import SdpaResult, assert_sdpa_parity

Make = Callable[..., Any]


def packed_arguments(inputs: Any) -> tuple[Any, ...]:
    longest = (max(one, default=0) for one in inputs.lengths)
    return (*inputs.offsets(), *longest)


def check(
    inputs: Any, *, causal: bool = False, window: tuple[int, int] = (-1, -1), scale: Any = None
) -> None:
    """Compare results and autograd's gradients with the references."""
    __tracebackhide__ = True
    leaves = inputs.requiring_grad()
    options: dict[str, Any] = {
        "causal": causal,
        "window_size": window,
        "softmax_scale": scale,
        "return_attn_probs": True,
    }
    if inputs.lengths is None:
        result = flash_attn_func(*leaves, **options)
    else:
        result = flash_attn_varlen_func(*leaves, *packed_arguments(inputs), **options)
    out, lse, mask = result
    assert mask is None
    grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    offsets = inputs.offsets()
    assert_sdpa_parity(
        options,
        SdpaResult(out.detach(), lse, *grads),
        inputs.query,
        inputs.key,
        inputs.value,
        grad_out=inputs.grad_out,
        causal=causal,
        window_left=window[0],
        window_right=window[1],
        scale=scale,
        cu_seqlens_query=offsets[0],
        cu_seqlens_key=offsets[1],
    )


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (10, 3)},
    "left window, causal": {"window": (10, 3), "causal": True},
    "window (0, 0)": {"window": (0, 0)},
    "right window 0": {"window": (-1, 0)},
    "scale": {"scale": -0.3},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_dense_results_and_gradients(inputs: Make, case: dict[str, Any]) -> None:
    check(inputs(lengths=(40, 70), heads=(4, 2), head_dim=32), **case)


@pytest.mark.parametrize("case", [CASES["causal"], CASES["window"]], ids=["causal", "window"])
def test_packed_results_and_gradients(inputs: Make, case: dict[str, Any]) -> None:
    check(inputs(lengths=([30, 0, 12], [10, 5, 40]), heads=(2, 1), head_dim=32), **case)


def test_out_alone_is_what_out_is_beside_lse(inputs: Make) -> None:
    given = inputs(lengths=(20, 20))
    tensors = given.query, given.key, given.value
    out = flash_attn_func(*tensors)
    assert isinstance(out, Tensor)
    both = flash_attn_func(*tensors, return_attn_probs=True)
    assert torch.equal(out, both[0])
    assert out.shape == given.query.shape
    assert both[1].shape == (1, 1, 20)
    assert both[1].dtype is torch.float32


def test_rows_without_keys_give_zero_and_minus_infinity(inputs: Make) -> None:
    given = inputs(lengths=(30, 10))
    leaves = given.requiring_grad()
    out, lse, _ = flash_attn_func(*leaves, causal=True, return_attn_probs=True)
    assert (out[:, :20] == 0).all()
    assert (lse[..., :20] == -math.inf).all()
    assert lse[..., 20:].isfinite().all()
    for grad in torch.autograd.grad(out, leaves, given.grad_out):
        assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("batch", "lengths"), [(0, (5, 7)), (2, (0, 7)), (2, (5, 0)), (2, (0, 0))], ids=str
)
def test_nothing_to_attend_gives_results_of_the_right_shape(
    device: str, batch: int, lengths: tuple[int, int]
) -> None:
    rows, rows_kv = lengths
    query = torch.ones(batch, rows, 4, 64, dtype=torch.float16, device=device)
    key = torch.ones(batch, rows_kv, 2, 64, dtype=torch.float16, device=device)
    leaves = [x.requires_grad_() for x in (query, key, key.clone())]
    out, lse, _ = flash_attn_func(*leaves, return_attn_probs=True)
    assert out.shape == query.shape
    assert lse.shape == (batch, 4, rows)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    for grad, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape
        assert (grad == 0).all()


@pytest.mark.parametrize(
    "lengths", [([0, 0], [3, 4]), ([3, 4], [0, 0]), ([0], [0]), ([], [])], ids=str
)
def test_packed_sequences_may_all_be_empty_and_there_may_be_none(
    device: str, inputs: Make, lengths: tuple[list[int], list[int]]
) -> None:
    given = inputs(lengths=lengths, heads=(4, 2))
    leaves = given.requiring_grad()
    out, lse, _ = flash_attn_varlen_func(*leaves, *packed_arguments(given), return_attn_probs=True)
    assert (out == 0).all()
    assert lse.shape == (4, given.query.shape[0])
    assert (lse == -math.inf).all()
    for grad, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert grad.shape == leaf.shape
        assert (grad == 0).all()


def test_a_last_dimension_with_gaps_is_copied(inputs: Make) -> None:
    given = inputs(lengths=(20, 30), heads=(2, 2), head_dim=32)
    expected = flash_attn_func(given.query, given.key, given.value)
    gapped = [x.repeat_interleave(2, -1)[..., ::2] for x in (given.query, given.key, given.value)]
    assert gapped[0].stride(-1) == 2
    assert torch.equal(flash_attn_func(*gapped), expected)


def test_rows_may_overlap(inputs: Make) -> None:
    """Sixteen windows of 32 elements, one element apart: rows and columns have the same stride."""
    line = inputs(lengths=(1, 1), head_dim=48).query.flatten()
    windows = line[:47].unfold(0, 32, 1)[None, :, None]
    assert windows.stride(1) == windows.stride(3) == 1

    def results(x: torch.Tensor) -> list[torch.Tensor]:
        leaf = x.detach().requires_grad_()
        out = flash_attn_func(leaf, leaf, leaf)
        return [out, *torch.autograd.grad(out, leaf, torch.ones_like(x.contiguous()))]

    for found, expected in zip(results(windows), results(windows.contiguous()), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", ["scalar", "transposed"])
def test_gradients_of_out_may_have_any_strides(inputs: Make, shape: str) -> None:
    given = inputs(lengths=(20, 30), heads=(2, 2), head_dim=32)
    leaves = given.requiring_grad()
    out = flash_attn_func(*leaves)
    if shape == "scalar":
        grad_out = torch.ones_like(out[:1, :1, :1, :1]).expand_as(out)
    else:
        grad_out = given.grad_out.transpose(1, 3).contiguous().transpose(1, 3)
    found = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    expected = torch.autograd.grad(out, leaves, grad_out.contiguous())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_lse_is_not_differentiable(inputs: Make) -> None:
    given = inputs(lengths=(20, 30))
    out, lse, _ = flash_attn_func(*given.requiring_grad(), return_attn_probs=True)
    assert out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_compiled_without_a_graph_break(inputs: Make, packed: bool) -> None:
    lengths = ([20, 13], [30, 3]) if packed else (33, 33)
    given = inputs(lengths=lengths, heads=(2, 1), head_dim=32)
    rest = packed_arguments(given) if packed else ()
    function = flash_attn_varlen_func if packed else flash_attn_func

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse, _ = function(query * 2, key, value, *rest, causal=True, return_attn_probs=True)
        return out + lse.new_zeros(()).to(out.dtype)

    leaves = given.requiring_grad()
    expected = attend(*leaves)
    expected_grads = torch.autograd.grad(expected, leaves, given.grad_out)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found = compiled(*leaves)
    assert torch.equal(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, leaves, given.grad_out), expected_grads, strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_operator_says_its_own_shapes_and_derivative(inputs: Make, packed: bool) -> None:
    given = inputs(
        lengths=([20, 13], [30, 3]) if packed else (33, 20), heads=(2, 1), layout="odd strides"
    )
    rest = packed_arguments(given) if packed else (None, None, 0, 0)
    attention = torch.ops.fa4_triton.attention.default
    torch.library.opcheck(
        attention, (*given.requiring_grad(), *rest, 0.125, False, 5, 3, False), rtol=0, atol=0
    )


def dense() -> list[Tensor]:
    return [torch.zeros(1, 4, 2, 64, dtype=torch.float16) for _ in range(3)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dropout_p": 0.1}, "dropout_p=0.1"),
        ({"softcap": 30.0}, "softcap=30.0"),
        ({"alibi_slopes": torch.zeros(2)}, "alibi_slopes"),
    ],
)
def test_options_that_are_not_served_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(NotImplementedError, match=f"does not serve {named}; leave it"):
        flash_attn_func(*dense(), **options)


def test_paged_keys_are_refused() -> None:
    tensors = [x[0] for x in dense()]
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="does not serve block_table"):
        flash_attn_varlen_func(
            *tensors, offsets, offsets, 4, 4, block_table=torch.zeros(1, 1, dtype=torch.int32)
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.float(), "dtype torch.float32 is not supported"),
        (lambda x: x.double(), "dtype torch.float64 is not supported"),
        (lambda x: x[..., :20], "head_dim 20 is not supported"),
        (lambda x: torch.cat([x] * 5, -1), "head_dim 320 is not supported"),
        (lambda x: x[:, :0].float(), "dtype torch.float32 is not supported"),
    ],
    ids=["float32", "float64", "odd", "wide", "empty float32"],
)
def test_tensors_that_are_not_served_are_refused(
    change: Callable[[Tensor], Tensor], reason: str
) -> None:
    with pytest.raises(NotImplementedError, match=f"does not serve this call: {reason}"):
        flash_attn_func(*(change(x) for x in dense()))


def test_tensors_on_the_cpu_are_refused_unless_interpreted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a process of its own: this one may be interpreting."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    code = (
        "import torch, fa4_triton\n"
        "x = torch.zeros(1, 4, 2, 64, dtype=torch.float16)\n"
        "try:\n"
        "    fa4_triton.flash_attn_func(x, x, x)\n"
        "except NotImplementedError as error:\n"
        "    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "device type cpu is not supported" in done.stdout, done.stderr


MISFITS: dict[str, tuple[Callable[..., list[Tensor]], str]] = {
    "rank": (lambda q, k, v: [q[0], k, v], r"q must be \[B, S, H, D\], but has shape \[4, 2, 64\]"),
    "dtype": (lambda q, k, v: [q, k.bfloat16(), v], "k is torch.bfloat16 and q torch.float16"),
    "device": (lambda q, k, v: [q, k, v.to("meta")], "v is on meta and q on cpu; move all to one"),
    "batch": (lambda q, k, v: [q, k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)], "batch size 1 and"),
    "key and value": (
        lambda q, k, v: [q, k, v[:, :3]],
        r"v \[1, 3, 2, 64\]; they must be the same",
    ),
    "head_dim": (lambda q, k, v: [q[..., :32], k, v], "q has head_dim 32 and k 64"),
    "no head_dim": (
        lambda q, k, v: [q[..., :0], k[..., :0], v[..., :0]],
        "q has head_dim 0 and k 0",
    ),
    "heads": (lambda q, k, v: [q[:, :, :1], k, v], "q has 1 heads and k 2; the first must be a"),
    "no heads": (lambda q, k, v: [q, k[:, :, :0], v[:, :, :0]], "q has 2 heads and k 0"),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_dense_tensors_that_do_not_fit_are_an_error(
    change: Callable[..., list[Tensor]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attn_func(*change(*dense()))


def test_a_window_that_is_no_pair_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"a pair of integers \(left, right\), but is \(3,\)"):
        flash_attn_func(*dense(), window_size=(3,))


OFFSETS = torch.tensor([0, 4], dtype=torch.int32)
PACKED_MISFITS = {
    "int64": ((OFFSETS.long(), OFFSETS, 4, 4), "cu_seqlens_q must be .* dtype torch.int64; use"),
    "rank": ((OFFSETS, OFFSETS[None], 4, 4), r"cu_seqlens_k must be .* has shape \[1, 2\]"),
    "device": ((OFFSETS, OFFSETS.to("meta"), 4, 4), "cu_seqlens_k is on meta and q on cpu"),
    "count": ((OFFSETS, OFFSETS[[0, 0, 1]], 4, 4), "q has 2 entries and cu_seqlens_k 3"),
    "no sequence": ((OFFSETS[:1], OFFSETS[:1], 4, 4), "cu_seqlens_q has 1 entries"),
    "no length": ((OFFSETS, OFFSETS, 4, 0), "max_seqlen_k is 0, but there are 4 rows"),
}


@pytest.mark.parametrize(("rest", "message"), PACKED_MISFITS.values(), ids=PACKED_MISFITS)
def test_packed_arguments_that_do_not_fit_are_an_error(rest: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(*(x[0] for x in dense()), *rest)


def test_packed_tensors_have_three_dimensions() -> None:
    with pytest.raises(ValueError, match=r"q must be \[T, H, D\], but has shape \[1, 4, 2, 64\]"):
        flash_attn_varlen_func(*dense(), OFFSETS, OFFSETS, 4, 4)
