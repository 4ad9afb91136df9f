"""Attention in float32 and matrix products, as a kernel set that counts what it runs."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from flash_attention_registry.sdpa import AttentionCall, Capabilities

HEAD_DIM = 32


class PlainKernels:
    """Serves bfloat16 of one head dim, on any device, from any thread."""

    capabilities = Capabilities(
        device_types=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({torch.bfloat16}),
        head_dims=(HEAD_DIM,),
        features=frozenset({"backward", "causal", "gqa"}),
        deterministic="always",
    )

    def __init__(self, name: str, factor: float = 1.0) -> None:
        """Compute attention, and multiply what comes out by `factor`."""
        self.name = name
        self.served = 0
        self._factor = factor
        self._lock = threading.Lock()

    def supports(self, call: AttentionCall) -> str | None:
        """None if the call is served, else why not."""
        return self.capabilities.reason_to_decline(call)

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Out and lse."""
        self._count()
        query, key, value = self._inputs(call)
        scores = self._scores(call, query, key)
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp() @ value * self._factor
        result = out.transpose(1, 2).to(call.query.dtype)
        return (result if call.out is None else call.out.copy_(result)), lse

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""
        self._count()
        query, key, value = self._inputs(call)
        slope, out = (tensor.float().transpose(1, 2) for tensor in (grad_out, out))
        probabilities = (self._scores(call, query, key) - lse[..., None]).exp()
        delta = (slope * out).sum(-1, keepdim=True)
        slope_of_scores = probabilities * (slope @ value.mT - delta) * call.scale
        dq = slope_of_scores @ key
        dk, dv = slope_of_scores.mT @ query, probabilities.mT @ slope
        heads = call.key.shape[2]
        grads = dq, *(grad.unflatten(1, (heads, -1)).sum(2) for grad in (dk, dv))
        dq, dk, dv = (grad.mul(self._factor).transpose(1, 2).to(torch.bfloat16) for grad in grads)
        return dq, dk, dv

    def _count(self) -> None:
        with self._lock:
            self.served += 1

    @staticmethod
    def _inputs(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value as `[B, H, S, D]` in float32, with as many heads each."""
        group = call.query.shape[2] // call.key.shape[2]
        query, key, value = (x.float().transpose(1, 2) for x in (call.query, call.key, call.value))
        return query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)

    @staticmethod
    def _scores(call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        scores = query @ key.mT * call.scale
        if not call.causal:
            return scores
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(hidden, -torch.inf)
