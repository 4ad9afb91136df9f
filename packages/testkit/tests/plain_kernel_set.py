"""A correct kernel set in plain torch that goes block by block over the keys, as a kernel does.

Every step is a method, so that a test can plant one fault by overriding one of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flash_attention_registry.sdpa import AttentionCall, Capabilities

LOWEST = torch.finfo(torch.float32).min
"""Below every score, and finite: the difference of two of them is 0, not NaN."""


class PlainKernelSet:
    """Dense and packed attention, masked and grouped, on CPU and CUDA tensors of any strides.

    Rounds where kernels round: sums are float32, P and dS meet the next product in the inputs'
    dtype. Asks the device nothing, so that a CUDA graph can hold it; keeps nothing between calls.

    In what follows B is the batch, 1 for packed sequences, which are one row of keys in which each
    query sees its own sequence; S is all of their rows then. Operands and sums are float32
    `[B, H, S, D]`, with as many heads for all.
    """

    name = "plain"
    key_block = 64
    capabilities = Capabilities(
        device_types=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({torch.bfloat16, torch.float16, torch.float32}),
        head_dims=(8, 32, 40, 64, 80, 128),
        features=frozenset({"backward", "causal", "gqa", "varlen", "window"}),
        deterministic="always",
    )

    def supports(self, call: AttentionCall) -> str | None:
        """None if the call is served, else why not."""
        return self.capabilities.reason_to_decline(call)

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Out and lse, by an online softmax over the blocks of keys."""
        query, key, value = self.operands(call)
        visible = self.visible(call)
        top = query.new_full((*query.shape[:-1], 1), LOWEST)
        total, out = torch.zeros_like(top), torch.zeros_like(query)
        for keys in self.key_blocks(call):
            scores = self.scores(call, query, key[..., keys, :])
            scores = self.masked(scores, visible[:, keys])
            higher = self.higher(top, scores)
            weights = self.weights(scores, higher)
            rescale = self.rescale(top, higher)
            total = total * rescale + weights.sum(-1, keepdim=True)
            weights = self.rounded(call, weights)
            block = self.product(weights, value[..., keys, :], visible[:, keys])
            out = self.accumulated(call, out * rescale, block)
            top = higher
        out = self.normalised(out, total)
        return self.store_out(call, out), self.store_lse(call, self.lse(call, top, total))

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, block of keys by block of keys."""
        query, key, value = self.operands(call)
        visible = self.visible(call)
        grad_out, out = self.load(grad_out), self.load(out)
        lse = lse.reshape(*query.shape[:-1], 1)
        delta = self.delta(grad_out, out)
        dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for keys in self.key_blocks(call):
            seen, one_key, one_value = visible[:, keys], key[..., keys, :], value[..., keys, :]
            scores = self.masked(self.scores(call, query, one_key), seen)
            weights = self.probabilities(scores, lse, seen)
            grad_scores = self.grad_scores(weights, grad_out @ one_value.mT, delta, seen)
            weights, grad_scores = self.rounded(call, weights), self.rounded(call, grad_scores)
            dq += self.dq_of_block(call, grad_scores, one_key, seen)
            dk[..., keys, :] = self.dk_of_block(call, grad_scores, query, seen)
            dv[..., keys, :] = self.dv_of_block(weights, grad_out, seen)
        return (
            self.store_dq(call, dq),
            self.store_dk(call, self.sum_of_group(call, dk)),
            self.store_dv(call, self.sum_of_group(call, dv)),
        )

    # Reading

    def operands(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each key head once for every query head that reads it."""
        group = call.query.shape[-2] // call.key.shape[-2]
        key, value = (self.load(x).repeat_interleave(group, 1) for x in (call.key, call.value))
        return self.load(call.query), key, value

    def load(self, tensor: Tensor) -> Tensor:
        """`[B, S, H, D]` or `[T, H, D]` of any strides as fresh float32 `[B, H, S, D]`."""
        wide = (tensor if tensor.dim() == 4 else tensor[None]).transpose(1, 2)
        return torch.empty(wide.shape, dtype=torch.float32, device=wide.device).copy_(wide)

    def key_blocks(self, call: AttentionCall) -> Iterator[slice]:
        """The blocks of keys, in the order in which they are visited."""
        for first in range(0, call.key.shape[-3], self.key_block):
            yield slice(first, first + self.key_block)

    def visible(self, call: AttentionCall) -> Tensor:
        """Which keys each query sees: bool `[Sq, Sk]`."""
        distance = self.distance_from_diagonal(call)
        visible = self.same_sequence(call)
        if call.causal:
            visible = visible & (distance <= 0)
        if call.window_left is not None:
            visible = visible & (distance >= -call.window_left)
        if call.window_right is not None:
            visible = visible & (distance <= call.window_right)
        return visible

    def distance_from_diagonal(self, call: AttentionCall) -> Tensor:
        """How far behind its query's diagonal each key lies; ends are aligned: `[Sq, Sk]`."""
        rows, keys = _places(call)
        if call.cu_seqlens_query is None or call.cu_seqlens_key is None:
            diagonal = rows - len(rows) + len(keys)
        else:
            # Rows behind the last sequence count as its own here; they see nothing.
            end = _sequence_of(rows, call.cu_seqlens_query[1:-1]) + 1
            diagonal = rows - call.cu_seqlens_query[end] + call.cu_seqlens_key[end]
        return keys - diagonal[:, None]

    def same_sequence(self, call: AttentionCall) -> Tensor:
        """Whether a key is of its query's sequence: `[Sq, Sk]`."""
        rows, keys = _places(call)
        if call.cu_seqlens_query is None or call.cu_seqlens_key is None:
            return torch.ones(len(rows), len(keys), dtype=torch.bool, device=rows.device)
        same = _sequence_of(rows, call.cu_seqlens_query[1:-1])[:, None] == _sequence_of(
            keys, call.cu_seqlens_key[1:-1]
        )
        ends = call.cu_seqlens_query[-1], call.cu_seqlens_key[-1]
        return same & (rows < ends[0])[:, None] & (keys < ends[1])

    # Forward

    def scores(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        """Scaled scores of one block: `[B, H, Sq, N]`."""
        return query @ key.mT * call.scale

    def masked(self, scores: Tensor, visible: Tensor) -> Tensor:
        """Scores of unseen keys are -inf."""
        return scores.masked_fill(~visible, -torch.inf)

    def higher(self, top: Tensor, scores: Tensor) -> Tensor:
        """The highest score of each row up to this block: `[B, H, Sq, 1]`."""
        return torch.maximum(top, scores.amax(-1, keepdim=True))

    def weights(self, scores: Tensor, top: Tensor) -> Tensor:
        """P, not normalised: the highest score has weight 1."""
        return (scores - top).exp()

    def rescale(self, top: Tensor, higher: Tensor) -> Tensor:
        """What sums up to the last block are worth under the new highest score."""
        return (top - higher).exp()

    def rounded(self, call: AttentionCall, weights: Tensor) -> Tensor:
        """P or dS as it meets the next matrix product."""
        return weights.to(call.query.dtype).float()

    def product(self, weights: Tensor, values: Tensor, visible: Tensor) -> Tensor:
        """`weights @ values`; what is NaN or Inf reaches who sees it, and no other.

        Args:
            weights: `[B, H, M, N]`, 0 where not visible.
            values: `[B, H, N, D]`.
            visible: bool `[M, N]`.
        """
        finite = values.isfinite()
        if not values.is_cuda and finite.all():  # a graph cannot ask a GPU
            return weights @ values
        spoilt = visible.float() @ (~finite).float() > 0
        return (weights @ values.where(finite, 0.0)).masked_fill(spoilt, torch.nan)

    def accumulated(self, call: AttentionCall, out: Tensor, block: Tensor) -> Tensor:
        """Out up to the last block and what this one adds, both under its highest score."""
        return out + block

    def normalised(self, out: Tensor, total: Tensor) -> Tensor:
        """Out; 0 in rows without keys."""
        return out / total.masked_fill(total == 0, 1.0)

    def lse(self, call: AttentionCall, top: Tensor, total: Tensor) -> Tensor:
        """Natural logarithm of the sum of exponentiated scores: `[B, H, Sq, 1]`."""
        return (top + total.log()).masked_fill(total == 0, call.lse_of_empty_rows)

    # Backward

    def delta(self, grad_out: Tensor, out: Tensor) -> Tensor:
        """`[B, H, Sq, 1]`."""
        return (grad_out * out).sum(-1, keepdim=True)

    def probabilities(self, scores: Tensor, lse: Tensor, visible: Tensor) -> Tensor:
        """P, normalised, from what the forward has left: `[B, H, Sq, N]`."""
        return (scores - lse).exp().masked_fill(~visible, 0.0)

    def grad_scores(
        self, weights: Tensor, grad_weights: Tensor, delta: Tensor, visible: Tensor
    ) -> Tensor:
        """The gradient dS of the scaled scores: `[B, H, Sq, N]`."""
        return (weights * (grad_weights - delta)).masked_fill(~visible, 0.0)

    def dq_of_block(
        self, call: AttentionCall, grad_scores: Tensor, key: Tensor, visible: Tensor
    ) -> Tensor:
        """What one block of keys adds to dq: `[B, H, Sq, D]`."""
        return self.product(grad_scores, key, visible) * call.scale

    def dk_of_block(
        self, call: AttentionCall, grad_scores: Tensor, query: Tensor, visible: Tensor
    ) -> Tensor:
        """dk of one block of keys: `[B, H, N, D]`, of every query head."""
        return self.product(grad_scores.mT, query, visible.mT) * call.scale

    def dv_of_block(self, weights: Tensor, grad_out: Tensor, visible: Tensor) -> Tensor:
        """dv of one block of keys: `[B, H, N, D]`, of every query head."""
        return self.product(weights.mT, grad_out, visible.mT)

    def sum_of_group(self, call: AttentionCall, grad: Tensor) -> Tensor:
        """Summed over the query heads that read a key head: `[B, Hkv, Sk, D]`."""
        return grad.unflatten(1, (call.key.shape[-2], -1)).sum(2)

    # Writing

    def store_out(self, call: AttentionCall, out: Tensor) -> Tensor:
        """Out, in the caller's tensor where there is one."""
        return self.store(out, like=call.query, into=call.out)

    def store_lse(self, call: AttentionCall, lse: Tensor) -> Tensor:
        """`[B, Hq, Sq]`, or `[Hq, Tq]` of packed sequences."""
        lse = lse.squeeze(-1)
        return lse if call.cu_seqlens_query is None else lse[0]

    def store_dq(self, call: AttentionCall, dq: Tensor) -> Tensor:
        """As the query."""
        return self.store(dq, like=call.query)

    def store_dk(self, call: AttentionCall, dk: Tensor) -> Tensor:
        """As the key."""
        return self.store(dk, like=call.key)

    def store_dv(self, call: AttentionCall, dv: Tensor) -> Tensor:
        """As the value."""
        return self.store(dv, like=call.value)

    def store(self, wide: Tensor, like: Tensor, into: Tensor | None = None) -> Tensor:
        """Float32 `[B, H, S, D]` rounded to the dtype, in the shape of `like`."""
        target = like.new_empty(like.shape) if into is None else into
        rows_first = wide.transpose(1, 2)
        return target.copy_(rows_first if like.dim() == 4 else rows_first[0])


class PlainHeadsFirst(PlainKernelSet):
    """With the shortcut for SDPA's layout, of two steps."""

    def forward_heads_first(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        causal: bool,
        lse_of_empty_rows: float,
    ) -> str | None:
        """Write out and lse of tensors `[B, H, S, D]`, or say why not."""
        q, k, v, target = (x.transpose(1, 2) for x in (query, key, value, out))
        call = AttentionCall(
            q, k, v, scale, causal, out=target, lse_of_empty_rows=lse_of_empty_rows
        )
        reason = self.shortcut_declines(call)
        if reason is None:
            lse.copy_(self.shortcut_runs(call)[1].view(lse.shape))
        return reason

    def shortcut_declines(self, call: AttentionCall) -> str | None:
        """None if the shortcut serves the call, else why not."""
        return self.supports(call)

    def shortcut_runs(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Out, written to the call's, and lse."""
        return self.forward(call)


def _places(call: AttentionCall) -> tuple[Tensor, Tensor]:
    rows, keys = (torch.arange(x.shape[-3], device=x.device) for x in (call.query, call.key))
    return rows, keys


def _sequence_of(places: Tensor, inner_offsets: Tensor) -> Tensor:
    """The packed sequence that each row is of, by the first rows of all sequences but the first."""
    return torch.searchsorted(inner_offsets, places, right=True, out_int32=True).long()
