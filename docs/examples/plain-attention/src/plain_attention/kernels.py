"""The kernel set: what it serves, and how."""

import torch

from flash_attention_registry.sdpa import AttentionCall, Capabilities


class PlainKernels:
    """Dense attention of as many query heads as key heads, causal or not, forward only."""

    name = "plain"
    capabilities = Capabilities(
        device_types=frozenset({"cpu"}),
        dtypes=frozenset({torch.float16, torch.bfloat16}),
        head_dims=range(8, 257, 8),
        features=frozenset({"causal"}),
        deterministic="always",
    )

    def supports(self, call: AttentionCall) -> str | None:
        """None if the call is served, else the reason why it goes to torch's own kernel."""
        return self.capabilities.reason_to_decline(call)

    def forward(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Out like the query, [B, S, H, D]; lse in float32, [B, H, S]."""
        query, key, value = (x.transpose(1, 2).float() for x in (call.query, call.key, call.value))
        scores = query @ key.mT * call.scale
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
        if call.causal:  # aligned to the last row and the last key
            seen = seen.tril(seen.shape[1] - seen.shape[0])
        scores = scores.masked_fill(~seen, -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        lse = lse.masked_fill(~seen.any(-1, keepdim=True), call.lse_of_empty_rows)
        weights = (scores - lse).exp().masked_fill(~seen, 0.0)
        finite = value.isfinite()  # 0 times NaN is NaN: values that a row does not see stay out
        out = weights @ value.where(finite, 0.0)
        out = out.masked_fill(seen.float() @ (~finite).float() > 0, torch.nan)
        result = torch.empty_like(call.query) if call.out is None else call.out
        return result.copy_(out.transpose(1, 2)), lse.squeeze(-1)

    def backward(self, call: AttentionCall, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Never called: "backward" is not among the features."""
        raise NotImplementedError("torch's own kernel computes gradients")
