"""A kernel set as an operator of its own: what direct calls of its kernels are built of."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402  # torch may be absent

from flash_attention_registry.sdpa import AttentionCall  # noqa: E402
from flash_attention_registry.sdpa.allocation import empty_like  # noqa: E402
from flash_attention_registry.sdpa.operators import (  # noqa: E402
    Operator,
    attend,
    attend_packed,
    make_operator,
)

OFFSETS = (torch.tensor([0, 5, 5, 12]).int(), torch.tensor([0, 7, 10, 10]).int())
NO_WINDOW = (-1, -1)


@pytest.fixture(scope="module")
def kernels(plain_kernels: Any) -> Any:
    """The plain kernel set, which remembers whether single calls asked for determinism."""

    class Direct(plain_kernels):
        asked: list[bool]

        def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
            out, lse = super().forward(call._replace(out=empty_like(call.query)))
            return out, lse

        def backward(
            self, *given: Any, deterministic: bool = False
        ) -> tuple[Tensor, Tensor, Tensor]:
            self.asked.append(deterministic)
            dq, dk, dv = super().backward(*given)
            return dq, dk, dv

    made = Direct("direct", deterministic="on_request")
    made.asked = []
    return made


@pytest.fixture(scope="module")
def operator(kernels: Any) -> Operator:
    return make_operator("test_operators", kernels)


def rows(*shape: int, seed: int = 0, dtype: Any = torch.bfloat16) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return made.requires_grad_()


def plainly(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Out and lse of [S, H, D] in float32, from nothing but what autograd differentiates."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None].nan_to_num(neginf=0.0))
    return torch.einsum("hqk,khd->qhd", weights, v), lse


def test_results_and_gradients_of_a_dense_batch(operator: Operator) -> None:
    q, k, v = rows(2, 9, 4, 16), rows(2, 11, 2, 16, seed=1), rows(2, 11, 2, 16, seed=2)
    out, lse, nothing = attend(operator, q, k, v, None, True, NO_WINDOW, False, True)
    assert nothing is None
    assert not lse.requires_grad
    visible = torch.ones(9, 11).tril(2).bool()
    parts = [plainly(q[i], k[i], v[i], visible) for i in range(2)]
    expected = torch.stack([part[0] for part in parts])
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, torch.stack([part[1] for part in parts]), rtol=1e-5, atol=1e-5)
    slope = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    found = torch.autograd.grad(out, (q, k, v), slope.to(out.dtype))
    for one, other in zip(found, torch.autograd.grad(expected, (q, k, v), slope), strict=True):
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)


def test_packed_sequences_are_attended_apart(operator: Operator) -> None:
    q, k, v = rows(12, 2, 16), rows(10, 2, 16, seed=1), rows(10, 2, 16, seed=2)
    options = (None, False, (2, 1), False, True)
    out, lse, _ = attend_packed(operator, q, k, v, OFFSETS, (7, 7), *options)
    diagonal = torch.arange(5)[:, None] + 2 - torch.arange(7)[None]
    visible = (diagonal <= 2) & (diagonal >= -1)
    expected, expected_lse = plainly(q[:5], k[:7], v[:7], visible)
    torch.testing.assert_close(out[:5].float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse[:, :5], expected_lse, rtol=1e-5, atol=1e-5)
    assert not out[5:].any()  # seven queries and no key
    assert (lse[:, 5:] == -math.inf).all()
    grad = torch.autograd.grad(out, k, torch.ones_like(out))[0]
    assert grad[:7].any()
    assert not grad[7:].any()  # three keys and no query


@pytest.mark.parametrize("asked", [False, True])
def test_a_call_may_ask_for_gradients_that_repeat(
    operator: Operator, kernels: Any, asked: bool
) -> None:
    q = rows(1, 8, 2, 16)
    kernels.asked.clear()
    attend(operator, q, q, q, None, False, NO_WINDOW, asked, False).sum().backward()
    assert kernels.asked == [asked]


@pytest.mark.parametrize(("declared", "served"), [("always", True), ("never", False)])
def test_kernels_that_cannot_be_asked_are_not(
    plain_kernels: Any, kernels: Any, declared: str, served: bool
) -> None:
    class FourArguments(type(kernels)):
        def backward(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
            return super().backward(*given)

    made = FourArguments(declared, deterministic=declared)
    made.asked = []
    operator, q = make_operator(f"test_operators_{declared}", made), rows(1, 8, 2, 16)
    attend(operator, q, q, q, None, False, NO_WINDOW, False, False).sum().backward()
    out = attend(operator, q, q, q, None, False, NO_WINDOW, True, False)
    if served:
        out.sum().backward()
    else:
        with pytest.raises(NotImplementedError, match="deterministic gradients"):
            out.sum().backward()


def test_a_namespace_is_taken_once(operator: Operator, kernels: Any, plain_kernels: Any) -> None:
    assert make_operator("test_operators", kernels) is operator
    with pytest.raises(ValueError, match=r"are there already, for .*\.Direct; give"):
        make_operator("test_operators", plain_kernels("another"))


def test_what_is_declined_raises_with_the_reason(operator: Operator) -> None:
    q = rows(1, 8, 2, 12)
    with pytest.raises(NotImplementedError, match="direct does not serve this call: head_dim 12"):
        attend(operator, q, q, q, None, False, NO_WINDOW, False, False)
    with pytest.raises(ValueError, match="q has batch size 1 and k 2"):
        attend(operator, q, rows(2, 8, 2, 12), rows(2, 8, 2, 12), None, False, (0, 0), False, False)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": None}, r"q must be a tensor \[T, H, D\], but is a NoneType"),
        ({"v": [1.0]}, "v must be a tensor .* but is a list"),
        ({"cu_seqlens": (OFFSETS[0], [0, 10])}, r"cu_seqlens_k must be a tensor \[B \+ 1\] int32"),
        ({"max_seqlens": (7, None)}, "max_seqlen_k must be an integer, .* but is a NoneType"),
        ({"max_seqlens": (7.0, 7)}, "max_seqlen_q must be an integer, .* but is a float"),
        ({"window_size": 5}, r"window_size must be a pair of integers .* but is 5; give -1"),
        ({"window_size": (1.5, 2)}, r"window_size must be a pair of integers"),
        ({"softmax_scale": "1"}, "softmax_scale must be a number or None, but is '1'"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(
    operator: Operator, change: dict[str, Any], text: str
) -> None:
    q = rows(12, 2, 16)
    arguments: dict[str, Any] = {
        **{"q": q, "k": rows(10, 2, 16), "v": rows(10, 2, 16), "cu_seqlens": OFFSETS},
        **{"max_seqlens": (7, 7), "softmax_scale": None, "causal": False},
        **{"window_size": NO_WINDOW, "deterministic": False, "return_attn_probs": False},
    }
    with pytest.raises(TypeError, match=text):
        attend_packed(operator, **arguments | change)


def test_a_backward_that_is_not_declared_raises_with_the_reason(
    plain_kernels: Callable[..., Any], kernels: Any
) -> None:
    forward_only = type(kernels)("forward only", features=frozenset({"causal"}))
    forward_only.asked = []
    operator = make_operator("test_operators_forward", forward_only)
    q = rows(1, 8, 2, 16)
    out = attend(operator, q, q, q, None, True, NO_WINDOW, False, False)
    with pytest.raises(NotImplementedError, match=r"forward only does not .*backward is not"):
        out.sum().backward()


@pytest.mark.parametrize(("queries", "keys"), [(0, 8), (8, 0), (0, 0)])
def test_empty_calls_never_come_to_the_kernels(
    operator: Operator, kernels: Any, queries: int, keys: int
) -> None:
    kernels.calls.clear()
    q, k = rows(2, queries, 2, 16), rows(2, keys, 2, 16)
    out, lse, _ = attend(operator, q, k, k, None, False, NO_WINDOW, False, True)
    assert not out.any()
    assert lse.shape == (2, 2, queries)
    assert (lse == -math.inf).all()
    for grad, tensor in zip(torch.autograd.grad(out.sum(), (q, k)), (q, k), strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any()
    assert not kernels.calls


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_it_says_its_own_shapes_and_derivative(operator: Operator, packed: bool) -> None:
    shape = (12, 2, 16) if packed else (1, 12, 2, 16)
    q = rows(*shape)
    k, v = (rows(*shape, seed=seed)[..., :10, :, :].detach().requires_grad_() for seed in (1, 2))
    sequences = (*OFFSETS, 7, 7) if packed else (None, None, 0, 0)
    arguments = (q, k, v, *sequences, 0.25, False, 3, 2, False)
    torch.library.opcheck(torch.ops.test_operators.attention.default, arguments)


def test_a_compiled_graph_has_it_whole(operator: Operator) -> None:
    q = rows(1, 16, 2, 16)
    call = partial(attend, operator, softmax_scale=None, causal=True, window_size=NO_WINDOW)
    run = partial(call, deterministic=False, return_attn_probs=False)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q=q, k=q, v=q), run(q=q, k=q, v=q))
