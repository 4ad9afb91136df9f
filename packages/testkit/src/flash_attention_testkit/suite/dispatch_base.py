"""What the dispatch tests share: an op as a parameter, a way to call it, a small problem for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from flash_attention_testkit.cases import SdpaCase
from flash_attention_testkit.inputs import SdpaInputs, make_inputs
from flash_attention_testkit.reference import AttentionOptions
from flash_attention_testkit.suite._base import ProviderTestsBase
from flash_attention_testkit.suite._subject import Subject, usual_form
from flash_attention_testkit.suite.dispatch_ops import OPS, CallOp, Op, calling

if TYPE_CHECKING:
    from typing_extensions import Unpack  # torch depends on it; typing has it from Python 3.11 on

every_op = pytest.mark.parametrize("op", OPS, ids=str, indirect=True)
"""For tests of forwards."""

every_differentiable_op = pytest.mark.parametrize(
    "op", [op for op in OPS if op.backward is not None], ids=str, indirect=True
)
"""For tests of backwards."""

every_general_op = pytest.mark.parametrize(
    "op", [op for op in OPS if op.general], ids=str, indirect=True
)
"""For tests of windows."""

LENGTHS = {
    "fewer rows": ((5, 7), (0, 2), (7, 7)),
    "more rows": ((7, 5), (2, 1), (7, 7)),
    "equal": ((7, 7), (1, 1), (5, 5)),
}
"""Rows and keys of packed sequences, of which the first is also the dense problem."""


class OpTests(ProviderTestsBase):
    """The fixtures ``op`` and ``call_op``."""

    @pytest.fixture
    def op(self, request: pytest.FixtureRequest, subject: Subject) -> Op:
        """One of the ops; skipped where this torch, this device or the declarations rule it out."""
        op: Op = request.param
        if not hasattr(torch.ops.aten, op.forward):
            pytest.skip(f"torch {torch.__version__} has no aten::{op.forward}")
        if op.device_type == "cpu" and subject.device.type != "cpu":
            pytest.skip(f"{subject.name} is tested on {subject.device}")
        if op.packed:
            skip_unless_declared(subject, "varlen")
        return op

    @pytest.fixture
    def call_op(self, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Iterator[CallOp]:
        """Calls an op on the subject's device and insists that the subject serves it."""
        with calling(subject, monkeypatch) as call:
            yield call


def skip_unless_declared(subject: Subject, *features: str) -> None:
    """Leave out a test of what the subject does not declare; that it declines is tested too."""
    missing = sorted(set(features) - subject.capabilities.features)
    if missing:
        pytest.skip(f"{subject.name} does not declare {', '.join(missing)}")


def problem(
    subject: Subject,
    op: Op | None = None,
    *,
    lengths: str = "fewer rows",
    batch: int = 1,
    options: AttentionOptions | None = None,
    **changes: Any,
) -> SdpaInputs:
    """A small problem in the form of the op, without a mask, on the subject's device.

    Args:
        subject: For what it declares.
        op: Packed or not; without one the problem is a dense batch.
        lengths: A key of ``LENGTHS``.
        batch: Of a dense problem.
        options: What the attention options are to be, beside the offsets of packed sequences.
        **changes: Of the case.
    """
    pairs: tuple[tuple[int, int], ...] = LENGTHS[lengths]
    packed = op is not None and op.packed
    rows, keys = (max(side) for side in zip(*pairs, strict=True)) if packed else pairs[0]
    if changes.get("layout") == "packed QKV slice":
        rows, pairs = keys, tuple((keys, keys) for _, keys in pairs)
    # Expanded keys are one head for several; all else shows with few heads too.
    heads = 4 if changes.get("layout") == "expanded" else 2
    grouped = "gqa" in subject.capabilities.features
    head_dim, dtype = usual_form(subject)
    measures: dict[str, Any] = {
        "batch": len(pairs) if packed else batch,
        "heads": heads,
        "kv_heads": heads // 2 if grouped else heads,
        "seq_q": rows,
        "seq_k": keys,
        "head_dim": head_dim,
        "dtype": dtype,
        "lengths": pairs if packed else None,
    }
    inputs = make_inputs(SdpaCase(**(measures | changes)), subject.seed, subject.device)
    return with_options(inputs, **(options or {}))


def with_options(inputs: SdpaInputs, **options: Unpack[AttentionOptions]) -> SdpaInputs:
    """The same tensors with other options."""
    return replace(inputs, options={**inputs.options, **options})


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Insist that two results of one kernel set agree as two orders of summation do.

    Wide enough for bf16: here it counts whether both are the same attention, not how good it is.
    """
    __tracebackhide__ = True
    one, other = actual.double(), expected.double()
    assert one.shape == other.shape, f"{what}: its shape is {list(one.shape)}"
    differs = ~torch.isclose(one, other, atol=3e-2, rtol=3e-2)
    if differs.any():
        raise AssertionError(
            f"{what}: {int(differs.sum())} of {differs.numel()} elements differ, such as "
            f"{one[differs][0]:.6g} and {other[differs][0]:.6g}"
        )
