"""Inf and NaN in a key or value reach the rows that see it, and no other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flash_attention_testkit import assert_sdpa_parity

MASKS = {
    "causal": {"causal": True, "window": (None, None)},
    "window": {"causal": False, "window": (10, 4)},
    "causal window": {"causal": True, "window": (20, None)},
}


def check(inputs: Any, result: Any, mask: dict[str, Any]) -> None:
    __tracebackhide__ = True
    offsets = inputs.offsets()
    assert_sdpa_parity(
        mask,
        result,
        inputs.query,
        inputs.key,
        inputs.value,
        grad_out=inputs.grad_out,
        causal=mask["causal"],
        window_left=mask["window"][0],
        window_right=mask["window"][1],
        cu_seqlens_query=offsets[0],
        cu_seqlens_key=offsets[1],
    )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("what", [math.nan, math.inf, -math.inf])
def test_a_key_that_is_not_finite_reaches_who_sees_it(
    inputs: Callable[..., Any], run: Callable[..., Any], what: float, where: str, mask: Any
) -> None:
    given = inputs(lengths=(100, 100), heads=(2, 1), dtype="fp16")
    getattr(given, where)[:, 60] = what
    result = run(given, **mask)
    assert result.out[:, :50].isfinite().all()
    check(given, result, mask)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_one_infinite_element_of_a_value_spoils_its_column_only(
    inputs: Callable[..., Any], run: Callable[..., Any], head_dim: int
) -> None:
    given = inputs(lengths=(70, 90), heads=(2, 1), head_dim=head_dim)
    given.value[:, 80, :, -1] = math.inf
    result = run(given, causal=True)
    assert (result.out[:, 60:, :, -1] == math.inf).all()
    assert result.out[..., :-1].isfinite().all()
    assert result.out[:, :60].isfinite().all()
    check(given, result, MASKS["causal"])


@pytest.mark.parametrize(
    ("rows_kv", "mask"), [(25, MASKS["causal"]), (24, {"causal": False, "window": (2, 1)})]
)
def test_rows_without_keys_stay_zero_beside_an_infinite_value(
    inputs: Callable[..., Any], run: Callable[..., Any], rows_kv: int, mask: Any
) -> None:
    given = inputs(lengths=(40, rows_kv), heads=(2, 1))
    given.value[:, 20] = math.inf
    result = run(given, **mask)
    assert (result.out[:, :10] == 0).all()
    assert (result.lse[..., :10] == -math.inf).all()
    check(given, result, mask)


def test_a_packed_neighbour_that_is_not_finite_is_not_seen(
    inputs: Callable[..., Any], run: Callable[..., Any]
) -> None:
    given = inputs(lengths=([30, 40, 20], [35, 33, 70]), heads=(2, 1))
    clean = run(given)
    for tensor in (given.query, given.grad_out):
        tensor[30:70] = math.nan
    for tensor in (given.key, given.value):
        tensor[35:68] = math.inf
    dirty = run(given)
    for name, rows in (("out", 30), ("dq", 30), ("dk", 35), ("dv", 35)):
        for part in (slice(None, rows), slice(-20, None)):
            assert torch.equal(getattr(clean, name)[part], getattr(dirty, name)[part]), name


def test_what_lies_behind_the_last_row_is_not_read(
    inputs: Callable[..., Any], run: Callable[..., Any]
) -> None:
    """Tiles reach over the end of every tensor here, and into NaN."""
    given = inputs(lengths=(70, 70), heads=(2, 2), head_dim=72, layout="padded rows", batch=2)
    views = [given.query, given.key, given.value, given.grad_out]
    longer = [torch.full((2, 140, 2, 72), math.nan).to(view) for view in views]
    for long, view in zip(longer, views, strict=True):
        long[:, :70] = view
    shorter = type(given)(*(long[:, :70] for long in longer))
    first, second = run(given), run(shorter)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_query_that_is_nan_leaves_the_values_after_it_alone(
    inputs: Callable[..., Any], run: Callable[..., Any], head_dim: int
) -> None:
    """Keys that the row does not see are in a block with keys that it sees, and its lse is NaN."""
    given = inputs(lengths=(100, 100), heads=(2, 1), head_dim=head_dim)
    given.grad_out[:, 50] = 0
    clean = run(given, causal=True)
    given.query[:, 50] = math.nan
    dirty = run(given, causal=True)
    assert dirty.lse[..., 50].isnan().all()
    torch.testing.assert_close(dirty.dv[:, 51:], clean.dv[:, 51:], rtol=0.02, atol=0.02)
