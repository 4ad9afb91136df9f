"""Each dispatch test finds the faults that it is for, and no test finds another's.

The faults are planted in a correct kernel set, or, where routers would put them right, in the
adapters of the registry, as an implementation with adapters of its own might have them.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import pytest
import torch
from torch import Tensor

# Inner runs forget what they were the first to import, and torch's ops keep one set of routers.
import flash_attention_testkit.standalone  # noqa: F401
from flash_attention_registry import default_registry, register_flash_attention_impl
from flash_attention_registry.sdpa import AttentionCall, Capabilities, cpu, flash_general, install
from flash_attention_testkit.suite._base import ProviderTestsBase
from flash_attention_testkit.suite.dispatch import DispatchTests

pytest_plugins = ["pytester"]

PlainKernelSet: Any = runpy.run_path(str(Path(__file__).with_name("plain_kernel_set.py")))[
    "PlainKernelSet"
]
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


# Form and memory


@found_by("test_lse_has_the_declared_form")
class LseLiesHeadsLast(PlainKernelSet):
    def store_lse(self, call: AttentionCall, lse: Tensor) -> Tensor:
        return super().store_lse(call, lse).mT.contiguous().mT


@found_by("test_lse_has_the_declared_form", "test_gradients_are_served_if_declared")
class LseInHalfPrecision(PlainKernelSet):
    def store_lse(self, call: AttentionCall, lse: Tensor) -> Tensor:
        return super().store_lse(call, lse).half()


@found_by("test_gradients_have_the_declared_form")
class GradientInFloat32(PlainKernelSet):
    def store_dk(self, call: AttentionCall, dk: Tensor) -> Tensor:
        return super().store_dk(call, dk).float()


@found_by("test_forward_leaves_its_arguments_alone")
class ScalesTheQueryInPlace(PlainKernelSet):
    def forward(self, call: AttentionCall) -> Any:
        result = super().forward(call)
        call.query.mul_(3)
        return result


@found_by("test_backward_leaves_its_arguments_alone")
class ScalesTheGradientInPlace(PlainKernelSet):
    def backward(self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> Any:
        grads = super().backward(call, grad_out, out, lse)
        if grad_out.is_contiguous():
            grad_out.mul_(3)
        return grads


@found_by("test_gradients_share_no_memory")
class OneGradientTwice(PlainKernelSet):
    def backward(self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> Any:
        dq, dk, _ = super().backward(call, grad_out, out, lse)
        return dq, dk, dk


@found_by("test_a_second_forward_leaves_the_firsts_results_alone")
class KeepsItsLse(PlainKernelSet):
    kept: ClassVar[dict[torch.Size, Tensor]] = {}

    def store_lse(self, call: AttentionCall, lse: Tensor) -> Tensor:
        lse = super().store_lse(call, lse)
        return self.kept.setdefault(lse.shape, torch.empty_like(lse)).copy_(lse)


@found_by("test_a_second_backward_leaves_the_firsts_gradients_alone")
class KeepsItsGradients(PlainKernelSet):
    kept: ClassVar[dict[torch.Size, Tensor]] = {}

    def store_dq(self, call: AttentionCall, dq: Tensor) -> Tensor:
        dq = super().store_dq(call, dq)
        return self.kept.setdefault(dq.shape, torch.empty_like(dq)).copy_(dq)


@found_by("test_given_out_is_written_as_it_lies")
class AllocatesItsOut(PlainKernelSet):
    def store_out(self, call: AttentionCall, out: Tensor) -> Tensor:
        return super().store_out(call._replace(out=None), out)


@found_by("test_out_is_allocated_where_none_is_given")
class WantsAnOut(PlainKernelSet):
    def forward(self, call: AttentionCall) -> Any:
        assert call.out is not None
        return super().forward(call)


# Meaning


@found_by("test_scale_is_the_callers", "test_scale_of_the_backward_is_the_callers")
class TakesScaleFromHeadDim(PlainKernelSet):
    def scores(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        return super().scores(call._replace(scale=call.query.shape[-1] ** -0.5), query, key)


@found_by("test_scale_is_the_callers", "test_scale_of_the_backward_is_the_callers")
class TakesZeroForNoScale(PlainKernelSet):
    def scores(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        return super().scores(call._replace(scale=call.scale or 1.0), query, key)


@found_by("test_scale_of_the_backward_is_the_callers")
class ForgetsTheScaleOfDq(PlainKernelSet):
    def dq_of_block(self, call: AttentionCall, *args: Tensor) -> Tensor:
        return super().dq_of_block(call._replace(scale=0.125), *args)


TOP_LEFT = (
    "test_causal_is_aligned_to_the_last_row_and_key",
    "test_windows_count_from_the_diagonal",
    "test_rows_without_keys_read_as_torchs",
    "test_lse_of_rows_without_keys_is_the_calls",
)


@found_by(*TOP_LEFT)
class AlignsAtTheTopLeft(PlainKernelSet):
    def distance_from_diagonal(self, call: AttentionCall) -> Tensor:
        here = super().distance_from_diagonal(call)
        if call.cu_seqlens_query is None:
            return here + call.key.shape[-3] - call.query.shape[-3]
        rows, keys = (
            torch.arange(x.shape[0])
            - edges[torch.searchsorted(edges[1:-1], torch.arange(x.shape[0]), right=True)]
            for x, edges in (
                (call.query, call.cu_seqlens_query),
                (call.key, call.cu_seqlens_key),
            )
        )
        return keys - rows[:, None]


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


@found_by("test_windows_count_from_the_diagonal")
class SeesOneKeyTooMany(PlainKernelSet):
    def visible(self, call: AttentionCall) -> Tensor:
        left = call.window_left
        return super().visible(call if left is None else call._replace(window_left=left + 1))


@found_by("test_without_a_mask_every_key_is_seen")
class MasksWhatItIsNotAskedTo(PlainKernelSet):
    def visible(self, call: AttentionCall) -> Tensor:
        unmasked = not call.causal and call.window_left is None and call.window_right is None
        rows, keys = (x.shape[-3] for x in (call.query, call.key))
        if not unmasked or rows >= keys or call.cu_seqlens_query is not None:
            return super().visible(call)
        return super().visible(call._replace(causal=True))


@found_by("test_rows_without_keys_read_as_torchs", "test_lse_of_rows_without_keys_is_the_calls")
class HasItsOwnLseOfEmptyRows(PlainKernelSet):
    def lse(self, call: AttentionCall, top: Tensor, total: Tensor) -> Tensor:
        return super().lse(call._replace(lse_of_empty_rows=-1e30), top, total)


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


# What is declined

DECLINES = (
    "test_dtypes_are_served_as_declared",
    "test_head_dims_are_served_as_declared",
    "test_features_are_served_as_declared",
    "test_another_device_is_declined",
)


@found_by(
    *DECLINES,
    "test_declined_calls_are_torchs_own",
    "test_declined_calls_are_counted_with_a_reason",
)
class ServesEverything(PlainKernelSet):
    def supports(self, call: AttentionCall) -> str | None:
        return None


@found_by("test_dtypes_are_served_as_declared")
class DeclinesWhatItDeclares(PlainKernelSet):
    def supports(self, call: AttentionCall) -> str | None:
        half = call.query.dtype is torch.float16
        return "float16 has no kernels yet" if half else super().supports(call)


@found_by("test_features_are_served_as_declared")
class TakesNumSplits(PlainKernelSet):
    def supports(self, call: AttentionCall) -> str | None:
        return super().supports(call._replace(num_splits=None))


@found_by(*DECLINES, "test_declined_calls_are_counted_with_a_reason")
class GivesNoReason(PlainKernelSet):
    def supports(self, call: AttentionCall) -> str | None:
        return None if super().supports(call) is None else " "


@found_by("test_reasons_name_no_length")
class NamesLengths(PlainKernelSet):
    def supports(self, call: AttentionCall) -> str | None:
        reason = super().supports(call)
        return None if reason is None else f"{reason} for {call.query.shape[-3]} rows"


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


def contiguous_out(patch: pytest.MonkeyPatch) -> None:
    served = cpu.serve_bhsd
    patch.setattr(
        cpu, "serve_bhsd", lambda *args: (served(*args)[0].contiguous(), served(*args)[1])
    )


def contiguous_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flash_general, "in_layout_of", lambda grad, tensor: grad.mT.contiguous().mT)


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


def another_default_scale(patch: pytest.MonkeyPatch) -> None:
    served = cpu.serve_bhsd

    def serve(kernels: Any, query: Any, key: Any, value: Any, scale: Any, *rest: Any) -> Any:
        return served(kernels, query, key, value, 0.7 if scale is None else scale, *rest)

    patch.setattr(cpu, "serve_bhsd", serve)


def another_default_scale_in_the_backward(patch: pytest.MonkeyPatch) -> None:
    served = cpu.serve_bhsd_backward

    def serve(kernels: Any, *args: Any) -> Any:
        scale = 0.7 if args[6] is None else args[6]
        return served(kernels, *args[:6], scale, *args[7:])

    patch.setattr(cpu, "serve_bhsd_backward", serve)


def negative_windows(patch: pytest.MonkeyPatch) -> None:
    def normalised(causal: bool, left: Any, right: Any, rows: int, keys: int) -> Any:
        return (True, left, None) if causal or right == 0 else (causal, left, right)

    patch.setattr(flash_general, "normalised_window", normalised)


ADAPTERS: dict[Callable[[pytest.MonkeyPatch], None], set[str]] = {
    contiguous_out: {"test_out_has_the_declared_form"},
    contiguous_gradients: {"test_gradients_have_the_declared_form"},
    random_state_in_int64: {"test_other_results_have_the_declared_form"},
    random_state_twice: {"test_forward_results_share_no_memory"},
    another_default_scale: {"test_missing_arguments_mean_their_defaults"},
    another_default_scale_in_the_backward: {
        "test_missing_arguments_mean_their_defaults_in_the_backward"
    },
    negative_windows: {
        "test_no_window_may_be_said_otherwise",
        "test_windows_count_from_the_diagonal",
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


def test_there_is_a_fault_for_every_test() -> None:
    tests = {name for name in vars_of(DispatchTests) if name.startswith("test_")}
    found = set().union(*FOUND_BY.values(), *ADAPTERS.values())
    assert tests - found == {"test_undeclared_gradients_are_torchs_own"}


def vars_of(cls: type) -> set[str]:
    """What dispatch tests add to the base."""
    return set(dir(cls)) - set(dir(ProviderTestsBase))


# What is right


class OddOnly(PlainKernelSet):
    capabilities = replace(DECLARED, dtypes=frozenset({torch.float32}), head_dims=(12,))


@pytest.mark.parametrize("kernel_set", [PlainKernelSet, ForwardsOnly, OddOnly])
def test_who_is_right_passes_at_every_op(run: Run, kernel_set: type) -> None:
    seen = run(kernel_set, ops=None)
    assert not seen.failed
    assert {"test_features_are_served_as_declared", "test_scale_is_the_callers"} <= seen.passed
