"""Kernel sets that are right where nothing is special, and only there."""

from __future__ import annotations

import threading
import time
from typing import Any
from weakref import ref

import torch
from plain_kernel_set import PlainKernelSet
from torch import Tensor

from broken.promises import EVERYTHING, OUT, ROWS_SEE, of
from broken.table import found_by
from flash_attention_registry.sdpa import AttentionCall

STRIDES = (
    "test_heads_may_lie_outside_of_rows",
    "test_batch_may_lie_inside_of_rows",
    "test_inputs_may_be_slices_of_one_projection",
    "test_packed_inputs_may_be_slices_of_one_projection",
    "test_rows_may_be_apart_by_odd_numbers_of_elements",
)

# Memory


@found_by(
    *STRIDES,
    *of("*-BHSD-*", EVERYTHING),
    *of("*-packed-QKV-slice-*", EVERYTHING),
    also=(
        "test_each_input_may_lie_in_its_own_way",
        "test_grad_out_may_be_expanded",
        "test_gradients_do_not_depend_on_how_grad_out_lies",
        "test_inputs_may_be_expanded",
        "test_padding_behind_the_head_dim_is_not_read",
        "test_padding_behind_the_rows_is_not_read",
    ),
)
class TakesItsInputsForContiguous(PlainKernelSet):
    def load(self, tensor: Tensor) -> Tensor:
        last = tensor.storage_offset() + tensor.numel()
        if last * tensor.element_size() > tensor.untyped_storage().nbytes():
            return super().load(tensor)  # nothing lies there that could be read
        strides = torch.empty(tensor.shape, device="meta").stride()
        return super().load(tensor.as_strided(tensor.shape, strides))


@found_by("test_inputs_may_be_misaligned")
class DropsTheLastBitsOfAnAddress(PlainKernelSet):
    """As a load of 16 bytes may."""

    def load(self, tensor: Tensor) -> Tensor:
        start = tensor.storage_offset() // 8 * 8
        return super().load(tensor.as_strided(tensor.shape, tensor.stride(), start))


@found_by("test_padding_behind_the_rows_is_not_read")
class ReadsPaddingWithAWeightOfZero(PlainKernelSet):
    def load(self, tensor: Tensor) -> Tensor:
        wide = super().load(tensor)
        if tensor.dim() == 4 and tensor.stride(0) > tensor.shape[1] * tensor.stride(1) > 0:
            behind = tensor.storage_offset() + tensor.shape[1] * tensor.stride(1)
            shape = tensor.shape[0] - 1, 1, *tensor.shape[2:]
            wide[:-1] += 0.0 * super().load(tensor.as_strided(shape, tensor.stride(), behind))
        return wide


@found_by(
    "test_out_and_lse_are_written_whole",
    "test_rows_without_keys_are_zero",
    also=(
        *of("*-masked-rows", OUT),
        *OUT,
        ROWS_SEE,
        "test_rows_without_keys_read_as_torchs[in-place*]",
    ),
)
class LeavesStaleRowsInOut(PlainKernelSet):
    """Those that see no key; where memory is not NaN, which may be luck, they are right."""

    def store_out(self, call: AttentionCall, out: Tensor) -> Tensor:
        if call.out is None or not call.out.isnan().all():
            return super().store_out(call, out)
        seeing = self.visible(call).any(-1)[:, None, None]
        whole = super().store_out(call._replace(out=None), out)
        return call.out.copy_(torch.where(seeing, whole, call.out))


@found_by("test_gradients_are_written_whole")
class LeavesStaleRowsInDk(PlainKernelSet):
    """Those of keys that no row sees; likewise."""

    def store_dk(self, call: AttentionCall, dk: Tensor) -> Tensor:
        dk, memory = super().store_dk(call, dk), torch.empty_like(call.key)
        seen = self.visible(call).any(0)[:, None, None]
        return torch.where(seen, dk, memory) if memory.isnan().all() else dk


