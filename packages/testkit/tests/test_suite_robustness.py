"""The robustness tests: a right kernel set passes, and a fault fails the tests that name it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention_registry import Registry
from flash_attention_registry.sdpa import install
from flash_attention_testkit.suite._subject import Subject
from flash_attention_testkit.suite.robustness import RobustnessTests

sys.path.append(str(Path(__file__).parent))  # packages' tests are no packages themselves

from plain_kernel_set import PlainKernelSet, _sequence_of
from run_standard_tests import failed, outcomes_of

STRIDES = {
    "test_batch_may_lie_inside_of_rows",
    "test_each_input_may_lie_in_its_own_way",
    "test_grad_out_may_be_expanded",
    "test_heads_may_lie_outside_of_rows",
    "test_inputs_may_be_expanded",
    "test_inputs_may_be_slices_of_one_projection",
    "test_packed_inputs_may_be_slices_of_one_projection",
    "test_padding_behind_the_head_dim_is_not_read",
    "test_padding_behind_the_rows_is_not_read",
    "test_rows_may_be_apart_by_odd_numbers_of_elements",
}
"""All the tests of inputs that are not contiguous."""


class TestPlain(RobustnessTests):
    """A kernel set that is right."""

    @pytest.fixture
    def provider(self, registry: Registry) -> str:
        registry.register("plain", register_fn=lambda: install(PlainKernelSet(), "cpu"))
        return "plain"


class IgnoresStrides(PlainKernelSet):
    def load(self, tensor: Tensor) -> Tensor:
        strides = torch.empty(tensor.shape, device="meta").stride()
        return super().load(tensor.as_strided(tensor.shape, strides))


class RoundsAddressesDown(PlainKernelSet):
    """As a load of 16 bytes that drops the last bits of an address."""

    def load(self, tensor: Tensor) -> Tensor:
        offset = tensor.storage_offset() // 8 * 8
        return super().load(tensor.as_strided(tensor.shape, tensor.stride(), offset))


class ReadsBehindTheRows(PlainKernelSet):
    """One row more, with a weight of zero."""

    def load(self, tensor: Tensor) -> Tensor:
        wide = super().load(tensor)
        if tensor.dim() == 4 and tensor.stride(0) > tensor.shape[1] * tensor.stride(1) > 0:
            behind = tensor.as_strided(
                (tensor.shape[0] - 1, 1, *tensor.shape[2:]),
                tensor.stride(),
                tensor.storage_offset() + tensor.shape[1] * tensor.stride(1),
            )
            wide[:-1] += 0.0 * super().load(behind)
        return wide


class ReadsBehindTheHeadDim(PlainKernelSet):
    def load(self, tensor: Tensor) -> Tensor:
        wide = super().load(tensor)
        if tensor.shape[-1] + 8 <= tensor.stride(-2) < 3 * tensor.shape[-1]:
            start = tensor.storage_offset() + tensor.shape[-1]
            wide += 0.0 * super().load(
                tensor.as_strided((*tensor.shape[:-1], 1), tensor.stride(), start)
            )
        return wide


class LeavesRowsWithoutKeysUnwritten(PlainKernelSet):
    def store_out(self, call: Any, out: Tensor) -> Tensor:
        seeing = self.visible(call).any(-1)
        if seeing.all() or call.out is None:
            return super().store_out(call, out)
        whole = self.store(out, like=call.query)
        call.out[..., seeing, :, :] = whole[..., seeing, :, :]
        return call.out


class LeavesKeysWithoutRowsUnwritten(PlainKernelSet):
    """In memory that was NaN before."""

    def store_dk(self, call: Any, dk: Tensor) -> Tensor:
        seen = self.visible(call).any(0)
        whole, memory = super().store_dk(call, dk), torch.full_like(call.key, torch.nan)
        memory[..., seen, :, :] = whole[..., seen, :, :]
        return memory


class WritesBesideOut(PlainKernelSet):
    """Rows of out are as wide as their distance, if they lie apart."""

    def store_out(self, call: Any, out: Tensor) -> Tensor:
        stored = super().store_out(call, out)
        if stored.stride(-2) > stored.shape[-1] and stored.storage_offset():
            start = stored.storage_offset() + stored.shape[-1]
            stored.as_strided((*stored.shape[:-1], 1), stored.stride(), start).zero_()
        return stored


class LetsNanThrough(PlainKernelSet):
    """A weight of zero times NaN is NaN."""

    def product(self, weights: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        return weights @ values


class HidesNan(PlainKernelSet):
    def normalised(self, out: Tensor, total: Tensor) -> Tensor:
        return super().normalised(out, total).nan_to_num()


class TakesTheDefaultForZero(PlainKernelSet):
    def scores(self, call: Any, query: Tensor, key: Tensor) -> Tensor:
        scale = call.scale or query.shape[-1] ** -0.5
        return query @ key.mT * scale

    def dq_of_block(self, call: Any, *operands: Tensor) -> Tensor:
        scale = call.scale or call.query.shape[-1] ** -0.5
        return super().dq_of_block(call._replace(scale=scale), *operands)


class TakesTheSizeOfTheScale(PlainKernelSet):
    """As a kernel that finds the highest score before it multiplies."""

    def scores(self, call: Any, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.mT * abs(call.scale)


class DerivesTheScale(PlainKernelSet):
    def scores(self, call: Any, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.mT * query.shape[-1] ** -0.5


class Overflows(PlainKernelSet):
    """No highest score is taken off."""

    def higher(self, top: Tensor, scores: Tensor) -> Tensor:
        return torch.zeros_like(top)

    def rescale(self, top: Tensor, higher: Tensor) -> Tensor:
        return torch.ones_like(top)


class SharesMemoryBetweenThreads(PlainKernelSet):
    def scores(self, call: Any, query: Tensor, key: Tensor) -> Tensor:
        self.scratch = super().scores(call, query, key)
        time.sleep(1e-3)
        return self.scratch


class SavesForTheBackward(PlainKernelSet):
    """The backward takes what the last forward has left in the object."""

    def forward(self, call: Any) -> tuple[Tensor, Tensor]:
        out, self.saved = super().forward(call)
        return out, self.saved

    def backward(self, call: Any, grad_out: Tensor, out: Tensor, lse: Tensor) -> Any:
        saved = self.saved if self.saved.shape == lse.shape else lse
        return super().backward(call, grad_out, out, saved)


class LogarithmOfTwo(PlainKernelSet):
    """Its lse is in base 2, and its backward takes it so."""

    def lse(self, call: Any, top: Tensor, total: Tensor) -> Tensor:
        return super().lse(call, top, total) / math.log(2)

    def probabilities(self, scores: Tensor, lse: Tensor, visible: Tensor) -> Tensor:
        return super().probabilities(scores, lse * math.log(2), visible)


class CountsEmptySequencesAway(PlainKernelSet):
    """Of sequences that begin at one row it takes the first, which is empty."""

    def same_sequence(self, call: Any) -> Tensor:
        if call.cu_seqlens_query is None:
            return super().same_sequence(call)
        rows, keys = (torch.arange(len(x)) for x in (call.query, call.key))
        first = torch.searchsorted(call.cu_seqlens_query[1:-1], rows, right=False)
        at_start = (rows[:, None] == call.cu_seqlens_query[1:-1]).any(-1)
        same = (first + at_start)[:, None] == _sequence_of(keys, call.cu_seqlens_key[1:-1])
        ends = call.cu_seqlens_query[-1], call.cu_seqlens_key[-1]
        return same & (rows < ends[0])[:, None] & (keys < ends[1])


class ReadsBehindTheLastSequence(PlainKernelSet):
    def same_sequence(self, call: Any) -> Tensor:
        if call.cu_seqlens_query is None:
            return super().same_sequence(call)
        rows, keys = (torch.arange(len(x)) for x in (call.query, call.key))
        of_row, of_key = (
            _sequence_of(places, offsets[1:-1])
            for places, offsets in ((rows, call.cu_seqlens_query), (keys, call.cu_seqlens_key))
        )
        return of_row[:, None] == of_key


FAULTS: dict[type[PlainKernelSet], set[str]] = {
    IgnoresStrides: STRIDES,
    RoundsAddressesDown: {"test_inputs_may_be_misaligned"},
    ReadsBehindTheRows: {"test_padding_behind_the_rows_is_not_read"},
    ReadsBehindTheHeadDim: {
        "test_each_input_may_lie_in_its_own_way",
        "test_padding_behind_the_head_dim_is_not_read",
    },
    LeavesRowsWithoutKeysUnwritten: {
        "test_out_and_lse_are_written_whole",
        "test_rows_without_keys_are_zero",
    },
    LeavesKeysWithoutRowsUnwritten: {
        "test_gradients_are_written_whole",
        "test_rows_without_keys_are_zero",
    },
    WritesBesideOut: {"test_out_may_have_any_strides"},
    LetsNanThrough: {
        "test_keys_after_the_diagonal_may_be_anything",
        "test_keys_outside_of_the_window_may_be_anything",
        "test_packed_neighbours_may_be_anything",
        "test_rows_behind_the_last_packed_sequence_are_not_read",
    },
    HidesNan: {"test_nan_reaches_the_rows_that_see_it"},
    TakesTheDefaultForZero: {
        "test_a_scale_of_zero_averages_what_is_seen",
        "test_a_scale_of_zero_gives_query_and_key_no_gradients",
    },
    TakesTheSizeOfTheScale: {"test_a_negative_scale_is_a_negative_query"},
    DerivesTheScale: {
        "test_a_negative_scale_is_a_negative_query",
        "test_a_scale_is_a_factor_of_the_query",
        "test_a_scale_of_zero_averages_what_is_seen",
        "test_keys_far_below_the_best_have_no_weight",
    },
    Overflows: {"test_large_scores_stay_finite"},
    SharesMemoryBetweenThreads: {"test_threads_do_not_disturb_each_other"},
    SavesForTheBackward: {"test_another_forward_may_come_before_the_backward"},
    LogarithmOfTwo: {"test_torchs_backward_may_follow", "test_torchs_forward_may_precede"},
    CountsEmptySequencesAway: {
        "test_empty_sequences_change_no_other",
        "test_rows_without_keys_are_zero",
    },
    ReadsBehindTheLastSequence: {"test_rows_behind_the_last_packed_sequence_are_not_read"},
}


@pytest.fixture
def run(flash_attention_registry_reset: Registry) -> Callable[[PlainKernelSet], set[str]]:
    """Runs the robustness tests on a kernel set that is active, and names those that fail."""
    registry = flash_attention_registry_reset

    def run_on(kernel_set: PlainKernelSet) -> set[str]:
        registry.register("faulty", register_fn=lambda: install(kernel_set, "cpu"))
        subject = Subject("faulty", kernel_set, torch.device("cpu"))
        return failed(
            outcomes_of(
                RobustnessTests,
                before=lambda: registry.activate("faulty"),
                leave_out="test_compiled_graphs_give_the_same",  # seconds, whatever the fault
                subject=subject,
                registry=registry,
            )
        )

    return run_on


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_the_tests_that_name_it(
    run: Callable[[PlainKernelSet], set[str]], fault: type[PlainKernelSet]
) -> None:
    assert run(fault()) == FAULTS[fault]
