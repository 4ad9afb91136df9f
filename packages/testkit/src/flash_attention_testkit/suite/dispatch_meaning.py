"""What the arguments of the ops mean: defaults, scale, masks, rows without keys.

Most of it is seen in what two calls have in common, or in which values reach the output. So a
kernel set that computes something wrong, but takes every argument for what it means, passes here
and fails the tests of parity.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention_testkit.inputs import SdpaInputs
from flash_attention_testkit.reference import AttentionOptions
from flash_attention_testkit.suite._subject import Subject, call_of
from flash_attention_testkit.suite.dispatch_base import (
    LENGTHS,
    OpTests,
    close,
    every_differentiable_op,
    every_general_op,
    every_op,
    problem,
    skip_unless_declared,
    with_options,
)
from flash_attention_testkit.suite.dispatch_ops import (
    Arguments,
    CallOp,
    Op,
    backward_arguments,
    forward_arguments,
    out_and_lse,
    without_defaults,
)

every_length = pytest.mark.parametrize("lengths", list(LENGTHS), ids=lambda x: x.replace(" ", "-"))

WINDOWS = {"both": (2, 1), "left": (2, -1), "right": (-1, 1), "diagonal": (0, 0), "causal": (-1, 0)}
"""Keys before and after the diagonal that are seen; -1 for all."""

NO_WINDOWS = {"minus-one": (-1, -1), "one-sided": (-1, None), "wide": (1 << 20, 1 << 20)}
"""Other ways than None to say that nothing is hidden."""


class MeaningTests(OpTests):
    """Each argument means what torch's op says."""

    @every_op
    def test_missing_arguments_mean_their_defaults(
        self, subject: Subject, op: Op, call_op: CallOp
    ) -> None:
        """No mask, no dropout, a scale of ``head_dim ** -0.5``."""
        arguments = forward_arguments(op, _with_spelt_out_scale(problem(subject, op)))
        expected = _forward(op, arguments, call_op)
        short = without_defaults(op.forward, forward_arguments(op, problem(subject, op)))
        _assert_same(_forward(op, short, call_op), expected)

    @every_differentiable_op
    def test_missing_arguments_mean_their_defaults_in_the_backward(
        self, subject: Subject, op: Op, call_op: CallOp
    ) -> None:
        """Likewise for gradients."""
        skip_unless_declared(subject, "backward")
        assert op.backward is not None
        spelt_out = _with_spelt_out_scale(problem(subject, op))
        expected = call_op(op.backward, backward_arguments(op, spelt_out, call_op))
        arguments = backward_arguments(op, problem(subject, op), call_op)
        short = without_defaults(op.backward, arguments)
        _assert_same(call_op(op.backward, short), expected)

    @every_op
    @pytest.mark.parametrize("factor", [0.0, -1.0, 2.0])
    def test_scale_is_the_callers(
        self, subject: Subject, op: Op, call_op: CallOp, factor: float
    ) -> None:
        """A factor on the scale is a factor on the query: zero and negative ones too."""
        on_scale, on_query = _with_factor(subject, op, factor)
        actual = _forward(op, forward_arguments(op, on_scale), call_op)
        _assert_same(actual, _forward(op, forward_arguments(op, on_query), call_op))

    @every_differentiable_op
    @pytest.mark.parametrize("factor", [0.0, -1.0, 2.0])
    def test_scale_of_the_backward_is_the_callers(
        self, subject: Subject, op: Op, call_op: CallOp, factor: float
    ) -> None:
        """The same for gradients, of which that of the query has the factor once more."""
        skip_unless_declared(subject, "backward")
        assert op.backward is not None
        on_scale, on_query = _with_factor(subject, op, factor)
        results = call_op(op.backward, backward_arguments(op, on_scale, call_op))
        actual = [grad.clone() for grad in results]
        dq, dk, dv = call_op(op.backward, backward_arguments(op, on_query, call_op))
        _assert_same(actual, (factor * dq, dk, dv))

    @every_general_op
    @pytest.mark.parametrize("said", list(NO_WINDOWS))
    def test_no_window_may_be_said_otherwise(
        self, subject: Subject, op: Op, call_op: CallOp, said: str
    ) -> None:
        """None, a negative bound and a bound beyond every key are one."""
        left, right = NO_WINDOWS[said]
        bounded = with_options(problem(subject, op), window_left=left, window_right=right)
        actual = _forward(op, forward_arguments(op, bounded), call_op)
        _assert_same(actual, _forward(op, forward_arguments(op, problem(subject, op)), call_op))

    @every_op
    @every_length
    def test_causal_is_aligned_to_the_last_row_and_key(
        self, subject: Subject, op: Op, call_op: CallOp, lengths: str
    ) -> None:
        """The last row sees every key, each row before it one less."""
        skip_unless_declared(subject, "causal")
        if not op.aligned_at_end:
            pytest.skip("the op aligns causal masks otherwise, so unequal lengths are declined")
        _assert_sees(subject, op, call_op, lengths, {"causal": True}, (None, 0))

    @every_op
    def test_causal_hides_the_keys_after_the_diagonal(
        self, subject: Subject, op: Op, call_op: CallOp
    ) -> None:
        """With as many rows as keys, every op means the same."""
        skip_unless_declared(subject, "causal")
        _assert_sees(subject, op, call_op, "equal", {"causal": True}, (None, 0))

    @every_op
    @every_length
    def test_without_a_mask_every_key_is_seen(
        self, subject: Subject, op: Op, call_op: CallOp, lengths: str
    ) -> None:
        """And by every row."""
        _assert_sees(subject, op, call_op, lengths, {}, (None, None))

    @every_general_op
    @every_length
    @pytest.mark.parametrize("window", list(WINDOWS))
    def test_windows_count_from_the_diagonal(
        self, subject: Subject, op: Op, call_op: CallOp, lengths: str, window: str
    ) -> None:
        """Bounds include the key they name; a right bound of 0 is a causal mask."""
        left, right = WINDOWS[window]
        skip_unless_declared(subject, *(("causal",) if right == 0 else ()))
        skip_unless_declared(subject, *(("window",) if (left, right) != (-1, 0) else ()))
        options: AttentionOptions = {"window_left": left, "window_right": right}
        bounds = tuple(None if bound < 0 else bound for bound in (left, right))
        _assert_sees(subject, op, call_op, lengths, options, bounds)

    @every_op
    def test_rows_without_keys_read_as_torchs(
        self, subject: Subject, op: Op, call_op: CallOp
    ) -> None:
        """Their out is 0, their lse what torch's own kernel leaves there."""
        skip_unless_declared(subject, "causal")
        if not op.aligned_at_end:
            pytest.skip("in a call of this op that is served, every row sees a key")
        inputs = problem(subject, op, lengths="more rows", options={"causal": True})
        out, lse = _forward(op, forward_arguments(op, inputs), call_op)
        rows = slice(0, 2)  # of 7, with 5 keys
        found = out[rows] if op.packed else out[:, rows]
        assert not found.any(), f"their out is not 0, but such as {found.flatten()[0]:.3g}"
        found = lse[..., rows]
        expected = torch.full_like(found, op.lse_of_empty_rows)
        assert torch.equal(found, expected), f"their lse is such as {found.flatten()[0]:.3g}"

    @pytest.mark.parametrize("value", [-math.inf, 0.0, math.inf])
    def test_lse_of_rows_without_keys_is_the_calls(self, subject: Subject, value: float) -> None:
        """The ops differ, so ``call.lse_of_empty_rows`` says what is written."""
        skip_unless_declared(subject, "causal")
        inputs = problem(subject, lengths="more rows", options={"causal": True})
        call = call_of(inputs, out=torch.empty_like(inputs.query))
        with torch.no_grad():
            _, lse = subject.kernel_set.forward(call._replace(lse_of_empty_rows=value))
        assert (lse[..., :2] == value).all()

    @every_differentiable_op
    @pytest.mark.parametrize("lies", ["expanded", "columns-first", "heads-swapped"])
    def test_gradients_do_not_depend_on_how_grad_out_lies(
        self, subject: Subject, op: Op, call_op: CallOp, lies: str
    ) -> None:
        """``out.sum().backward()`` brings one number for all, transposed losses any strides."""
        skip_unless_declared(subject, "backward")
        assert op.backward is not None
        (grad_out, *others), keywords = backward_arguments(op, problem(subject, op), call_op)
        if lies == "expanded":
            strided = grad_out.new_full((), 0.5).expand(grad_out.shape)
        elif lies == "columns-first":
            strided = grad_out.mT.contiguous().mT
        else:
            strided = grad_out.transpose(-3, -2).clone(memory_format=torch.contiguous_format)
            strided = strided.transpose(-3, -2)
        plain = grad_out.copy_(strided)
        expected = call_op(op.backward, ((plain, *others), keywords))
        (_, *others), _ = backward_arguments(op, problem(subject, op), call_op)
        _assert_same(call_op(op.backward, ((strided, *others), keywords)), expected)


