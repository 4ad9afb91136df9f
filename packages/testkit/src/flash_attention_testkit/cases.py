"""One attention problem by its measures, and named sets of them that a provider should solve.

A case has no tensors, so it can name a parametrised test; ``make_inputs`` makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

import torch

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

GridName = Literal["quick", "standard", "exhaustive"]
"""Seconds on a CPU; minutes on a GPU; everything."""

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


def case_grid(name: GridName, capabilities: Capabilities | None = None) -> tuple[SdpaCase, ...]:
    """The cases of a grid, each once: a fixed set, or those that a kernel set declares to serve.

    ``quick`` varies one thing at a time. ``standard`` also crosses lengths, masks and head
    dimensions, each head dimension with few masks, because compiling kernels takes longer than
    running them. ``exhaustive`` crosses these with groupings and layouts, for every head dimension
    and dtype.

    Args:
        name: Which grid.
        capabilities: What a kernel set declares; every case is then one that it has to serve. None
            for a grid that depends on no kernel set, over bf16 and fp16, head dimensions from 8 to
            256 and all masks, groupings and layouts; ``SdpaCase.is_declared`` tells which of it a
            kernel set has to serve and which it has to decline.

    Raises:
        ValueError: There is no such grid, or the capabilities leave none of its cases.

    Example:
        >>> from fa4_triton.kernel_set import CAPABILITIES  # doctest: +SKIP
        >>> cases = case_grid("quick", CAPABILITIES)  # doctest: +SKIP
        >>> parametrised = pytest.mark.parametrize("case", cases, ids=str)  # doctest: +SKIP
    """
    if name not in _GRIDS:
        raise ValueError(f"there is no case grid {name!r}; choose one of {list(_GRIDS)}")
    declared = _USUAL if capabilities is None else capabilities
    if not declared.dtypes or not declared.head_dims:
        raise ValueError(
            f"case grid {name!r} is empty: the capabilities declare dtypes "
            f"{sorted(map(str, declared.dtypes))} and head dims {list(declared.head_dims)}"
        )
    cases = dict.fromkeys(_GRIDS[name](declared))
    return tuple(case for case in cases if case.is_declared(declared))


_USUAL = Capabilities(
    device_types=frozenset({"cpu", "cuda"}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    head_dims=range(8, 257, 8),
    features=frozenset({"backward", "causal", "gqa", "varlen", "window"}),
    deterministic="always",
)
"""What the flash-attention kernels at hand serve between them."""

_SHAPES: dict[GridName, tuple[tuple[int, int], ...]] = {
    # One row, one key, whole blocks, ragged blocks, more rows than keys.
    "quick": ((1, 1), (1, 130), (128, 128), (113, 203), (150, 97)),
    "standard": ((1, 1), (1, 1030), (64, 128), (113, 203), (203, 113), (512, 512), (1000, 2048)),
    "exhaustive": (
        *((1, 1), (1, 257), (2, 1024), (17, 17), (64, 128), (65, 63), (113, 203), (203, 113)),
        *((512, 512), (1000, 1024), (1024, 1000), (4096, 4096)),
    ),
}

_MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"causal": True, "window_left": 30},
    {"window_left": 9, "window_right": 70},
    {"window_right": 3},
    {"window_left": 0},
)

_GROUPS = ((2, 2), (4, 2), (3, 1))
"""Heads of query and of key: as many, grouped, all in one group."""

_PACKED = ((33, 65), (0, 4), (1, 97), (70, 70), (5, 0))
"""Packed sequences: ragged, without queries, one query, as long, without keys."""

_TYPICAL_HEAD_DIMS = (40, 64, 80, 96, 128, 192)
"""Beside the smallest and the largest: powers of two and what lies between them."""


def _quick(capabilities: Capabilities) -> Iterator[SdpaCase]:
    first, *others = _dtypes(capabilities)
    base = SdpaCase(1, 2, 2, 113, 203, _nearest(64, capabilities), first)
    yield from _product(base, _SHAPES["quick"], _MASKS[:2])
    yield from _one_at_a_time(base)
    yield replace(base, causal=True, family="one-hot-values")
    yield from (replace(base, **mask) for mask in _MASKS[2:])
    grouped = replace(base, heads=4, causal=True)
    yield grouped
    yield replace(grouped, window_left=30, seq_q=65, seq_k=97)
    yield _packed(grouped)
    yield replace(_packed(base), window_left=9, window_right=70)
    for head_dim in sorted({*_ends(capabilities), _nearest(128, capabilities)}):
        yield replace(base, seq_q=65, seq_k=97, head_dim=head_dim)
    for dtype in others:  # what depends on the dtype
        other = replace(base, dtype=dtype)
        yield from (replace(other, **mask) for mask in _MASKS[:2])
        yield replace(other, family="std-3")
        yield replace(other, family="peaked")


def _standard(capabilities: Capabilities) -> Iterator[SdpaCase]:
    dtypes = _dtypes(capabilities)
    head_dims = {_nearest(head_dim, capabilities) for head_dim in _TYPICAL_HEAD_DIMS}
    for place, head_dim in enumerate(sorted({*_ends(capabilities), *head_dims})):
        for turn, dtype in enumerate(dtypes):
            # One dtype causal and the next one not, and the other way round in the next head_dim.
            base = SdpaCase(1, 2, 2, 113, 203, head_dim, dtype)
            yield from _product(base, _SHAPES["standard"], (_MASKS[(place + turn) % 2],))
        grouped = SdpaCase(1, 4, 2, 113, 203, head_dim, dtypes[place % len(dtypes)])
        yield _packed(replace(grouped, causal=True))
    base = SdpaCase(2, 2, 2, 203, 333, _nearest(64, capabilities), dtypes[0])
    for mask in _MASKS:
        yield from _one_at_a_time(replace(base, **mask))
    other = replace(base, head_dim=_nearest(128, capabilities), dtype=dtypes[-1])
    for mask in _MASKS[1:4:2]:
        yield from _one_at_a_time(replace(other, **mask))


def _exhaustive(capabilities: Capabilities) -> Iterator[SdpaCase]:
    yield from _standard(capabilities)
    for dtype, head_dim in product(_dtypes(capabilities), sorted(capabilities.head_dims)):
        base = SdpaCase(2, 2, 2, 113, 203, head_dim, dtype)
        for heads, kv_heads in _GROUPS:
            grouped = replace(base, heads=heads, kv_heads=kv_heads)
            yield from _product(grouped, _SHAPES["exhaustive"], _MASKS)
        for mask in _MASKS:
            yield from _one_at_a_time(replace(base, **mask))


_GRIDS: dict[GridName, Callable[[Capabilities], Iterator[SdpaCase]]] = {
    "quick": _quick,
    "standard": _standard,
    "exhaustive": _exhaustive,
}


def _product(
    base: SdpaCase, shapes: tuple[tuple[int, int], ...], masks: tuple[dict[str, Any], ...]
) -> Iterator[SdpaCase]:
    for (queries, keys), mask in product(shapes, masks):
        yield replace(base, seq_q=queries, seq_k=keys, **mask)


def _one_at_a_time(base: SdpaCase) -> Iterator[SdpaCase]:
    """Every family, layout, grouping and scale, and packed sequences, each beside the base."""
    yield base
    for family in get_args(Family):
        if family != "masked-rows":
            yield replace(base, family=family)
    masks: dict[str, Any] = {}  # rows see no key only where something hides later ones
    if not base.causal and base.window_right is None:
        masks = {"causal": True}
    yield replace(base, seq_q=base.seq_k, seq_k=base.seq_q, family="masked-rows", **masks)
    for layout in get_args(Layout):
        keys = base.seq_q if layout == "packed QKV slice" else base.seq_k
        yield replace(base, batch=2, seq_k=keys, layout=layout)
    for heads, kv_heads in _GROUPS:
        yield replace(base, heads=heads, kv_heads=kv_heads)
    for scale in (0.0, -0.2, 0.5):
        yield replace(base, scale=scale)
    yield _packed(base)
    same = tuple((rows, rows) for rows, _ in _PACKED)
    yield replace(_packed(base), seq_k=70, lengths=same, layout="packed QKV slice")


def _packed(base: SdpaCase) -> SdpaCase:
    queries, keys = (max(side) for side in zip(*_PACKED, strict=True))
    return replace(base, batch=len(_PACKED), seq_q=queries, seq_k=keys, lengths=_PACKED)


def _dtypes(capabilities: Capabilities) -> list[torch.dtype]:
    """The declared dtypes; first the one that rounds most, whose errors show most."""
    return sorted(capabilities.dtypes, key=lambda dtype: (-torch.finfo(dtype).eps, str(dtype)))


def _ends(capabilities: Capabilities) -> tuple[int, int]:
    return min(capabilities.head_dims), max(capabilities.head_dims)


def _nearest(head_dim: int, capabilities: Capabilities) -> int:
    return min(capabilities.head_dims, key=lambda served: (abs(served - head_dim), served))
