"""What the parity rule says of a kernel set's results; each case is run and measured once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from flash_attention_testkit._compare import place_of
from flash_attention_testkit._references import References
from flash_attention_testkit.cases import SdpaCase
from flash_attention_testkit.inputs import SdpaInputs, make_inputs
from flash_attention_testkit.parity import ParityReport, ParityRule, TensorParity
from flash_attention_testkit.reference import SdpaResult
from flash_attention_testkit.suite._subject import Subject, call_of, run_kernels

FP32_RULE = ParityRule(k_max=25.0, k_rms=6.0, k_local=25.0)
"""For float32 inputs. The faithful reference sums exactly, and the sums are all that a kernel errs
by then: one in plain float32 needed factors of 11.6, 2.2 and 9.2 over 640 cases."""


def rule_of(dtype: torch.dtype) -> ParityRule:
    """The rule for inputs of a dtype."""
    return FP32_RULE if dtype is torch.float32 else ParityRule()


def references_of(inputs: SdpaInputs) -> References:
    """Both references of a problem, with gradients."""
    return References.of(
        inputs.query, inputs.key, inputs.value, grad_out=inputs.grad_out, **inputs.options
    )


@lru_cache(maxsize=256)
def references_of_case(case: SdpaCase, seed: int, device: torch.device) -> References:
    """Both references of a case. Inputs are not kept beside them: a kernel might write there."""
    return references_of(make_inputs(case, seed, device))


def inputs_of(subject: Subject, case: SdpaCase) -> SdpaInputs:
    """The tensors of a case for a subject, made anew."""
    return make_inputs(case, subject.seed, subject.device)


def named(result: SdpaResult) -> dict[str, Tensor]:
    """The tensors that a result has, by name."""
    tensors = {name: getattr(result, name) for name in ("out", "lse", "dq", "dk", "dv")}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


class Findings:
    """Errors and limits of every tensor of the cases that one class of tests has met."""

    def __init__(self) -> None:
        """Nothing has been met."""
        self._forward: dict[SdpaCase, dict[str, TensorParity]] = {}
        self._backward: dict[SdpaCase, dict[str, TensorParity]] = {}

    @classmethod
    def of(cls, request: pytest.FixtureRequest) -> Findings:
        """Those of the class of the test that asks."""
        collector: pytest.Class = request.node.getparent(pytest.Class)
        return collector.stash.setdefault(_KEY, cls())

    def check(self, subject: Subject, case: SdpaCase, name: str) -> None:
        """Insist that a tensor of a case is as right as its precision allows.

        Args:
            subject: Declares the case.
            case: Its inputs are those of the subject's seed.
            name: ``out``, ``lse``, ``dq``, ``dk`` or ``dv``.

        Raises:
            AssertionError: It is not; the text says by how much and where.
        """
        __tracebackhide__ = True
        if name in ("out", "lse"):
            if case not in self._forward:
                self._forward[case] = self._measured_forward(subject, case)
            found = self._forward[case][name]
        else:
            if case not in self._backward:
                self._backward[case] = self._measured_backward(subject, case)
            found = self._backward[case][name]
        if not found.passed:
            raise AssertionError(ParityReport(str(case), (found,)).failure_text())

    @staticmethod
    def _measured_forward(subject: Subject, case: SdpaCase) -> dict[str, TensorParity]:
        __tracebackhide__ = True
        result = run_kernels(subject, inputs_of(subject, case), grads=False)
        return _measured(case, subject, {"out": result.out, "lse": result.lse})

    @staticmethod
    def _measured_backward(subject: Subject, case: SdpaCase) -> dict[str, TensorParity]:
        """A backward of the faithful reference's forward: it is not to blame for the subject's."""
        __tracebackhide__ = True
        faithful = references_of_case(case, subject.seed, subject.device).faithful
        assert faithful.lse is not None
        inputs = inputs_of(subject, case)
        call = call_of(inputs)
        reason = subject.kernel_set.supports(call)
        assert reason is None, f"{subject.name} declines a call that it has to serve: {reason}"
        with torch.no_grad():
            grads = subject.kernel_set.backward(
                call, inputs.grad_out, faithful.out.clone(), faithful.lse.clone()
            )
        return _measured(case, subject, dict(zip(("dq", "dk", "dv"), grads, strict=True)))


_KEY = pytest.StashKey[Findings]()


def _measured(
    case: SdpaCase, subject: Subject, tensors: Mapping[str, Tensor | None]
) -> dict[str, TensorParity]:
    references = references_of_case(case, subject.seed, subject.device)
    rule = rule_of(case.dtype)
    return {name: references.compare(name, tensor, rule) for name, tensor in tensors.items()}


def assert_same(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], inputs: SdpaInputs
) -> None:
    """Insist that one kernel set has answered one question the same way twice.

    Equal bits, or a distance that two right answers may have from each other: each may be off by
    the parity rule's limit. So a kernel set is not blamed for being wrong both times.

    Args:
        found: Tensors by name, or the same parts of them as in ``expected``.
        expected: What the kernel set gave when nothing was special.
        inputs: Of the problem, finite.
    """
    __tracebackhide__ = True
    assert found.keys() == expected.keys(), f"found are {list(found)}, expected {list(expected)}"
    for name, tensor in found.items():
        other = expected[name]
        assert tensor.shape == other.shape, f"{name} is {tensor.shape}, expected {other.shape}"
        assert tensor.dtype == other.dtype, f"{name} is {tensor.dtype}, expected {other.dtype}"
        if torch.equal(tensor, other):
            continue
        limits = _limits_of(inputs, name)
        distance = (tensor.double() - other.double()).abs().nan_to_num(posinf=torch.inf)
        distance = distance.masked_fill(tensor.isnan() ^ other.isnan(), torch.inf)
        distance = distance.masked_fill(tensor == other, 0.0)  # infinities of one sign
        largest, rms = float(distance.max()), float(distance.square().mean().sqrt())
        assert largest <= 2 * limits.max_limit and rms <= 2 * limits.rms_limit, (  # noqa: PT018
            f"{name} is not what the same kernel set gives for the same problem otherwise: it "
            f"differs by max {largest:.3e}, rms {rms:.3e}; two right results may differ by max "
            f"{2 * limits.max_limit:.3e}, rms {2 * limits.rms_limit:.3e}. The largest difference "
            f"is at {list(place_of(int(distance.argmax()), distance.shape))}"
        )


def _limits_of(inputs: SdpaInputs, name: str) -> TensorParity:
    """What a tensor of a problem may be off by."""
    references = references_of(inputs)
    faithful = getattr(references.faithful, name)
    return references.compare(name, faithful, rule_of(inputs.query.dtype))
