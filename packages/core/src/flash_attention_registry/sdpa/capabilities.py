"""What a kernel set says of itself, and the shape of a kernel set."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from .call import AttentionCall

__all__ = ["Capabilities", "Determinism", "Feature", "HeadsFirst", "KernelSet"]

Feature: TypeAlias = Literal[
    "alibi_slopes",
    "attn_bias",
    "backward",
    "block_table",
    "causal",
    "gqa",
    "num_splits",
    "seqused_key",
    "varlen",
    "window",
]
"""What a call may ask for beyond dense attention of equal head counts."""

Determinism: TypeAlias = Literal["always", "on_request", "never"]
"""Whether gradients repeat bit for bit: in every call, when `torch.use_deterministic_algorithms`
asks for it, or not."""

# A device's architecture never changes, and asking torch takes microseconds.
_compute_capability_of: dict[int, tuple[int, int]] = {}


def _compute_capability(device_index: int) -> tuple[int, int]:
    found = _compute_capability_of.get(device_index)
    if found is None:
        found = torch.cuda.get_device_capability(device_index)
        _compute_capability_of[device_index] = found
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a kernel set serves, declared once; everything else is declined with a reason.

    Attributes:
        device_types: Such as `"cuda"` or `"cpu"`.
        dtypes: Of query, key and value.
        head_dims: Served head dimensions, e.g. `range(8, 257, 8)`.
        features: What a call may ask for. A call that asks for anything else is declined.
        deterministic: Whether gradients repeat bit for bit. Under
            `torch.use_deterministic_algorithms(True)` the gradients of a kernel set that is
            `"never"` deterministic are computed by stock instead.
        min_compute_capability: Lowest CUDA architecture, as `(major, minor)`; `None` for any.
        max_compute_capability: Highest CUDA architecture, inclusive; `None` for any.
    """

    device_types: frozenset[str]
    dtypes: frozenset[torch.dtype]
    head_dims: Collection[int]
    features: frozenset[Feature]
    deterministic: Determinism
    min_compute_capability: tuple[int, int] | None = None
    max_compute_capability: tuple[int, int] | None = None

    def reason_to_decline(self, call: AttentionCall) -> str | None:
        """Why `call` is outside these capabilities, or None if it is inside.

        The reason names the property and no unbounded number (no sequence length), so that
        counting calls by reason stays small. `"backward"` and `deterministic` are not looked at
        here: a call does not know its direction, the router does.
        """
        query = call.query
        if query.dtype not in self.dtypes:
            return f"dtype {query.dtype} is not supported"
        head_dim = query.shape[-1]
        if head_dim not in self.head_dims:
            return f"head_dim {head_dim} is not supported"
        return self._reason_of_device(query) or self._reason_of_features(call)

    def reason_to_decline_backward(self) -> str | None:
        """Why gradients are outside these capabilities now, or None if they are inside."""
        if "backward" not in self.features:
            return "backward is not supported"
        if self.deterministic == "never" and torch.are_deterministic_algorithms_enabled():
            return "deterministic gradients are not supported"
        return None

    def _reason_of_device(self, query: Tensor) -> str | None:
        # `device.type` makes a string and costs seven times `is_cuda`.
        device_type = "cuda" if query.is_cuda else query.device.type
        if device_type not in self.device_types:
            return f"device type {device_type} is not supported"
        lowest, highest = self.min_compute_capability, self.max_compute_capability
        if (lowest is None and highest is None) or device_type != "cuda":
            return None
        found = _compute_capability(query.get_device())
        if (lowest is not None and found < lowest) or (highest is not None and found > highest):
            return f"compute capability {found[0]}.{found[1]} is not supported"
        return None

    def _reason_of_features(self, call: AttentionCall) -> str | None:
        features = self.features
        if call.causal and "causal" not in features:
            return "causal is not supported"
        if "gqa" not in features and call.query.shape[-2] != call.key.shape[-2]:
            return "gqa is not supported"
        if "window" not in features and (
            call.window_left is not None or call.window_right is not None
        ):
            return "window is not supported"
        if call.cu_seqlens_query is not None and "varlen" not in features:
            return "varlen is not supported"
        if call.attn_bias is not None and "attn_bias" not in features:
            return "attn_bias is not supported"
        if call.alibi_slopes is not None and "alibi_slopes" not in features:
            return "alibi_slopes is not supported"
        if call.seqused_key is not None and "seqused_key" not in features:
            return "seqused_key is not supported"
        if call.block_table is not None and "block_table" not in features:
            return "block_table is not supported"
        # 0 and 1 ask for what a kernel without splits does anyway.
        if call.num_splits is not None and call.num_splits > 1 and "num_splits" not in features:
            return "num_splits > 1 is not supported"
        return None


@runtime_checkable
class KernelSet(Protocol):
    """The attention kernels of one provider: a forward and a backward.

    The router calls `supports` and only after a None from it `forward` or `backward`, with the
    call's device current and its stream the current one. An exception from either is warned of
    once and the call goes to stock, so a kernel set raises only for what it could not foresee in
    `supports`. Methods must be safe to call from several threads.
    """

    @property
    def name(self) -> str:
        """Name in messages, such as `"fa4-triton"`."""

    @property
    def capabilities(self) -> Capabilities:
        """What is served."""

    def supports(self, call: AttentionCall) -> str | None:
        """None if `call` is served, else the reason it is declined.

        Usually `self.capabilities.reason_to_decline(call)` and then whatever a declaration
        cannot say. On the hot path: keep it to attribute reads.
        """

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Attention of one call.

        Returns:
            out: Shaped like `call.query`; `call.out` itself where that is given.
            lse: float32 contiguous, natural logarithm of the sum of exponentiated scaled scores,
                `[B, Hq, Sq]`, or `[Hq, Tq]` for packed sequences.
        """

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of one call, whoever ran its forward.

        Args:
            call: As in the forward, with `out` None.
            grad_out: Shaped like `call.query`, contiguous last dimension, else arbitrary strides.
            out: The forward's output, likewise.
            lse: The forward's lse, float32 contiguous, `[B, Hq, Sq]` or `[Hq, Tq]`. Rows without
                keys hold `call.lse_of_empty_rows` or whatever else ran the forward left there.

        Returns:
            Gradients of query, key and value, each shaped and typed like its tensor.
        """


class HeadsFirst(Protocol):
    """What a kernel set may have beside `KernelSet`: SDPA's forward, in SDPA's own layout.

    For kernels so fast, on small tensors, that the host's time is what a call costs: it saves four
    views and an `AttentionCall`. Serves what `supports` and `forward` would, with the same bits,
    and is called as they are.

    Taken only from the class that defines `supports` and `forward`, or one that derives from it: a
    kernel set that overrides either, or delegates to another by `__getattr__`, is called by these
    unless it defines its own `forward_heads_first`.
    """

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
        """Write the results of one dense call without a window or a bias.

        Args:
            query: `[B, Hq, Sq, D]`, otherwise as in `AttentionCall`.
            key: `[B, Hkv, Sk, D]`.
            value: Shaped like `key`.
            out: Shaped like `query`, contiguous last dimension, else arbitrary strides; written.
            lse: float32 contiguous, one number for each row of `query`; written.
            scale: As in `AttentionCall`, as are all that follow.
            causal: No key after the diagonal.
            lse_of_empty_rows: What lse reads for a row that sees no key.

        Returns:
            None, or the reason why the call is declined.
        """
