from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attention_testkit import _attention, reference_sdpa

TENSORS = ("out", "lse", "dq", "dk", "dv")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def torch_math(query, key, value, grad_out, **options):
    """Out and gradients by torch's own float64 math and autograd, [B, S, H, D]."""
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), **options)
    out.transpose(1, 2).backward(grad_out)
    return [out.transpose(1, 2).detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("scale", [None, 0.3, 0.0, -0.2])
@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_torch_in_float64(causal: bool, scale: float | None) -> None:
    query, key, value, grad_out = (normal(2, 19, 3, 8, seed=i) for i in range(4))

    result = reference_sdpa(query, key, value, grad_out=grad_out, causal=causal, scale=scale)

    expected = torch_math(query, key, value, grad_out, is_causal=causal, scale=scale)
    for actual, wanted in zip((result.out, result.dq, result.dk, result.dv), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13)


def test_grouped_heads_agree_with_torch() -> None:
    query, grad_out = normal(2, 11, 6, 8), normal(2, 11, 6, 8, seed=1)
    key, value = normal(2, 13, 2, 8), normal(2, 13, 2, 8, seed=1)

    result = reference_sdpa(query, key, value, grad_out=grad_out)

    expected = torch_math(query, key, value, grad_out, enable_gqa=True)
    for actual, wanted in zip((result.out, result.dq, result.dk, result.dv), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13)


def test_lse_is_the_natural_log_of_the_softmax_denominator() -> None:
    query, key, value = normal(1, 5, 2, 4), normal(1, 7, 2, 4), normal(1, 7, 2, 4)

    lse = reference_sdpa(query, key, value, scale=0.7).lse

    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.7
    assert lse is not None
    assert lse.shape == (1, 2, 5)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (9, 5), (1, 6), (6, 6)])
@pytest.mark.parametrize(
    ("options", "sees"),
    [
        ({"causal": True}, lambda gap: gap <= 0),
        ({"window_left": 2}, lambda gap: gap >= -2),
        ({"window_left": 2, "window_right": 1}, lambda gap: -2 <= gap <= 1),
        ({"causal": True, "window_left": 1, "window_right": 3}, lambda gap: -1 <= gap <= 0),
        ({"window_left": -1, "window_right": -1}, lambda gap: True),
    ],
    ids=["causal", "left 2", "left 2, right 1", "causal, left 1, right 3", "no limits"],
)
def test_masks_are_aligned_to_the_bottom_right(queries: int, keys: int, options, sees) -> None:
    # Equal scores and one-hot values: each output row reads off which keys it saw.
    query, key = torch.zeros(1, queries, 1, 4), torch.zeros(1, keys, 1, 4)
    value = torch.eye(keys)[None, :, None]

    result = reference_sdpa(query, key, value, **options)

    for i in range(queries):
        seen = [j for j in range(keys) if sees(j - (i + keys - queries))]
        expected = torch.zeros(keys, dtype=torch.float64)
        expected[seen] = 1 / max(len(seen), 1)
        torch.testing.assert_close(result.out[0, i, 0], expected)
        assert result.lse[0, 0, i] == pytest.approx(math.log(len(seen)) if seen else -math.inf)


def test_rows_without_visible_keys_have_no_gradients() -> None:
    query, key, value = normal(1, 6, 2, 4), normal(1, 2, 2, 4), normal(1, 2, 2, 4)
    grad_out = normal(1, 6, 2, 4)

    result = reference_sdpa(query, key, value, grad_out=grad_out, causal=True)
    only_seen = reference_sdpa(
        query[:, 4:], key, value, grad_out=grad_out[:, 4:], causal=True
    )  # rows 0 to 3 stand before the first key

    assert not result.out[:, :4].any()
    assert not result.dq[:, :4].any()
    assert result.lse[..., :4].isneginf().all()
    torch.testing.assert_close(result.dk, only_seen.dk)
    torch.testing.assert_close(result.dv, only_seen.dv)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("poisoned", ["key", "value"])
