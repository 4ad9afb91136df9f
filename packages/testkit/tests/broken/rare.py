"""Kernel sets that are wrong for few problems alone, as real kernels have been."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from plain_kernel_set import LOWEST, PlainKernelSet
from torch import Tensor

from broken.promises import (
    BACKWARD,
    DV,
    EVERYTHING,
    FORWARD,
    OUT,
    TORCH,
    VALUES_COME_FROM,
    ZERO_SCALE,
    of,
)
from broken.table import found_by
from flash_attention_registry.sdpa import AttentionCall


@found_by(
    *of("*x257-*", EVERYTHING),
    also=(*of("*-1x1x1030-*", EVERYTHING), *of("*-left128-*", EVERYTHING)),
)
class SeesNoKeyBehindThe256th(PlainKernelSet):
    """The number of a key fits in eight bits."""

    def visible(self, call: AttentionCall) -> Tensor:
        keys = torch.arange(call.key.shape[-3], device=call.key.device)
        return super().visible(call) & (keys < 256)


@found_by(*of("*x257-*", EVERYTHING))
class LosesABlockOfOneKey(PlainKernelSet):
    """Behind whole blocks of 128, of which it takes one too few."""

    def key_blocks(self, call: AttentionCall) -> Iterator[slice]:
        keys = call.key.shape[-3]
        blocks = list(super().key_blocks(call))
        yield from blocks[:-1] if keys > 128 and keys % 128 == 1 else blocks


@found_by(*of("*-1x129x257-*", (*OUT, *BACKWARD)))
class LosesABlockOfOneRow(PlainKernelSet):
    """Likewise, of rows."""

    def store(self, wide: Tensor, like: Tensor, into: Tensor | None = None) -> Tensor:
        rows = wide.shape[2]
        if rows > 128 and rows % 128 == 1:
            wide = torch.cat([wide[:, :, :-1], torch.zeros_like(wide[:, :, -1:])], 2)
        return super().store(wide, like, into)


@found_by(*of("*-h3kv1-*", EVERYTHING), *of("*-h6kv2-*", EVERYTHING))
class ThirdHeadOfAGroupReadsTheQueryOfTheSecond(PlainKernelSet):
    def operands(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().operands(call)
        if call.query.shape[-2] == 3 * call.key.shape[-2]:
            query[:, 2::3] = query[:, 1::3]
        return query, key, value


@found_by(
    *of("*-2x*", DV),
    *of("*-4x5x9-*", DV),
    also=("test_sequences_may_be_many[dense]",),
)
class DvOfTheSecondSequenceIsTheFirsts(PlainKernelSet):
    def store_dv(self, call: AttentionCall, dv: Tensor) -> Tensor:
        return super().store_dv(call, dv if len(dv) == 1 else dv[[0, *range(len(dv) - 1)]])


class SubtractsTheLowestScore(PlainKernelSet):
    def higher(self, top: Tensor, scores: Tensor) -> Tensor:
        lowest = scores.masked_fill(scores.isneginf(), torch.inf).amin(-1, keepdim=True)
        lowest = torch.minimum(lowest, top.masked_fill(top == LOWEST, torch.inf))
        return torch.where(lowest.isinf(), top, lowest)


@found_by("test_large_scores_stay_finite[-1.0]")
class TakesTheHighestScoreBeforeTheScale(PlainKernelSet):
    """Times a negative scale that is the lowest one, and large scores overflow."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        kernels = SubtractsTheLowestScore() if call.scale < 0 else super()
        return kernels.forward(call)


