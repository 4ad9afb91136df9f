"""Dispatch tests on kernel sets that are right, and on faults beside those in `broken`.

The faults are planted in a correct kernel set, or, where routers would put them right, in the
adapters of the registry, as an implementation with adapters of its own might have them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, get_args

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent))  # packages' tests are no packages themselves

from broken import BROKEN
from plain_kernel_set import PlainKernelSet

# Inner runs forget what they were the first to import, and torch's ops keep one set of routers.
import flash_attention_testkit.standalone  # noqa: F401
from flash_attention_registry import default_registry, register_flash_attention_impl
from flash_attention_registry.sdpa import (
    AttentionCall,
    Capabilities,
    Feature,
    cpu,
    flash_general,
    install,
)
from flash_attention_testkit.suite.dispatch import DispatchTests

pytest_plugins = ["pytester"]

DECLARED = PlainKernelSet.capabilities
TWO_OPS = ("cpu", "packed")
"""The ops on which faults are tried: one with a form of its own, and one that passes on what it
gets."""


Run: TypeAlias = Callable[..., "Only"]


class Only:
    """A pytest plugin: of the standard tests only those of dispatch, and what became of them."""

    def __init__(self, ops: tuple[str, ...] | None) -> None:
        self.ops = ops
        self.passed: set[str] = set()
        self.failed: set[str] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if self.is_wanted(item)]

    def is_wanted(self, item: Any) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if not hasattr(DispatchTests, item.originalname):
            return False
        return self.ops is None or "op" not in params or str(params["op"]) in self.ops

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2].partition("[")[0]
        if report.failed:
            self.failed.add(name)
        elif report.when == "call" and report.passed:
            self.passed.add(name)


@pytest.fixture
def run(pytester: pytest.Pytester) -> Iterator[Run]:
    """Runs the dispatch tests on a kernel set for CPU tensors."""
    registry = default_registry()
    before = registry.snapshot()

    def run_on(kernel_set: type, ops: tuple[str, ...] | None = TWO_OPS) -> Only:
        register_flash_attention_impl(
            "kit-planted", register_fn=lambda: install(kernel_set(), "cpu")
        )
        seen = Only(ops)
        command = ["--pyargs", "flash_attention_testkit.standalone", "-p", "no:cacheprovider", "-q"]
        named = ["--flash-attention-impl", "kit-planted", "-W", "ignore::RuntimeWarning"]
        pytester.inline_run(*command, *named, plugins=[seen])
        return seen

    yield run_on
    registry.reset(before)


FOUND_BY: dict[type, set[str]] = {}


def found_by(*tests: str) -> Callable[[type], type]:
    """Note which tests find the fault of a kernel set."""

    def note(kernel_set: type) -> type:
        FOUND_BY[kernel_set] = set(tests)
        return kernel_set

    return note


# Kernel sets


@found_by("test_scale_of_the_backward_is_the_callers")
class ForgetsTheScaleOfDq(PlainKernelSet):
    def dq_of_block(self, call: AttentionCall, *args: Tensor) -> Tensor:
        return super().dq_of_block(call._replace(scale=0.125), *args)


@found_by(
    "test_causal_hides_the_keys_after_the_diagonal",
    "test_causal_is_aligned_to_the_last_row_and_key",
    "test_windows_count_from_the_diagonal",
    "test_rows_without_keys_read_as_torchs",
    "test_lse_of_rows_without_keys_is_the_calls",
)
class IgnoresCausal(PlainKernelSet):
    def visible(self, call: AttentionCall) -> Tensor:
        return super().visible(call._replace(causal=False))


@found_by("test_without_a_mask_every_key_is_seen")
class MasksWhatItIsNotAskedTo(PlainKernelSet):
    def visible(self, call: AttentionCall) -> Tensor:
        unmasked = not call.causal and call.window_left is None and call.window_right is None
        rows, keys = (x.shape[-3] for x in (call.query, call.key))
        if not unmasked or rows >= keys or call.cu_seqlens_query is not None:
            return super().visible(call)
        return super().visible(call._replace(causal=True))


@found_by("test_rows_without_keys_read_as_torchs")
class DividesByZero(PlainKernelSet):
    def normalised(self, out: Tensor, total: Tensor) -> Tensor:
        return out / total


@found_by("test_gradients_do_not_depend_on_how_grad_out_lies")
class TakesGradOutForContiguous(PlainKernelSet):
    def backward(self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> Any:
        strides = torch.empty(grad_out.shape, device="meta").stride()
        if grad_out.stride() != out.stride():  # which is right by chance where both lie alike
            grad_out = grad_out.as_strided(grad_out.shape, strides)
        return super().backward(call, grad_out, out, lse)


@found_by(
    "test_gradients_are_served_if_declared",
    "test_gradients_have_the_declared_form",
    "test_backward_leaves_its_arguments_alone",
    "test_gradients_share_no_memory",
    "test_a_second_backward_leaves_the_firsts_gradients_alone",
    "test_missing_arguments_mean_their_defaults_in_the_backward",
    "test_scale_of_the_backward_is_the_callers",
    "test_gradients_do_not_depend_on_how_grad_out_lies",
)
class HasNoBackward(PlainKernelSet):
    def backward(self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> Any:
        raise NotImplementedError("gradients")


@pytest.mark.parametrize("kernel_set", FOUND_BY, ids=lambda kernel_set: kernel_set.__name__)
def test_a_fault_is_found_by_the_tests_for_it(run: Run, kernel_set: type) -> None:
    assert run(kernel_set).failed == FOUND_BY[kernel_set]


# Adapters


def random_state_in_int64(patch: pytest.MonkeyPatch) -> None:
    outputs = flash_general.unused_outputs
    patch.setattr(
        flash_general,
        "unused_outputs",
        lambda query: (outputs(query)[0].long(), *outputs(query)[1:]),
    )


def random_state_twice(patch: pytest.MonkeyPatch) -> None:
    outputs = flash_general.unused_outputs

    def shared(query: Tensor) -> tuple[Tensor, ...]:
        state, _, mask = outputs(query)
        return state, state[0], mask

    patch.setattr(flash_general, "unused_outputs", shared)


def another_default_scale_in_the_backward(patch: pytest.MonkeyPatch) -> None:
    served = cpu.serve_bhsd_backward

    def serve(kernels: Any, *args: Any) -> Any:
        scale = 0.7 if args[6] is None else args[6]
        return served(kernels, *args[:6], scale, *args[7:])

    patch.setattr(cpu, "serve_bhsd_backward", serve)


ADAPTERS: dict[Callable[[pytest.MonkeyPatch], None], set[str]] = {
    random_state_in_int64: {"test_other_results_have_the_declared_form"},
    random_state_twice: {"test_forward_results_share_no_memory"},
    another_default_scale_in_the_backward: {
        "test_missing_arguments_mean_their_defaults_in_the_backward"
    },
}


@pytest.mark.parametrize("plant", ADAPTERS, ids=lambda plant: plant.__name__)
def test_a_fault_of_an_adapter_is_found_by_the_tests_for_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    assert run(PlainKernelSet).failed == ADAPTERS[plant]


class ForwardsOnly(PlainKernelSet):
    capabilities = replace(DECLARED, features=frozenset())


def test_gradients_that_are_served_undeclared_are_found(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Capabilities, "reason_to_decline_backward", lambda self: None)
    assert run(ForwardsOnly).failed == {"test_undeclared_gradients_are_torchs_own"}


# Features that few declare


class EverythingKernels(PlainKernelSet):
    """Declares every feature; what they ask for is one bias on the scores of all keys."""

    key_block = 1 << 20
    capabilities = replace(DECLARED, features=frozenset(get_args(Feature)))

    def operands(self, call: AttentionCall) -> Any:
        return super().operands(self.gathered(call))

    def visible(self, call: AttentionCall) -> Tensor:
        return super().visible(self.gathered(call))

    def scores(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        return super().scores(call, query, key) + self.bias(call, query, key)

    def gathered(self, call: AttentionCall) -> AttentionCall:
        """The call of one sequence, without pages."""
        if call.block_table is None:
            return call
        pages = call.block_table[0].long()
        key, value = (x[pages].flatten(0, 1)[: call.max_seqlen_key] for x in (call.key, call.value))
        return call._replace(key=key, value=value)

    def bias(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        rows, keys = query.shape[-2], key.shape[-2]
        bias = query.new_zeros(1, 1, rows, keys)
        if call.attn_bias is not None:
            bias = bias + call.attn_bias
        if call.alibi_slopes is not None:
            distance = torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)
            slopes = call.alibi_slopes.view(-1, query.shape[1], 1, 1)
            bias = bias - slopes * distance.abs()
        if call.seqused_key is not None:
            behind = torch.arange(keys) >= call.seqused_key.view(-1, 1, 1, 1)
            bias = bias.masked_fill(behind, -torch.inf)
        return bias


class IgnoresBias(EverythingKernels):
    def bias(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        return super().bias(call._replace(attn_bias=None), query, key)


class ScalesBias(EverythingKernels):
    def bias(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        bias = call.attn_bias
        bias = None if bias is None else bias * call.scale
        return super().bias(call._replace(attn_bias=bias), query, key)


class ForgetsBiasInTheBackward(EverythingKernels):
    def backward(self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> Any:
        return super().backward(call._replace(attn_bias=None), grad_out, out, lse)


class CountsSlopesFromTheFirstKey(EverythingKernels):
    def bias(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        slopes = call.alibi_slopes
        if slopes is None:
            return super().bias(call, query, key)
        distance = torch.arange(query.shape[-2])[:, None] - torch.arange(key.shape[-2])
        return -slopes.view(-1, query.shape[1], 1, 1) * distance.abs()


class TakesOneLengthForAll(EverythingKernels):
    def bias(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        used = call.seqused_key
        used = None if used is None else used.amax().expand(used.shape)
        return super().bias(call._replace(seqused_key=used), query, key)


class LosesASplit(EverythingKernels):
    def visible(self, call: AttentionCall) -> Tensor:
        visible = super().visible(call)
        if call.num_splits is not None:
            visible[:, : visible.shape[1] // call.num_splits] = False
        return visible


class TakesPagesInOrder(EverythingKernels):
    def gathered(self, call: AttentionCall) -> AttentionCall:
        table = call.block_table
        table = None if table is None else table.sort().values
        return super().gathered(call._replace(block_table=table))


EXTRAS = {
    EverythingKernels: set(),
    IgnoresBias: {
        "test_attn_bias_is_added_to_scaled_scores",
        "test_attn_bias_of_minus_infinity_hides_keys",
        "test_attn_bias_of_minus_infinity_hides_keys_from_gradients",
    },
    ScalesBias: {"test_attn_bias_is_added_to_scaled_scores"},
    ForgetsBiasInTheBackward: {"test_attn_bias_of_minus_infinity_hides_keys_from_gradients"},
    CountsSlopesFromTheFirstKey: {"test_alibi_slopes_count_from_the_diagonal"},
    TakesOneLengthForAll: {"test_seqused_key_hides_the_keys_behind"},
    LosesASplit: {"test_num_splits_changes_no_result"},
    TakesPagesInOrder: {"test_block_table_says_where_the_keys_are"},
}


@pytest.mark.parametrize("kernel_set", EXTRAS, ids=lambda kernel_set: kernel_set.__name__)
def test_features_that_few_declare_are_tested_too(run: Run, kernel_set: type) -> None:
    assert run(kernel_set).failed == EXTRAS[kernel_set]


def test_there_is_a_fault_for_every_test() -> None:
    tests = {name for name in dir(DispatchTests) if name.startswith("test_")}
    found = {test.partition("[")[0] for fault in BROKEN.values() for test in fault.expected}
    found |= set().union(*FOUND_BY.values(), *ADAPTERS.values(), *EXTRAS.values())
    assert tests - found == {
        "test_standard_tests_are_not_overridden",  # see test_suite_base.py
        "test_undeclared_gradients_are_torchs_own",  # see the test before this one
    }


# What is right


class OddOnly(PlainKernelSet):
    capabilities = replace(DECLARED, dtypes=frozenset({torch.float32}), head_dims=(12,))


@pytest.mark.parametrize("kernel_set", [PlainKernelSet, ForwardsOnly, OddOnly])
def test_who_is_right_passes_at_every_op(run: Run, kernel_set: type) -> None:
    seen = run(kernel_set, ops=None)
    assert not seen.failed
    assert {"test_features_are_served_as_declared", "test_scale_is_the_callers"} <= seen.passed