def test_non_finite_keys_reach_only_the_rows_that_see_them(poisoned: str, poison: float) -> None:
    inputs = {"query": normal(1, 6, 4, 8), "key": normal(1, 6, 2, 8), "value": normal(1, 6, 2, 8)}
    grad_out = normal(1, 6, 4, 8)
    clean = reference_sdpa(**inputs, grad_out=grad_out, causal=True)
    inputs[poisoned][:, 4] = poison

    result = reference_sdpa(**inputs, grad_out=grad_out, causal=True)

    assert torch.equal(result.out[:, :4], clean.out[:, :4])
    assert torch.equal(result.dq[:, :4], clean.dq[:, :4])
    assert torch.equal(result.lse[..., :4], clean.lse[..., :4])
    reached = {"key": result.lse.transpose(1, 2), "value": result.out}[poisoned]
    assert not reached[:, 4:].isfinite().flatten(2).all(-1).any()


def test_non_finite_queries_and_gradients_reach_only_the_keys_they_see() -> None:
    query, key, value, grad_out = (normal(1, 6, 2, 8, seed=i) for i in range(4))
    clean = reference_sdpa(query, key, value, grad_out=grad_out, window_left=1, window_right=0)
    query[:, 5], grad_out[:, 5] = float("nan"), float("inf")

    result = reference_sdpa(query, key, value, grad_out=grad_out, window_left=1, window_right=0)

    for name in ("dk", "dv"):
        actual, expected = getattr(result, name), getattr(clean, name)
        assert torch.equal(actual[:, :4], expected[:, :4])
        assert actual[:, 4:].isnan().all()


def test_packed_sequences_equal_separate_calls() -> None:
    lengths = [(3, 5), (0, 4), (7, 2), (2, 0), (4, 4)]
    query_edges, key_edges = [0], [0]
    for queries, keys in lengths:
        query_edges.append(query_edges[-1] + queries)
        key_edges.append(key_edges[-1] + keys)
    query, grad_out = normal(16, 4, 8), normal(16, 4, 8, seed=1)
    key, value = normal(15, 2, 8), normal(15, 2, 8, seed=1)
    options = {"causal": True, "window_left": 3}

    packed = reference_sdpa(
        query,
        key,
        value,
        grad_out=grad_out,
        cu_seqlens_query=torch.tensor(query_edges, dtype=torch.int32),
        cu_seqlens_key=torch.tensor(key_edges, dtype=torch.int32),
        **options,
    )

    assert packed.lse.shape == (4, 16)
    for i in range(len(lengths)):
        rows = slice(query_edges[i], query_edges[i + 1])
        columns = slice(key_edges[i], key_edges[i + 1])
        alone = reference_sdpa(
            query[None, rows],
            key[None, columns],
            value[None, columns],
            grad_out=grad_out[None, rows],
            **options,
        )
        assert torch.equal(packed.out[rows], alone.out[0])
        assert torch.equal(packed.lse[:, rows], alone.lse[0])
        assert torch.equal(packed.dq[rows], alone.dq[0])
        assert torch.equal(packed.dk[columns], alone.dk[0])
        assert torch.equal(packed.dv[columns], alone.dv[0])


def test_gradients_match_finite_differences() -> None:
    tensors = {
        "query": normal(5, 4, 3),
        "key": normal(6, 2, 3),
        "value": normal(6, 2, 2),
    }
    grad_out = normal(5, 4, 2)
    options = {
        "window_left": 2,
        "window_right": 1,
        "cu_seqlens_query": torch.tensor([0, 3, 5]),
        "cu_seqlens_key": torch.tensor([0, 2, 6]),
    }
    result = reference_sdpa(**tensors, grad_out=grad_out, **options)

    step = 1e-6
    for name, gradient in (("query", result.dq), ("key", result.dk), ("value", result.dv)):
        numeric = torch.zeros_like(gradient)
        for place in range(numeric.numel()):
            ends = []
            for sign in (step, -step):
                moved = dict(tensors)
                moved[name] = tensors[name].clone()
                moved[name].view(-1)[place] += sign
                ends.append((reference_sdpa(**moved, **options).out * grad_out).sum())
            numeric.view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("budget", [1, 40, 300])
