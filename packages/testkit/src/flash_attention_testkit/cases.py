"""One attention problem by its measures.

A case has no tensors, so it can name a parametrised test; ``make_inputs`` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

if TYPE_CHECKING:
    from flash_attention_registry.sdpa import Capabilities, Feature

Layout = Literal["BSHD", "BHSD", "packed QKV slice", "expanded"]
"""How query, key and value, always shaped ``[B, S, H, D]``, lie in memory: in that order; with
the heads outside of the rows; as slices of one projection; key and value as one head, expanded."""

Family = Literal[
    "std-0.3",
    "std-1",
    "std-3",
    "peaked",
    "offset",
    "one-hot-values",
    "equal-keys",
    "masked-rows",
]
"""What the numbers are like; see ``make_inputs``."""

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class SdpaCase:
    """One attention problem by its measures; hashable, and its ``str`` is an id for pytest.

    Masks are aligned to the last query and the last key, as in ``reference_sdpa``.

    Attributes:
        batch: Sequences.
        heads: Heads of the query.
        kv_heads: Heads of key and value, of which ``heads`` is a multiple.
        seq_q: Query rows of each sequence; of the longest one where ``lengths`` is given.
        seq_k: Keys of each sequence; likewise.
        head_dim: Of query, key and value.
        dtype: Of query, key and value.
        causal: No key after the diagonal is seen.
        window_left: Keys before the diagonal that are seen; None for all.
        window_right: Keys after the diagonal that are seen, at least 1; None for all.
        scale: Factor of the scores; None for ``head_dim ** -0.5``.
        layout: How the tensors lie in memory.
        lengths: Query rows and keys of each packed sequence, or None for a dense batch.
        family: What the numbers are like.

    Raises:
        ValueError: The measures are of no problem.
    """

    batch: int
    heads: int
    kv_heads: int
    seq_q: int
    seq_k: int
    head_dim: int
    dtype: torch.dtype
    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    scale: float | None = None
    layout: Layout = "BSHD"
    lengths: tuple[tuple[int, int], ...] | None = None
    family: Family = "std-1"

    def __post_init__(self) -> None:
        """Refuse what is no problem."""
        reason = self._why_impossible()
        if reason is not None:
            raise ValueError(f"{self.id} is no attention problem: {reason}")

    def __str__(self) -> str:
        """The id, so that ``ids=str`` names a parametrised test."""
        return self.id

    @property
    def id(self) -> str:
        """A name such as ``"bf16-1x113x203-h4kv2-d64-causal-std-1"``, different for each case.

        The three numbers are batch, query rows and keys; packed sequences list their lengths.
        """
        size = f"{self.batch}x{self.seq_q}x{self.seq_k}"
        if self.lengths is not None:
            size = "varlen-" + "+".join(f"{queries}x{keys}" for queries, keys in self.lengths)
        parts = {
            _DTYPE_NAMES.get(self.dtype, str(self.dtype).removeprefix("torch.")): True,
            size: True,
            f"h{self.heads}kv{self.kv_heads}": True,
            f"d{self.head_dim}": True,
            "causal": self.causal,
            f"left{self.window_left}": self.window_left is not None,
            f"right{self.window_right}": self.window_right is not None,
            f"scale{self.scale}": self.scale is not None,
            self.layout.replace(" ", "-"): self.layout != "BSHD",
            self.family: True,
        }
        return "-".join(part for part, present in parts.items() if present)

    @property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """Query rows and keys of every sequence, dense or packed."""
        return self.lengths or ((self.seq_q, self.seq_k),) * self.batch

    @property
    def has_masked_rows(self) -> bool:
        """Whether some query row sees no key."""
        right = 0 if self.causal else self.window_right
        return any(
            queries > 0 and (keys == 0 or (right is not None and queries - keys > right))
            for queries, keys in self.sequences
        )

    @property
    def features(self) -> frozenset[Feature]:
        """What a kernel set must have declared to serve it, beside dtype and head_dim."""
        asked: dict[Feature, bool] = {
            "causal": self.causal,
            "gqa": self.heads != self.kv_heads,
            "varlen": self.lengths is not None,
            "window": self.window_left is not None or self.window_right is not None,
        }
        return frozenset(feature for feature, wanted in asked.items() if wanted)

    def is_declared(self, capabilities: Capabilities) -> bool:
        """Whether a kernel set of these capabilities has to serve it, on a device it declares."""
        return (
            self.dtype in capabilities.dtypes
            and self.head_dim in capabilities.head_dims
            and self.features <= capabilities.features
        )

    def _why_impossible(self) -> str | None:
        sizes = (self.batch, self.heads, self.kv_heads, self.seq_q, self.seq_k, self.head_dim)
        if min(sizes) < 1:
            return "batch, heads, lengths and head_dim must be at least 1"
        if self.heads % self.kv_heads:
            return "heads must be a multiple of kv_heads"
        if self.window_left is not None and self.window_left < 0:
            return "window_left must be at least 0, or None for all keys"
        if self.window_right is not None and (self.window_right < 1 or self.causal):
            return "window_right must be at least 1, or None; causal is a right window of 0"
        if self.layout not in get_args(Layout) or self.family not in get_args(Family):
            return f"layouts are {get_args(Layout)}, families {get_args(Family)}"
        if self.layout == "packed QKV slice" and any(q != k for q, k in self.sequences):
            return "slices of one projection have as many query rows as keys"
        if self.family == "masked-rows" and not self.has_masked_rows:
            return (
                "every row sees a key; mask with causal or window_right, and fewer keys than rows"
            )
        return self._why_packing_is_impossible()

    def _why_packing_is_impossible(self) -> str | None:
        if self.lengths is None:
            return None
        longest = tuple(max(side) for side in zip(*self.lengths, strict=True))
        if (len(self.lengths), *longest) != (self.batch, self.seq_q, self.seq_k):
            return f"its lengths are {len(self.lengths)} sequences of up to {longest} rows and keys"
        if min(min(pair) for pair in self.lengths) < 0:
            return "lengths must be at least 0"
        if self.layout not in ("BSHD", "packed QKV slice"):
            return "packed sequences [T, H, D] have no batch to lay out otherwise"
        return None
