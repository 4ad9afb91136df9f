"""A correct flash-style kernel in plain torch, and the bugs that can be planted in it."""

from __future__ import annotations

import math

import pytest
import torch

from flash_attention_testkit import SdpaResult

LOG2_E = math.log2(math.e)


class FlashStyle:
    """Blocked attention in fp32 with an online softmax in base 2, as kernels compute it.

    Independent of the references: other loops, other accumulation order, other exponentials.
    ``bug`` plants one fault; None is correct. ``noise`` is the relative error of its exponentials,
    as GPUs approximate them. Layouts ``[B, S, H, D]``, and ``[T, H, D]`` with offsets.
    """

    def __init__(
        self, bug: str | None = None, block: int = 32, reverse: bool = False, noise: float = 0.0
    ) -> None:
        self.bug, self.block, self.reverse, self.noise = bug, block, reverse, noise

    def __call__(
        self,
        query,
        key,
        value,
        *,
        grad_out=None,
        cu_seqlens_query=None,
        cu_seqlens_key=None,
        **options,
    ):
        if cu_seqlens_query is None:
            return self.dense(query, key, value, grad_out, **options)
        rows, keys = (edges.diff().tolist() for edges in (cu_seqlens_query, cu_seqlens_key))
        parts = [
            tensor.split(lengths)
            for tensor, lengths in ((query, rows), (key, keys), (value, keys), (grad_out, rows))
        ]
        results = [
            self.dense(*(part[None] for part in sequence), **options)
            for sequence in zip(*parts, strict=True)
        ]
        return SdpaResult(
            **{
                name: torch.cat(
                    [getattr(result, name)[0] for result in results], int(name == "lse")
                )
                for name in ("out", "lse", "dq", "dk", "dv")
            }
        )

    def dense(
        self,
        query,
        key,
        value,
        grad_out=None,
        *,
        causal=False,
        window_left=None,
        window_right=None,
        scale=None,
    ):
        self.dtype, self.window_left = query.dtype, window_left
        self.window_right = 0 if causal else window_right
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self.bug == "scale 1 % off":
            self.scale *= 1.01
        self.queries, self.keys = query.shape[1], key.shape[1]
        self.group = query.shape[2] // key.shape[2]
        wide_query = query.transpose(1, 2).float()  # [B, H, Sq, D]
        wide_key, wide_value = (self.expand(x.transpose(1, 2).float()) for x in (key, value))
        out, lse = self.forward(wide_query, wide_key, wide_value)
        returned_lse = lse * LOG2_E if self.bug == "lse in base 2" else lse
        if self.bug == "one wrong element":
            out[0, 0, self.queries // 2, 3] += out.abs().max()
        result = {"out": out.transpose(1, 2), "lse": returned_lse}
        if grad_out is not None:
            wide_grad = grad_out.transpose(1, 2).float()
            dq, dk, dv = self.backward(wide_query, wide_key, wide_value, out, lse, wide_grad)
            if self.bug == "dq 1 % off":
                dq *= 1.01
            result["dq"] = dq.to(self.dtype).transpose(1, 2)
            result["dk"] = self.reduce(dk).to(self.dtype).transpose(1, 2)
            result["dv"] = self.reduce(dv).to(self.dtype).transpose(1, 2)
        return SdpaResult(**result)

    def expand(self, x):
        """Give every query head its key head."""
        if self.bug == "wrong key head":
            return x.repeat(1, self.group, 1, 1)
        return x.repeat_interleave(self.group, 1)

    def reduce(self, x):
        """Sum the gradients over the query heads of a group."""
        if self.bug == "one head of the group":
            return x.unflatten(1, (-1, self.group))[:, :, 0]
        return x.unflatten(1, (-1, self.group)).sum(2)

    def blocks(self):
        starts = list(range(0, self.keys, self.block))
        return reversed(starts) if self.reverse else starts

    def load(self, x, start):
        """One block of keys, zero beyond the last, as a kernel's masked load gives it."""
        rows = x[:, :, start : start + self.block]
        return torch.nn.functional.pad(rows, (0, 0, 0, self.block - rows.shape[2]))

    def visible(self, start):
        """Bool [Sq, block]."""
        row = torch.arange(self.queries)[:, None]
        column = torch.arange(start, start + self.block)
        row = row + (0 if self.bug == "top-left causal" else self.keys - self.queries)
        seen = (column < self.keys).expand(self.queries, -1)
        if self.bug == "keys beyond the end":
            seen = torch.ones_like(seen)
        if self.window_right is not None:
            seen = seen & (column <= row + self.window_right)
        if self.window_left is not None:
            reach = self.window_left + (self.bug == "window off by one")
            seen = seen & (column >= row - reach)
        return seen

    def scores(self, query, key, start):
        """Scores in base 2, masked: [B, H, Sq, block]."""
        scores = query @ self.load(key, start).mT
        if self.bug == "scores in storage dtype":
            scores = scores.to(self.dtype).float()
        return (scores * (self.scale * LOG2_E)).masked_fill(~self.visible(start), float("-inf"))

    def exp2(self, x):
        exact = torch.exp2(x)
        return exact * (1 + self.noise * torch.rand_like(x).mul(2).sub(1)) if self.noise else exact

    def forward(self, query, key, value):
        top = query.new_full((*query.shape[:3], 1), float("-inf"))
        total, acc = torch.zeros_like(top), query.new_zeros(*query.shape[:3], value.shape[-1])
        for start in self.blocks():
            scores = self.scores(query, key, start)
            new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
            shift = torch.where(new_top.isneginf(), 0.0, new_top)
            alpha = self.exp2(top - shift)
            weights = self.exp2(scores - shift)
            total = total * alpha + weights.sum(-1, keepdim=True)
            if self.bug != "no rescale":
                acc = acc * alpha
            acc = acc + weights.to(self.dtype).float() @ self.load(value, start)
            top = new_top
        empty = total == 0
        out = acc / torch.where(empty, 1.0, total)
        lse = torch.where(empty, float("-inf"), (top + total.log2()) / LOG2_E)
        return out.to(self.dtype), lse.squeeze(-1)

    def backward(self, query, key, value, out, lse, grad_out):
        delta = (grad_out * out.float()).sum(-1, keepdim=True)
        if self.bug == "no delta":
            delta = torch.zeros_like(delta)
        lse = torch.where(lse.isneginf(), 0.0, lse)[..., None] * LOG2_E
        dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for start in self.blocks():
            rows = slice(start, min(start + self.block, self.keys))
            count = rows.stop - rows.start
            weights = self.exp2(self.scores(query, key, start) - lse)
            stored = weights.to(self.dtype).float()
            dv[:, :, rows] = (stored.mT @ grad_out)[:, :, :count]
            grad_weights = grad_out @ self.load(value, start).mT
            grad_scores = (weights * (grad_weights - delta)).to(self.dtype).float()
            dq += grad_scores @ self.load(key, start) * self.scale
            dk[:, :, rows] = (grad_scores.mT @ query * self.scale)[:, :, :count]
        return dq, dk, dv


@pytest.fixture
def flash_style():
    """The class of flash-style kernels."""
    return FlashStyle


@pytest.fixture
def make_inputs():
    """Random query, key, value, grad_out in one dtype; query and key scaled by ``std``."""

    def make(seed, dtype, *, batch=1, queries, keys, heads=4, kv_heads=2, head_dim=64, std=1.0):
        generator = torch.Generator().manual_seed(seed)

        def normal(length, count, factor):
            shape = (batch, length, count, head_dim)
            return (torch.randn(shape, generator=generator) * factor).to(dtype)

        return (
            normal(queries, heads, std),
            normal(keys, kv_heads, std),
            normal(keys, kv_heads, 1.0),
            normal(queries, heads, 1.0),
        )

    return make