def test_chunking_does_not_change_the_result(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, grad_out = normal(2, 9, 6, 4), normal(2, 9, 6, 4, seed=1)
    key, value = normal(2, 10, 3, 4), normal(2, 10, 3, 4, seed=1)
    whole = reference_sdpa(query, key, value, grad_out=grad_out, causal=True, window_left=4)

    monkeypatch.setattr(_attention, "CHUNK_ELEMENTS", budget)
    chunked = reference_sdpa(query, key, value, grad_out=grad_out, causal=True, window_left=4)

    for name in TENSORS:
        torch.testing.assert_close(
            getattr(chunked, name), getattr(whole, name), rtol=1e-13, atol=1e-14
        )


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no batch", "no rows"])
def test_empty_inputs_give_empty_results(shape: tuple[int, int]) -> None:
    batch, length = shape
    x = torch.empty(batch, length, 2, 4, dtype=torch.float64)

    result = reference_sdpa(x, x, x, grad_out=x)

    assert result.out.shape == result.dq.shape == result.dk.shape == result.dv.shape == x.shape
    assert result.lse.shape == (batch, 2, length)


def test_without_grad_out_there_are_no_gradients() -> None:
    x = normal(1, 3, 2, 4)

    result = reference_sdpa(x, x, x)

    assert (result.dq, result.dk, result.dv) == (None, None, None)


def test_inputs_are_left_alone() -> None:
    inputs = [normal(1, 5, 2, 4, seed=i).requires_grad_() for i in range(4)]
    before = [x.detach().clone() for x in inputs]

    result = reference_sdpa(*inputs[:3], grad_out=inputs[3], causal=True)

    assert not result.out.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(5, 4, 8)}, r"query must be \[B, S, H, D\], but has shape \[5, 4"),
        ({"key": torch.zeros(1, 6, 3, 8)}, "query has 4 heads and key 3"),
        ({"key": torch.zeros(1, 6, 2, 7)}, r"key has shape \[1, 6, 2, 7\], but beside"),
        ({"value": torch.zeros(1, 5, 2, 8)}, r"must be \[1, 6, 2, 8\]"),
        ({"grad_out": torch.zeros(1, 5, 2, 8)}, r"grad_out has shape .* must be \[1, 5, 4, 8\]"),
        ({"key": torch.zeros(1, 6, 2, 8, device="meta")}, "key is on meta and query on cpu"),
        ({"window_left": -2}, "window_left is -2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_misfitting_inputs_are_explained(change, message: str) -> None:
    inputs = {
        "query": torch.zeros(1, 5, 4, 8),
        "key": torch.zeros(1, 6, 2, 8),
        "value": torch.zeros(1, 6, 2, 8),
    }
    with pytest.raises(ValueError, match=message):
        reference_sdpa(**{**inputs, **change})


@pytest.mark.parametrize(
    ("query_edges", "key_edges", "message"),
    [
        ([0, 5], None, "cu_seqlens_key is missing"),
        ([0, 2, 5], [0, 6], "describes 2 sequences and cu_seqlens_key 1"),
        ([0, 4], [0, 6], r"must rise from 0 to the number of packed rows, 5, but is \[0, 4\]"),
        ([0, 4, 3, 5], [0, 1, 2, 6], "cu_seqlens_query must rise"),
    ],
)
def test_misfitting_offsets_are_explained(query_edges, key_edges, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference_sdpa(
            torch.zeros(5, 4, 8),
            torch.zeros(6, 2, 8),
            torch.zeros(6, 2, 8),
            cu_seqlens_query=torch.tensor(query_edges),
            cu_seqlens_key=None if key_edges is None else torch.tensor(key_edges),
        )
