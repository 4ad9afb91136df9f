"""The parity tests: a right kernel set passes, and a fault fails the tests that name it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention_registry import Registry
from flash_attention_registry.sdpa import AttentionCall, Capabilities, install
from flash_attention_testkit import case_grid
from flash_attention_testkit.suite import parity
from flash_attention_testkit.suite._findings import Findings, assert_same
from flash_attention_testkit.suite._subject import Subject
from flash_attention_testkit.suite.parity import ParityTests
from flash_attention_testkit.suite.robustness_base import problem, run

sys.path.append(str(Path(__file__).parent))  # packages' tests are no packages themselves

from plain_kernel_set import PlainKernelSet
from run_standard_tests import outcomes_of

Outcomes = dict[str, str]

DRAWN = "test_drawn_cases_are_right"
OUT, LSE = "test_out_is_right", "test_lse_is_right"
DQ, DK, DV = (f"test_gradient_of_{name}_is_right" for name in ("query", "key", "value"))
MASKS = "test_rows_see_exactly_the_keys_that_the_mask_shows"
MASKS_BACKWARD = "test_gradients_of_value_come_from_exactly_the_rows_that_see_it"
SERVED = "test_declared_cases_are_served_and_others_declined"
REPEATS, GRADIENTS_REPEAT = "test_forward_repeats_bit_for_bit", "test_gradients_repeat"


class TestPlain(ParityTests):
    """A kernel set that is right."""

    @pytest.fixture
    def provider(self, registry: Registry) -> str:
        registry.register("plain", register_fn=lambda: install(PlainKernelSet(), "cpu"))
        return "plain"


class Few(PlainKernelSet):
    """Right in the little that it declares."""

    capabilities = Capabilities(
        device_types=frozenset({"cpu"}),
        dtypes=frozenset({torch.float16}),
        head_dims=(64,),
        features=frozenset({"causal"}),
        deterministic="never",
    )


class OutOnePercentOff(PlainKernelSet):
    def store_out(self, call: AttentionCall, out: Tensor) -> Tensor:
        return super().store_out(call, out * 1.01)


class LseInBaseTwo(PlainKernelSet):
    def lse(self, call: AttentionCall, top: Tensor, total: Tensor) -> Tensor:
        return super().lse(call, top, total) / math.log(2)


class LastKeysOfQueryGradientMissing(PlainKernelSet):
    def dq_of_block(self, call: AttentionCall, *operands: Tensor) -> Tensor:
        share = super().dq_of_block(call, *operands)
        return share if operands[1].shape[-2] == self.key_block else share * 0.9


class KeyGradientOnePercentOff(PlainKernelSet):
    def store_dk(self, call: AttentionCall, dk: Tensor) -> Tensor:
        return super().store_dk(call, dk * 1.01)


class ValueGradientOnePercentOff(PlainKernelSet):
    def store_dv(self, call: AttentionCall, dv: Tensor) -> Tensor:
        return super().store_dv(call, dv * 1.01)


class ForgetsToRescale(PlainKernelSet):
    def rescale(self, top: Tensor, higher: Tensor) -> Tensor:
        return torch.ones_like(top)


class AlignsMasksToTheFirstRow(PlainKernelSet):
    def distance_from_diagonal(self, call: AttentionCall) -> Tensor:
        distance = super().distance_from_diagonal(call)
        if call.cu_seqlens_query is not None:
            return distance
        return distance + (call.key.shape[-3] - call.query.shape[-3])


class WindowOneKeyTooWide(PlainKernelSet):
    def visible(self, call: AttentionCall) -> Tensor:
        if call.window_left is not None:
            call = call._replace(window_left=call.window_left + 1)
        return super().visible(call)


class LosesABlockNowAndThen(PlainKernelSet):
    calls = 0

    def key_blocks(self, call: AttentionCall) -> Any:
        self.calls += 1
        blocks = list(super().key_blocks(call))
        return blocks[:-1] if self.calls % 50 == 0 and len(blocks) > 1 else blocks


class AddsInAnyOrder(PlainKernelSet):
    """As atomics do: dq differs from call to call in its last bits."""

    def store_dq(self, call: AttentionCall, dq: Tensor) -> Tensor:
        return super().store_dq(call, dq * (1 + 1e-6 * torch.randn_like(dq)))


class AddsInAnyOrderAndSaysSo(AddsInAnyOrder):
    capabilities = replace(PlainKernelSet.capabilities, deterministic="never")


class AddsInOrderOnRequest(AddsInAnyOrder):
    capabilities = replace(PlainKernelSet.capabilities, deterministic="on_request")

    def store_dq(self, call: AttentionCall, dq: Tensor) -> Tensor:
        if torch.are_deterministic_algorithms_enabled():
            return PlainKernelSet.store_dq(self, call, dq)
        return super().store_dq(call, dq)


class ServesWindowsUndeclared(PlainKernelSet):
    capabilities = replace(
        PlainKernelSet.capabilities, features=frozenset({"backward", "causal", "gqa", "varlen"})
    )

    def supports(self, call: AttentionCall) -> str | None:
        return super().supports(call._replace(window_left=None, window_right=None))


class DeclinesWithoutAReason(PlainKernelSet):
    def supports(self, call: AttentionCall) -> str | None:
        return "" if super().supports(call) else None


FAULTS: dict[type[PlainKernelSet], set[str]] = {
    OutOnePercentOff: {OUT, f"{DRAWN}[out]"},
    LseInBaseTwo: {LSE, f"{DRAWN}[lse]"},
    LastKeysOfQueryGradientMissing: {DQ, f"{DRAWN}[dq]"},
    KeyGradientOnePercentOff: {DK, f"{DRAWN}[dk]"},
    ValueGradientOnePercentOff: {DV, f"{DRAWN}[dv]"},
    ForgetsToRescale: {OUT, LSE, f"{DRAWN}[out]", f"{DRAWN}[lse]"},
    AddsInAnyOrder: {GRADIENTS_REPEAT},
    AddsInAnyOrderAndSaysSo: set(),
    AddsInOrderOnRequest: set(),
    ServesWindowsUndeclared: {SERVED},
    DeclinesWithoutAReason: {SERVED},
}


@pytest.fixture
def run_on(
    pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> Callable[[PlainKernelSet], Outcomes]:
    """Runs the parity tests on a kernel set; with fewer repeats, which the faults do not need."""
    monkeypatch.setattr(parity, "REPEATS", 60)

    def run_parity(kernel_set: PlainKernelSet) -> Outcomes:
        return outcomes_of(
            ParityTests,
            cases=case_grid("quick"),
            subject=Subject("faulty", kernel_set, torch.device("cpu")),
            findings=Findings(),
            pytestconfig=pytestconfig,
        )

    return run_parity


def failed(outcomes: Outcomes) -> set[str]:
    """Tests that failed; their parameters are kept where they name a tensor."""
    names = (name for name, outcome in outcomes.items() if outcome == "failed")
    return {name if name.startswith(DRAWN) else name.partition("[")[0] for name in names}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_the_tests_that_name_it(
    run_on: Callable[[PlainKernelSet], Outcomes], fault: type[PlainKernelSet]
) -> None:
    assert failed(run_on(fault())) == FAULTS[fault]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (WindowOneKeyTooWide, ("left", "window")),
        (AlignsMasksToTheFirstRow, ("left", "right", "window", "causal")),
    ],
)
def test_a_wrong_mask_fails_no_test_without_it(
    run_on: Callable[[PlainKernelSet], Outcomes],
    fault: type[PlainKernelSet],
    words: tuple[str, ...],
) -> None:
    outcomes = run_on(fault())
    assert {OUT, LSE, DQ, DK, DV, MASKS, MASKS_BACKWARD} <= failed(outcomes)
    for name, outcome in outcomes.items():
        expected = name.startswith(DRAWN) or any(word in name for word in words)
        assert expected or outcome != "failed", name


def test_a_block_that_is_lost_now_and_then_is_found(
    run_on: Callable[[PlainKernelSet], Outcomes],
) -> None:
    assert {REPEATS, GRADIENTS_REPEAT} <= failed(run_on(LosesABlockNowAndThen()))


def test_what_is_not_declared_is_skipped_once_it_is_declined(
    run_on: Callable[[PlainKernelSet], Outcomes],
) -> None:
    outcomes = run_on(Few())
    assert failed(outcomes) == set()
    for case in case_grid("quick"):
        served = case.is_declared(Few.capabilities)
        assert outcomes[f"{SERVED}[{case}]"] == "passed"
        assert outcomes[f"{OUT}[{case}]"] == ("passed" if served else "skipped")
        assert outcomes[f"{DQ}[{case}]"] == "skipped"


def test_answers_differ_by_more_than_two_right_ones_may() -> None:
    subject = Subject("plain", PlainKernelSet(), torch.device("cpu"))
    inputs = problem(subject)
    first = run(subject, inputs)
    assert_same(first, {name: tensor.clone() for name, tensor in first.items()}, inputs)
    for name, tensor in first.items():
        other = first | {name: tensor * 1.1}
        with pytest.raises(AssertionError, match=f"{name} is not what the same kernel set"):
            assert_same(other, first, inputs)
        other = first | {name: tensor.clone()}
        other[name].view(-1)[3] = torch.nan
        with pytest.raises(AssertionError, match=f"{name} .* max inf"):
            assert_same(other, first, inputs)
    with pytest.raises(AssertionError, match="found are"):
        assert_same({"out": first["out"]}, first, inputs)