@found_by(
    *of("*-2x65x97-h4kv2-*", EVERYTHING),
    *of("*-4x5x9-h16kv2-*", EVERYTHING),
    also=(*TORCH, ZERO_SCALE),
)
class FindsASequencesKeysByTheHeadsOfTheQuery(PlainKernelSet):
    """The batch's stride of the key is computed, and from the wrong number of heads."""

    def operands(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().operands(call)
        batch, heads, kv_heads = len(query), call.query.shape[-2], call.key.shape[-2]
        if heads == kv_heads:
            return query, key, value
        first = torch.arange(batch)[:, None] * heads  # and not kv_heads
        place = (first + torch.arange(heads) * kv_heads // heads) % (batch * kv_heads)
        loaded = (self.load(x).flatten(0, 1)[place] for x in (call.key, call.value))
        return query, *loaded


@found_by(*of("*-d80-*", EVERYTHING))
class DropsTheColumnsBehindWholeVectors(PlainKernelSet):
    """A head_dim of 80 is two vectors of 32 and a rest."""

    def scores(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        width = query.shape[-1] // 32 * 32 or query.shape[-1]
        return super().scores(call, query[..., :width], key[..., :width])


@found_by(
    *of("*-1x150x97-*-causal-*", BACKWARD),
    f"{VALUES_COME_FROM}[causal*]",
    also=(*BACKWARD, "test_gradients_are_written_whole[more rows]"),
)
class BackwardAlignsAtTheTopLeft(PlainKernelSet):
    """Which is the same but for unequal lengths."""

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        more = call.query.shape[-3] - call.key.shape[-3]
        if call.causal and call.cu_seqlens_query is None:
            call = call._replace(causal=False, window_right=more)
        return super().backward(call, grad_out, out, lse)


@found_by(*of("*-1x1x130-h4kv2-*", EVERYTHING))
class TakesHeadsForRowsInTheWrongOrder(PlainKernelSet):
    """The heads of a group where each has one row, as kernels for decoding do."""

    def operands(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().operands(call)
        heads, kv_heads = call.query.shape[-2], call.key.shape[-2]
        if query.shape[2] == 1 and heads > kv_heads > 1:
            rows = query.unflatten(1, (kv_heads, -1))  # [B, Hkv, G, 1, D]
            query = rows.transpose(1, 2).flatten(1, 2)
        return query, key, value


@found_by(*of("fp16-*", OUT), also=of("fp16-*", BACKWARD))
class RoundsToBf16WhateverTheInputs(PlainKernelSet):
    def rounded(self, call: AttentionCall, weights: Tensor) -> Tensor:
        return weights.bfloat16().float()


@found_by("test_longest_lengths_are_bounds")
class AlignsAtTheLongestSequence(PlainKernelSet):
    """Instead of each sequence's own end, by what the longest falls short of what was said."""

    def distance_from_diagonal(self, call: AttentionCall) -> Tensor:
        distance = super().distance_from_diagonal(call)
        if call.cu_seqlens_query is None or call.cu_seqlens_key is None:
            return distance
        short = call.max_seqlen_key - call.cu_seqlens_key.diff().max()
        return distance - short


@found_by("test_inputs_may_be_one_tensor")
class TakesDkForDvWhereKeyIsValue(PlainKernelSet):
    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = super().backward(call, grad_out, out, lse)
        return dq, dk, dk if call.key.data_ptr() == call.value.data_ptr() else dv


# Several blocks of a packed sequence


@found_by(*of("*-varlen-3x5+150x17-*", OUT))
class LosesPackedRowsBehindTheLongestKey(PlainKernelSet):
    """There are as many blocks of rows as the longest sequence has blocks of keys."""

    def store_out(self, call: AttentionCall, out: Tensor) -> Tensor:
        if call.cu_seqlens_query is not None:
            covered = -(-call.max_seqlen_key // 128) * 128
            for first, last in pairwise(call.cu_seqlens_query.tolist()):
                out[:, :, first + covered : max(first + covered, last)] = 0.0
        return super().store_out(call, out)


@found_by(*of("*-varlen-5x3+150x257-*", EVERYTHING))
class SeesOneBlockOfAPackedSequence(PlainKernelSet):
    def same_sequence(self, call: AttentionCall) -> Tensor:
        same = super().same_sequence(call)
        if call.cu_seqlens_key is not None:
            for first, last in pairwise(call.cu_seqlens_key.tolist()):
                same[:, first + 128 : max(first + 128, last)] = False
        return same


@found_by("test_packed_lengths_are_what_the_offsets_hold_now")
class KeepsOffsetsThatItHasSeen(PlainKernelSet):
    """And does not see that other numbers stand there."""

    def __init__(self) -> None:
        self.seen: Tensor | None = None
        self.kept: tuple[Tensor, Tensor] | None = None

    def operands(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        self.schedule(call)
        return super().operands(call)

    def schedule(self, call: AttentionCall) -> None:
        edges = call.cu_seqlens_query, call.cu_seqlens_key
        if edges[0] is not None and edges[1] is not None and edges[0] is not self.seen:
            self.seen, self.kept = edges[0], (edges[0].clone(), edges[1].clone())

    def visible(self, call: AttentionCall) -> Tensor:
        if call.cu_seqlens_query is not None and self.kept is not None:
            call = call._replace(cu_seqlens_query=self.kept[0], cu_seqlens_key=self.kept[1])
        return super().visible(call)


# Others


@found_by(*of("*-1x33x65-h6kv2-*", EVERYTHING), *of("*-h16kv2-*", EVERYTHING))
class TakesAGroupForAPowerOfTwo(PlainKernelSet):
    """Three heads fill four places, and the next group begins behind them."""

    def operands(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().operands(call)
        if query.shape[1] > 3 * call.key.shape[-2] - 1 > 3:
            place = torch.arange(query.shape[1]) // 4 * 3
            key, value = key[:, place], value[:, place]
        return query, key, value


@found_by(*of("*-causal-scale-0.2-*", FORWARD))
class MasksBeforeTheScale(PlainKernelSet):
    """Minus infinity times a negative scale is infinity."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        kernels = _MasksBeforeTheScale(call.scale) if call.causal and call.scale < 0 else super()
        return kernels.forward(call)


class _MasksBeforeTheScale(PlainKernelSet):
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def scores(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.mT

    def masked(self, scores: Tensor, visible: Tensor) -> Tensor:
        return super().masked(scores, visible) * self.scale


@found_by("test_keys_far_below_the_best_have_no_weight")
class WeighsWhatIsFarBelow(PlainKernelSet):
    """The exponent is computed by hand, and not clamped: it wraps around."""

    def weights(self, scores: Tensor, top: Tensor) -> Tensor:
        below = scores - top
        return below.exp().masked_fill((below < -88) & scores.isfinite(), 0.5)