def _forward(op: Op, arguments: Arguments, call_op: CallOp) -> tuple[Tensor, Tensor]:
    return out_and_lse(op, arguments, call_op(op.forward, arguments))


def _with_spelt_out_scale(inputs: SdpaInputs) -> SdpaInputs:
    return with_options(inputs, scale=inputs.query.shape[-1] ** -0.5)


def _with_factor(subject: Subject, op: Op, factor: float) -> tuple[SdpaInputs, SdpaInputs]:
    """A problem with a factor on its scale, and the same with the factor on its query."""
    on_scale, on_query = problem(subject, op), problem(subject, op)
    scale = on_scale.query.shape[-1] ** -0.5
    on_query = replace(on_query, query=on_query.query * factor)
    return with_options(on_scale, scale=factor * scale), with_options(on_query, scale=scale)


def _assert_same(actual: Any, expected: Any) -> None:
    __tracebackhide__ = True
    for place, (one, other) in enumerate(zip(actual, expected, strict=True)):
        close(one, other, f"result {place} depends on how the same call is put")


def _assert_sees(
    subject: Subject,
    op: Op,
    call_op: CallOp,
    lengths: str,
    options: AttentionOptions,
    bounds: tuple[int | None, ...],
) -> None:
    """Read off the output which keys each row saw: queries are zero, values one-hot."""
    __tracebackhide__ = True
    inputs = problem(subject, op, lengths=lengths, options=options, family="one-hot-values")
    out, _ = _forward(op, forward_arguments(op, inputs), call_op)
    for rows, keys, queries in _sequences(op, inputs, out):
        seen = queries[..., :keys] > 0  # [..., rows, heads, keys]
        if (queries[..., keys:] > 0).any():
            raise AssertionError("out has what is the value of no key")
        expected = _visible(rows, keys, bounds).to(seen.device)
        wrong = (seen != expected[:, None, :]).nonzero().tolist()
        if wrong:
            *batch, row, head, key = wrong[0]
            sees = "sees" if seen[(*batch, row, head, key)] else "does not see"
            raise AssertionError(
                f"of {rows} rows and {keys} keys, row {row} of head {head} {sees} key {key}"
            )


def _sequences(op: Op, inputs: SdpaInputs, out: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Rows, keys and the part of out of each sequence; of a dense batch all in one."""
    edges = inputs.options.get("cu_seqlens_query"), inputs.options.get("cu_seqlens_key")
    if edges[0] is None or edges[1] is None:
        yield inputs.query.shape[1], inputs.key.shape[1], out
        return
    for first, last, keys in zip(
        edges[0][:-1].tolist(), edges[0][1:].tolist(), edges[1].diff().tolist(), strict=True
    ):
        yield last - first, keys, out[first:last]


def _visible(rows: int, keys: int, bounds: tuple[int | None, ...]) -> Tensor:
    """Bool ``[rows, keys]``, aligned to the last of both."""
    distance = torch.arange(keys) - torch.arange(rows)[:, None] - (keys - rows)
    left, right = bounds
    visible = torch.ones(rows, keys, dtype=torch.bool)
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    return visible
