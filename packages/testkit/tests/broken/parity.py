"""Kernel sets that compute something else than attention."""

from __future__ import annotations

import math
from weakref import ref

import torch
import torch.nn.functional as F
from plain_kernel_set import PlainKernelSet, _sequence_of
from torch import Tensor

from broken.promises import (
    BACKWARD,
    DK,
    DQ,
    DV,
    EMPTY_ROWS,
    EVERYTHING,
    FORWARD,
    LSE,
    MASKS,
    NEGATIVE_SCALE,
    NEIGHBOURS,
    OTHER_CALLS,
    OUT,
    OUTSIDE,
    ROWS_SEE,
    SCALE,
    SCALE_IS_A_FACTOR,
    SCALE_OF_BACKWARD,
    TORCH,
    VALUES_COME_FROM,
    WINDOWS,
    ZERO_SCALE,
    of,
)
from broken.table import found_by
from flash_attention_registry.sdpa import AttentionCall


def is_masked(call: AttentionCall) -> bool:
    """Whether a call hides any key by a mask."""
    return call.causal or call.window_left is not None or call.window_right is not None


# The forward


@found_by(*FORWARD, also=BACKWARD)
class ScaleIsOnePercentOff(PlainKernelSet):
    def scores(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        return super().scores(call, query, key) * 1.01


@found_by(*FORWARD, also=TORCH, perhaps=OTHER_CALLS)
class ForgetsToRescale(PlainKernelSet):
    def rescale(self, top: Tensor, higher: Tensor) -> Tensor:
        return torch.ones_like(top)


@found_by(*FORWARD, also=(*TORCH, ZERO_SCALE))
class SeesKeysBehindTheLast(PlainKernelSet):
    """Zeros, which nothing hides where there is no mask."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        if call.key.dim() == 4 and not is_masked(call):
            more = (0, 0, 0, 0, 0, -call.key.shape[1] % self.key_block)
            call = call._replace(key=F.pad(call.key, more), value=F.pad(call.value, more))
        return super().forward(call)


@found_by(*OUT)
class SumsInTheInputsDtype(PlainKernelSet):
    def accumulated(self, call: AttentionCall, out: Tensor, block: Tensor) -> Tensor:
        return self.rounded(call, super().accumulated(call, out, block))


@found_by("test_large_scores_stay_finite", also=of("*-peaked", OUT), perhaps=OUT)
class SubtractsNoMaximum(PlainKernelSet):
    def higher(self, top: Tensor, scores: Tensor) -> Tensor:
        return torch.zeros_like(top)


@found_by(
    *FORWARD,
    also=(
        *EMPTY_ROWS,
        ROWS_SEE,
        "test_gradients_are_written_whole",
        "test_rows_without_keys_are_zero",
    ),
    perhaps=OTHER_CALLS,
)
class IsNotANumberWhereTheFirstBlockIsHidden(PlainKernelSet):
    """Minus infinity less minus infinity."""

    def higher(self, top: Tensor, scores: Tensor) -> Tensor:
        return super().higher(top.masked_fill(top < -1e30, -torch.inf), scores)


@found_by(
    *EMPTY_ROWS,
    *of("*-masked-rows", FORWARD),
    "test_rows_without_keys_are_zero",
    also=(
        *FORWARD,
        f"{ROWS_SEE}[*-more rows]",
        f"{ROWS_SEE}[*-packed]",
        f"{WINDOWS}[*-more-rows-*]",
        "test_causal_is_aligned_to_the_last_row_and_key[more-rows-*]",
    ),
)
class AveragesAllWhereNothingIsSeen(PlainKernelSet):
    """As a large negative number in place of minus infinity does."""

    def masked(self, scores: Tensor, visible: Tensor) -> Tensor:
        return scores.masked_fill(~visible, -1e30)


@found_by(*LSE, also=TORCH)
class LseInBaseTwo(PlainKernelSet):
    def lse(self, call: AttentionCall, top: Tensor, total: Tensor) -> Tensor:
        return super().lse(call, top, total) / math.log(2)


@found_by(
    *LSE,
    also=(
        *TORCH,
        *EMPTY_ROWS,
        "test_gradients_are_written_whole[more rows]",
        "test_large_scores_stay_finite",
    ),
)
class LseWithRowsFirst(PlainKernelSet):
    """In memory, read as if heads were: of dense batches."""

    def store_lse(self, call: AttentionCall, lse: Tensor) -> Tensor:
        lse = super().store_lse(call, lse)
        return lse if lse.dim() == 2 else lse.mT.contiguous().view(lse.shape)


@found_by(
    *LSE,
    also=(
        *TORCH,
        SCALE,
        NEGATIVE_SCALE,
        SCALE_IS_A_FACTOR,
        "test_large_scores_stay_finite[-1.0]",
    ),
)
class LseOfUnscaledScores(PlainKernelSet):
    def lse(self, call: AttentionCall, top: Tensor, total: Tensor) -> Tensor:
        return super().lse(call, top / (call.scale or 1.0), total)


# Masks


@found_by(
    *of("causal-*", MASKS),
    "test_causal_is_aligned_to_the_last_row_and_key",
    *of("*-causal-*", EVERYTHING),
    also=(*EMPTY_ROWS, *MASKS, WINDOWS, *EVERYTHING),
)
class AlignsAtTheTopLeft(PlainKernelSet):
    def distance_from_diagonal(self, call: AttentionCall) -> Tensor:
        if call.cu_seqlens_query is None:
            return super().distance_from_diagonal(call) + call.key.shape[1] - call.query.shape[1]
        more = call.cu_seqlens_key.diff() - call.cu_seqlens_query.diff()
        rows = torch.arange(len(call.query), device=call.query.device)
        sequences = _sequence_of(rows, call.cu_seqlens_query[1:-1])
        return super().distance_from_diagonal(call) + more[sequences][:, None]


@found_by(*MASKS, WINDOWS, *of("*-left*", EVERYTHING), also=(OUTSIDE,))
class WindowIsOneKeyTooWideOnTheLeft(PlainKernelSet):
    def visible(self, call: AttentionCall) -> Tensor:
        left = call.window_left
        return super().visible(call._replace(window_left=None if left is None else left + 1))


@found_by(*MASKS, WINDOWS, *of("*-right*", EVERYTHING))
class WindowIsOneKeyTooNarrowOnTheRight(PlainKernelSet):
    def visible(self, call: AttentionCall) -> Tensor:
        right = call.window_right
        return super().visible(call._replace(window_right=None if right is None else right - 1))


@found_by(
    VALUES_COME_FROM,
    *of("*-left*", BACKWARD),
    *of("*-right*", BACKWARD),
    also=(OUTSIDE, "test_masks_are_of_this_call[window]"),
)
class BackwardKnowsNoWindow(PlainKernelSet):
    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = call._replace(window_left=None, window_right=None)
        return super().backward(call, grad_out, out, lse)


@found_by(
    *of("*-packed", MASKS),
    *of("*-varlen-*", EVERYTHING),
    NEIGHBOURS,
    also=(
        *of("*-packed, one row each", MASKS),
        "test_sequences_may_be_many[packed]",
        f"{WINDOWS}[*-packed]",
        "test_causal_hides_the_keys_after_the_diagonal[*packed]",
        "test_causal_is_aligned_to_the_last_row_and_key[*-packed]",
        "test_rows_behind_the_last_packed_sequence_are_not_read",
        "test_rows_without_keys_are_zero",
        "test_without_a_mask_every_key_is_seen[*-packed]",
    ),
)
class PackedSequencesSeeEachOther(PlainKernelSet):
    def same_sequence(self, call: AttentionCall) -> Tensor:
        return torch.ones_like(super().same_sequence(call))


# Heads and batches


@found_by(*of("*-h4kv2-*", EVERYTHING), *of("*-h6kv2-*", EVERYTHING), *of("*-h16kv2-*", EVERYTHING))
class HeadsOfAGroupLieApart(PlainKernelSet):
    """Query head h reads key head h % Hkv."""

    def operands(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        group = call.query.shape[-2] // call.key.shape[-2]
        key, value = (self.load(x).repeat(1, group, 1, 1) for x in (call.key, call.value))
        return self.load(call.query), key, value


@found_by(
    *of("*-h4kv2-*", (*DK, *DV)),
    *of("*-h3kv1-*", (*DK, *DV)),
    *of("*-h6kv2-*", (*DK, *DV)),
    *of("*-h16kv2-*", (*DK, *DV)),
)
class LastHeadOfAGroupAloneGivesGradients(PlainKernelSet):
    def sum_of_group(self, call: AttentionCall, grad: Tensor) -> Tensor:
        return grad.unflatten(1, (call.key.shape[-2], -1))[:, :, -1]


@found_by(*of("*-2x*", OUT), *of("*-4x5x9-*", OUT), also=(*TORCH, ZERO_SCALE))
class AllSequencesHaveTheFirstValues(PlainKernelSet):
    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        value = call.value
        if value.dim() == 4:
            call = call._replace(value=value[:1].expand_as(value))
        return super().forward(call)


# The backward


@found_by(
    *DV,
    also=(VALUES_COME_FROM, "test_rows_behind_the_last_packed_sequence_are_not_read"),
    perhaps=OTHER_CALLS,
)
class LosesTheLastRowsOfDv(PlainKernelSet):
    """Those that fill no block of 32."""

    def dv_of_block(self, weights: Tensor, grad_out: Tensor, visible: Tensor) -> Tensor:
        whole = grad_out.shape[2] // 32 * 32
        return super().dv_of_block(weights[:, :, :whole], grad_out[:, :, :whole], visible[:whole])


@found_by(*DQ, also=(SCALE_OF_BACKWARD, NEGATIVE_SCALE, SCALE_IS_A_FACTOR))
class ScalesDqTwice(PlainKernelSet):
    def store_dq(self, call: AttentionCall, dq: Tensor) -> Tensor:
        return super().store_dq(call, dq * call.scale)


@found_by(*DK, also=(SCALE_OF_BACKWARD, NEGATIVE_SCALE, SCALE_IS_A_FACTOR), perhaps=OTHER_CALLS)
class ForgetsTheScaleOfDk(PlainKernelSet):
    def store_dk(self, call: AttentionCall, dk: Tensor) -> Tensor:
        return super().store_dk(call, dk / (call.scale or 1.0))


@found_by(*DQ, *DK)
class ForgetsTheDelta(PlainKernelSet):
    def delta(self, grad_out: Tensor, out: Tensor) -> Tensor:
        return torch.zeros_like(super().delta(grad_out, out))


@found_by(
    *DQ,
    also=("test_rows_behind_the_last_packed_sequence_are_not_read",),
    perhaps=OTHER_CALLS,
)
class LosesTheLastBlockOfDq(PlainKernelSet):
    """Where it is no whole one."""

    def dq_of_block(
        self, call: AttentionCall, grad_scores: Tensor, key: Tensor, visible: Tensor
    ) -> Tensor:
        dq = super().dq_of_block(call, grad_scores, key, visible)
        return dq if key.shape[2] == self.key_block else torch.zeros_like(dq)


# Repeats


class Race(PlainKernelSet):
    """Loses a block in one of 50 calls in a row with the same tensors.

    That others run into it too is what makes a race hard to find, and would blur the picture here.
    """

    def __init__(self) -> None:
        self.last, self.calls = ref(self), 0

    def repeats(self, query: Tensor) -> bool:
        if self.last() is not query:
            self.last, self.calls = ref(query), 0
        self.calls += 1
        return self.calls % 50 == 0


@found_by("test_forward_repeats_bit_for_bit")
class LosesABlockOnceIn50Calls(Race):
    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        if self.repeats(call.query) and call.cu_seqlens_key is None:
            half = call.key.shape[1] // 2
            call = call._replace(key=call.key[:, half:], value=call.value[:, half:])
        return super().forward(call)


@found_by("test_gradients_repeat")
class LosesARowOfDqOnceIn50Calls(Race):
    def store_dq(self, call: AttentionCall, dq: Tensor) -> Tensor:
        grad = super().store_dq(call, dq)
        if self.repeats(call.query):
            grad[..., 0, :, :] = 0.0
        return grad


@found_by("test_gradients_repeat")
class AddsToDqInAnyOrder(PlainKernelSet):
    """As atomic additions do, though determinism is declared: its last bits are as it happens.

    By so much that some of a few hundred elements cross a boundary between numbers of bfloat16,
    whatever the inputs, and by too little to be wrong.
    """

    def store_dq(self, call: AttentionCall, dq: Tensor) -> Tensor:
        return super().store_dq(call, dq * (1 + 3e-5 * torch.randn_like(dq)))


# Sizes that few calls have


@found_by(*of("*-left128-*", EVERYTHING))
class WindowEndsWithTheSecondBlock(PlainKernelSet):
    """Of keys to the left."""

    def visible(self, call: AttentionCall) -> Tensor:
        left = call.window_left
        return super().visible(call._replace(window_left=left and min(left, 100)))


@found_by(*of("*left*-one row", MASKS), *of("*window-one row", MASKS))
class OneRowKnowsNoWindow(PlainKernelSet):
    """As kernels for decoding, which have a way of their own."""

    def visible(self, call: AttentionCall) -> Tensor:
        one = call.query.shape[-3] == 1
        return super().visible(call._replace(window_left=None) if one else call)


@found_by(*of("*-h16kv2-*", OUT), *of("*-h12kv12-*", OUT))
class LosesTheHeadsBehindTheEighth(PlainKernelSet):
    def store_out(self, call: AttentionCall, out: Tensor) -> Tensor:
        out[:, 8:] = 0.0
        return super().store_out(call, out)


@found_by(*of("*-varlen-*-h16kv2-*", (*DK, *DV)))
class LosesTheThirdOfAPackedGroup(PlainKernelSet):
    def sum_of_group(self, call: AttentionCall, grad: Tensor) -> Tensor:
        of_heads = grad.unflatten(1, (call.key.shape[-2], -1))
        packed = call.cu_seqlens_query is not None
        return (of_heads[:, :, :2] if packed else of_heads).sum(2)


@found_by(*of("*-1x300x65-*", OUT))
class LosesTheRowsBehindThe256th(PlainKernelSet):
    """The number of a row fits in eight bits."""

    def store_out(self, call: AttentionCall, out: Tensor) -> Tensor:
        out[:, :, 256:] = 0.0
        return super().store_out(call, out)


@found_by(*of("*-1x1x1030-*", EVERYTHING))
class SeesNoKeyBehindThe512th(PlainKernelSet):
    def visible(self, call: AttentionCall) -> Tensor:
        visible = super().visible(call)
        visible[:, 512:] = False
        return visible


@found_by("test_sequences_may_be_many[packed]")
class LosesTheSequencesBehindThe32nd(PlainKernelSet):
    """As many as a warp has threads."""

    def store_out(self, call: AttentionCall, out: Tensor) -> Tensor:
        edges = call.cu_seqlens_query
        if edges is not None and len(edges) > 33:
            out[:, :, int(edges[32]) :] = 0.0
        return super().store_out(call, out)
