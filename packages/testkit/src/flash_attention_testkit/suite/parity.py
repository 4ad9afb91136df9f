"""Right results: out, lse and each gradient, for everything that is declared."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flash_attention_testkit.cases import SdpaCase
from flash_attention_testkit.inputs import SdpaInputs
from flash_attention_testkit.parity import ParityReport
from flash_attention_testkit.suite._base import grid_name
from flash_attention_testkit.suite._determinism import asking_for_determinism
from flash_attention_testkit.suite._findings import (
    Findings,
    inputs_of,
    named,
    references_of_case,
    rule_of,
)
from flash_attention_testkit.suite._subject import (
    Subject,
    call_of,
    reason_to_decline,
    run_kernels,
    usual_form,
)
from flash_attention_testkit.suite.parity_masks import MaskTests

REPEATS = 200
"""A block that is lost once in 50 calls is found by this many with a probability of 98 %."""

TENSORS = ("out", "lse", "dq", "dk", "dv")


class ParityTests(MaskTests):
    """Every declared case is right by the parity rule, and every other one declined.

    Each tensor has a test of its own. A gradient is that of a reference's forward, so that a wrong
    forward does not fail the tests of the backward.
    """

    @pytest.fixture
    def findings(self, request: pytest.FixtureRequest) -> Findings:
        """What this class has measured so far."""
        return Findings.of(request)

    def test_declared_cases_are_served_and_others_declined(
        self, subject: Subject, case: SdpaCase
    ) -> None:
        """``supports`` agrees with ``Capabilities``, and gives a reason where it declines."""
        inputs = inputs_of(subject, case)
        reason = reason_to_decline(subject, inputs)
        if _is_declared(subject, case, inputs):
            assert reason is None, f"{subject.name} declares this case, but declines it: {reason}"
        else:
            assert reason is not None, f"{subject.name} serves this case without declaring it"
            assert reason.strip(), f"{subject.name} declines this case without a reason"

    def test_out_is_right(self, subject: Subject, case: SdpaCase, findings: Findings) -> None:
        """Out, by the parity rule."""
        _skip_unless_declared(subject, case)
        findings.check(subject, case, "out")

    def test_lse_is_right(self, subject: Subject, case: SdpaCase, findings: Findings) -> None:
        """Log-sum-exp: natural, in float32, -inf in rows that see no key."""
        _skip_unless_declared(subject, case)
        findings.check(subject, case, "lse")

    def test_gradient_of_query_is_right(
        self, subject: Subject, case: SdpaCase, findings: Findings
    ) -> None:
        """dq, by the parity rule."""
        _skip_unless_declared(subject, case, "dq")
        findings.check(subject, case, "dq")

    def test_gradient_of_key_is_right(
        self, subject: Subject, case: SdpaCase, findings: Findings
    ) -> None:
        """dk, by the parity rule."""
        _skip_unless_declared(subject, case, "dk")
        findings.check(subject, case, "dk")

    def test_gradient_of_value_is_right(
        self, subject: Subject, case: SdpaCase, findings: Findings
    ) -> None:
        """dv, by the parity rule."""
        _skip_unless_declared(subject, case, "dv")
        findings.check(subject, case, "dv")

    @pytest.mark.parametrize("tensor", TENSORS)
    def test_drawn_cases_are_right(
        self, subject: Subject, tensor: str, findings: Findings, pytestconfig: pytest.Config
    ) -> None:
        """Cases that nobody thought of, of all head dims that are declared, the same for a seed."""
        pytest.importorskip("hypothesis", reason="drawing cases needs hypothesis")
        from hypothesis import HealthCheck, given, seed, settings

        from flash_attention_testkit.strategies import legal_cases

        if tensor in ("dq", "dk", "dv") and not subject.has_backward:
            pytest.skip(f"{subject.name} declares no backward")
        judged = subject.capabilities.dtypes & {torch.bfloat16, torch.float16}
        if not judged:
            pytest.skip(f"{subject.name} declares neither bf16 nor fp16, which the rule is for")
        declared = replace(subject.capabilities, dtypes=judged)
        examples = 6 if subject.device.type == "cuda" else 12  # a GPU compiles for each of them
        if grid_name(pytestconfig) == "exhaustive":
            examples = 200

        @seed(subject.seed)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=legal_cases(declared, longest=80, most_heads=3))
        def check(case: SdpaCase) -> None:
            findings.check(subject, case, tensor)

        check()

    def test_forward_repeats_bit_for_bit(self, subject: Subject) -> None:
        """A call gives the same out and lse however often it is made."""
        inputs = inputs_of(subject, _repeated(subject))
        first = named(run_kernels(subject, inputs, grads=False))
        for number in range(1, REPEATS):
            _assert_equal(named(run_kernels(subject, inputs, grads=False)), first, number)

    def test_gradients_repeat(self, subject: Subject) -> None:
        """Bit for bit where determinism is declared, if asked for or always; else they are right.

        Declared are ``deterministic="always"``, ``"on_request"`` and ``"never"``.
        """
        if not subject.has_backward:
            pytest.skip(f"{subject.name} declares no backward")
        case = _repeated(subject)
        inputs = inputs_of(subject, case)
        faithful = references_of_case(case, subject.seed, subject.device).faithful
        call, declared = call_of(inputs), subject.capabilities.deterministic
        assert faithful.lse is not None
        first: dict[str, Tensor] = {}
        asking = asking_for_determinism() if declared == "on_request" else nullcontext()
        with torch.no_grad(), asking:
            for number in range(REPEATS):
                grads = subject.kernel_set.backward(
                    call, inputs.grad_out, faithful.out, faithful.lse
                )
                again = dict(zip(("dq", "dk", "dv"), grads, strict=True))
                first = first or again
                if declared == "never":
                    _assert_right(again, case, subject)
                else:
                    _assert_equal(again, first, number)


def _is_declared(subject: Subject, case: SdpaCase, inputs: SdpaInputs) -> bool:
    """Whether a case has to be served; windows that hide nothing do not ask for any."""
    call = call_of(inputs)
    window = call.window_left is not None or call.window_right is not None
    asked = case.features - (set() if window else {"window"})
    declared = subject.capabilities
    if case.dtype not in declared.dtypes or case.head_dim not in declared.head_dims:
        return False
    return asked <= declared.features


def _skip_unless_declared(subject: Subject, case: SdpaCase, gradient: str | None = None) -> None:
    """Leave a case out that the subject does not declare; that it declines is a test of its own."""
    if not case.is_declared(subject.capabilities):
        pytest.skip(f"{subject.name} does not declare this case")
    if gradient is not None and not subject.has_backward:
        pytest.skip(f"{subject.name} declares no backward")


def _repeated(subject: Subject) -> SdpaCase:
    """Many blocks of keys; on a GPU also many programs at once."""
    head_dim, dtype = usual_form(subject)
    if subject.device.type == "cuda":
        return SdpaCase(2, 8, 8, 333, 1023, head_dim, dtype)
    return SdpaCase(1, 1, 1, 9, 97, head_dim, dtype)


def _assert_equal(again: Mapping[str, Tensor], first: Mapping[str, Tensor], number: int) -> None:
    __tracebackhide__ = True
    for name, tensor in again.items():
        assert torch.equal(tensor, first[name]), (
            f"{name} of call {number + 1} differs from that of the first in "
            f"{int((tensor != first[name]).sum())} of {tensor.numel()} elements"
        )


def _assert_right(grads: Mapping[str, Tensor], case: SdpaCase, subject: Subject) -> None:
    __tracebackhide__ = True
    references = references_of_case(case, subject.seed, subject.device)
    found = tuple(references.compare(name, grads[name], rule_of(case.dtype)) for name in grads)
    report = ParityReport(str(case), found)
    if not report.passed:
        raise AssertionError(report.failure_text())
