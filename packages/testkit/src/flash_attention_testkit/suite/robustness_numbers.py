"""Numbers that are special: scales, NaN and Inf where nobody looks, scores that are large."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from flash_attention_testkit.inputs import SdpaInputs
from flash_attention_testkit.suite._base import ProviderTestsBase
from flash_attention_testkit.suite._findings import assert_same
from flash_attention_testkit.suite._subject import Subject
from flash_attention_testkit.suite.robustness_base import needs_backward, parts, problem, run

POISON = 60
"""The key that is not finite, or else special."""

SQUARE = {"batch": 1, "heads": 1, "kv_heads": 1, "seq_q": 97, "seq_k": 97}

LENGTHS = ((30, 35), (40, 33), (20, 70))
"""Packed sequences, of which the middle one is not finite."""

every_poison = pytest.mark.parametrize("poison", [float("nan"), float("inf")])
key_or_value = pytest.mark.parametrize("where", ["key", "value"])


class NumberTests(ProviderTestsBase):
    """Any scale is a factor of the scores; what is not finite reaches who sees it, and no other."""

    def test_a_scale_of_zero_averages_what_is_seen(self, subject: Subject) -> None:
        """Out is the mean of all values, whatever query and key are."""
        inputs = _scaled(problem(subject), 0.0)
        out = run(subject, inputs)["out"]
        group = inputs.query.shape[2] // inputs.key.shape[2]
        mean = inputs.value.double().mean(1, keepdim=True).repeat_interleave(group, 2)
        distance = float((out.double() - mean).abs().max())
        limit = torch.finfo(out.dtype).eps * float(inputs.value.abs().max())
        assert distance <= limit, f"out is off from the mean by {distance:.2e} (limit {limit:.2e})"

    def test_a_scale_of_zero_gives_query_and_key_no_gradients(self, subject: Subject) -> None:
        """No score depends on them."""
        needs_backward(subject)
        found = run(subject, _scaled(problem(subject), 0.0))
        for name in ("dq", "dk"):
            assert not found[name].any(), f"{name} is not 0"

    @pytest.mark.parametrize("factor", [2.0, 0.25])
    def test_a_scale_is_a_factor_of_the_query(self, subject: Subject, factor: float) -> None:
        """Twice the scale is twice the query, and nothing follows from head_dim."""
        _assert_scale_is_factor(subject, factor)

    def test_a_negative_scale_is_a_negative_query(self, subject: Subject) -> None:
        """The key that fits least has the largest weight."""
        _assert_scale_is_factor(subject, -1.0)

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_large_scores_stay_finite(self, subject: Subject, sign: float) -> None:
        """Scores of several thousands, whose exponentials no format holds; the scale has a sign."""
        inputs = problem(subject)
        inputs = _scaled(inputs, sign * inputs.query.shape[-1] ** -0.5)
        inputs.query.mul_(100.0)
        inputs.key.mul_(30.0)
        for name, tensor in run(subject, inputs).items():
            assert tensor.isfinite().all(), f"{name} is not finite"

    def test_keys_far_below_the_best_have_no_weight(self, subject: Subject) -> None:
        """Scores that are hundreds lower, whose exponentials are 0, count as ones 40 lower do."""
        plain, far = (_with_one_key_ahead(problem(subject), step) for step in (0.0, 8.0))
        whole = {name: slice(None) for name in ("out", "lse", "dv")}
        assert_same(parts(run(subject, far), **whole), parts(run(subject, plain), **whole), plain)

    @every_poison
    @key_or_value
    def test_keys_after_the_diagonal_may_be_anything(
        self, subject: Subject, where: str, poison: float
    ) -> None:
        """Rows before them are as they are without it; of gradients only dq is theirs alone."""
        clean = problem(subject, **SQUARE, causal=True)
        found = run(subject, _poisoned(clean, where, poison))
        before = {"out": slice(POISON), "lse": slice(POISON), "dq": slice(POISON)}
        assert_same(parts(found, **before), parts(run(subject, clean), **before), clean)

    @every_poison
    @key_or_value
    def test_keys_outside_of_the_window_may_be_anything(
        self, subject: Subject, where: str, poison: float
    ) -> None:
        """Rows that see no such key are as they are without it."""
        clean = problem(subject, **SQUARE, window_left=10, window_right=4)
        found = run(subject, _poisoned(clean, where, poison))
        expected = run(subject, clean)
        for rows in (slice(POISON - 4), slice(POISON + 11, None)):
            seen = {"out": rows, "lse": rows, "dq": rows}
            assert_same(parts(found, **seen), parts(expected, **seen), clean)
        # Keys that have no row in common with it
        for keys in (slice(POISON - 14), slice(POISON + 15, None)):
            seen = {"dk": keys, "dv": keys}
            assert_same(parts(found, **seen), parts(expected, **seen), clean)

    @every_poison
    def test_packed_neighbours_may_be_anything(self, subject: Subject, poison: float) -> None:
        """Query, key, value and gradient of one sequence reach no other."""
        clean = problem(subject, lengths=LENGTHS)
        starts = [[0, *accumulate(side)] for side in zip(*LENGTHS, strict=True)]
        rows, keys = (slice(edges[1], edges[2]) for edges in starts)

        def spoil(tensor: Tensor, part: slice) -> Tensor:
            spoilt = tensor.clone()
            spoilt[part] = poison
            return spoilt

        dirty = SdpaInputs(
            spoil(clean.query, rows),
            spoil(clean.key, keys),
            spoil(clean.value, keys),
            spoil(clean.grad_out, rows),
            clean.options,
        )
        found, expected = run(subject, dirty), run(subject, clean)
        for side in (0, 1):
            own = slice(rows.start) if side == 0 else slice(rows.stop, None)
            its = slice(keys.start) if side == 0 else slice(keys.stop, None)
            seen = {"out": own, "lse": own, "dq": own, "dk": its, "dv": its}
            assert_same(parts(found, **seen), parts(expected, **seen), clean)

    @key_or_value
    def test_nan_reaches_the_rows_that_see_it(self, subject: Subject, where: str) -> None:
        """A result that hides a NaN hides that training has failed."""
        inputs = _poisoned(problem(subject, **SQUARE), where, float("nan"))
        assert not run(subject, inputs)["out"].isfinite().any()


def _scaled(inputs: SdpaInputs, scale: float) -> SdpaInputs:
    return replace(inputs, options={**inputs.options, "scale": scale})


def _assert_scale_is_factor(subject: Subject, factor: float) -> None:
    """The factor is a power of two, or -1: its product with a query is exact."""
    __tracebackhide__ = True
    inputs = problem(subject)
    scaled = _scaled(inputs, factor * inputs.query.shape[-1] ** -0.5)
    expected = run(subject, replace(inputs, query=inputs.query * factor))
    if "dq" in expected:
        expected["dq"] = expected["dq"] * factor
    assert_same(run(subject, scaled), expected, scaled)


def _with_one_key_ahead(inputs: SdpaInputs, step: float) -> SdpaInputs:
    """Key ``POISON`` scores 8, the others -32 and lower, each by a step more than the last."""
    query, key = torch.zeros_like(inputs.query), torch.zeros_like(inputs.key)
    scores = -32.0 - step * torch.arange(key.shape[1], device=key.device)
    scores[POISON] = 8.0
    query[..., 0] = 1.0
    key[..., 0] = scores[:, None]
    return _scaled(replace(inputs, query=query, key=key), 1.0)


def _poisoned(inputs: SdpaInputs, where: str, poison: float) -> SdpaInputs:
    """The same problem in which one key or value is not finite."""
    tensor: Tensor = getattr(inputs, where).clone()
    tensor[:, POISON] = poison
    return replace(inputs, key=tensor) if where == "key" else replace(inputs, value=tensor)