@found_by("test_out_may_have_any_strides", "test_given_out_is_written_as_it_lies[in wider rows]")
class WritesBesideOut(PlainKernelSet):
    """One column, where rows lie apart."""

    def store_out(self, call: AttentionCall, out: Tensor) -> Tensor:
        stored = super().store_out(call, out)
        if min(stored.stride()[:-1]) > stored.shape[-1]:
            beside = stored.storage_offset() + stored.shape[-1]
            stored.as_strided((*stored.shape[:-1], 1), stored.stride(), beside).zero_()
        return stored


@found_by("test_empty_sequences_change_no_other")
class EndsWhereTwoSequencesAreEmpty(PlainKernelSet):
    def same_sequence(self, call: AttentionCall) -> Tensor:
        same, edges = super().same_sequence(call), call.cu_seqlens_query
        if edges is not None:
            ends = edges[2:][(edges[2:] == edges[:-2])].tolist()
            same[next((end for end in ends if end), len(same)) :] = False
        return same


# Numbers


@found_by(
    "test_keys_after_the_diagonal_may_be_anything",
    "test_keys_outside_of_the_window_may_be_anything",
    "test_packed_neighbours_may_be_anything",
    "test_rows_behind_the_last_packed_sequence_are_not_read",
)
class LetsNanThroughTheMask(PlainKernelSet):
    """Zero times NaN is NaN."""

    def product(self, weights: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        return weights @ values


@found_by("test_nan_reaches_the_rows_that_see_it")
class HidesNan(PlainKernelSet):
    def load(self, tensor: Tensor) -> Tensor:
        return super().load(tensor).nan_to_num()


@found_by("test_large_scores_stay_finite")
class OverflowsBeforeTheScale(PlainKernelSet):
    """Products of query and key do not fit in half precision, though the scores would."""

    def scores(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        products = query @ key.mT
        return products.masked_fill(products.abs() > 65504, torch.inf) * call.scale


# Threads, calls before and after


@found_by("test_threads_do_not_disturb_each_other")
class KeepsItsCallInItself(PlainKernelSet):
    call: AttentionCall

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        self.call = call
        time.sleep(0.001)
        return super().forward(self.call)


@found_by("test_results_are_of_what_the_inputs_hold_now")
class KeepsKeysThatItHasSeen(PlainKernelSet):
    """And does not see that other numbers lie there."""

    def __init__(self) -> None:
        self.seen, self.kept = ref(self), None

    def operands(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().operands(call)
        if self.seen() is call.key:
            return query, self.kept, value
        self.seen, self.kept = ref(call.key), key
        return query, key, value


@found_by("test_another_forward_may_come_before_the_backward")
class BackwardUsesWhatTheLastForwardHasLeft(PlainKernelSet):
    def __init__(self) -> None:
        self.left = threading.local()

    def lse(self, call: AttentionCall, top: Tensor, total: Tensor) -> Tensor:
        self.left.lse = super().lse(call, top, total)
        return self.left.lse

    def backward(self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> Any:
        return super().backward(call, grad_out, out, self.left.__dict__.pop("lse", lse))


@found_by("test_inference_mode_gives_the_same_out")
class CountsVersionsOfOut(PlainKernelSet):
    """Which tensors that were made in inference mode do not have."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(call)
        assert out._version >= 0
        return out, lse


@found_by("test_each_input_may_lie_in_its_own_way")
class ReadsValueByTheStridesOfKey(PlainKernelSet):
    def operands(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        value, strides = call.value, call.key.stride()
        steps = zip(value.shape, strides, strict=True)
        last = value.storage_offset() + sum((size - 1) * step for size, step in steps)
        if (last + 1) * value.element_size() <= value.untyped_storage().nbytes():
            call = call._replace(value=value.as_strided(value.shape, strides))
        return super().operands(call)


@found_by("test_masks_are_of_this_call", "test_packed_sequences_are_of_this_call")
class KeepsMasksByShape(PlainKernelSet):
    def __init__(self) -> None:
        self.kept: dict[Any, Tensor] = {}

    def visible(self, call: AttentionCall) -> Tensor:
        edges = call.cu_seqlens_query
        shapes = call.query.shape, call.key.shape, None if edges is None else len(edges)
        if shapes not in self.kept:
            self.kept[shapes] = super().visible(call)
        return self.kept[shapes]
