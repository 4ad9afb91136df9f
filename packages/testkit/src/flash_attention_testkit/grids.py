"""Named sets of cases that a provider should solve."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, Literal, get_args

import torch

from flash_attention_registry.sdpa import Capabilities
from flash_attention_testkit.cases import Family, Layout, SdpaCase

GridName = Literal["quick", "standard", "exhaustive"]
"""Seconds on a CPU; minutes on a GPU; everything."""

USUAL_CAPABILITIES = Capabilities(
    device_types=frozenset({"cpu", "cuda"}),
    dtypes=frozenset({torch.bfloat16, torch.float16}),
    head_dims=range(8, 257, 8),
    features=frozenset({"backward", "causal", "gqa", "varlen", "window"}),
    deterministic="always",
)
"""What the flash-attention kernels that are in use serve between them."""


def case_grid(name: GridName, capabilities: Capabilities | None = None) -> tuple[SdpaCase, ...]:
    """The cases of a grid, each once: a fixed set, or those that a kernel set declares to serve.

    ``quick`` varies one thing at a time. ``standard`` also crosses lengths, masks and head
    dimensions, each head dimension with few masks, because compiling kernels takes longer than
    running them. ``exhaustive`` crosses these with groupings and layouts, for every head dimension
    and dtype.

    Args:
        name: Which grid.
        capabilities: What a kernel set declares; every case is then one that it has to serve. None
            for a grid that depends on no kernel set: bf16 and fp16, head dimensions from 8 to 256,
            all masks, groupings and layouts. ``SdpaCase.is_declared`` tells what of it a kernel
            set has to serve; the rest it has to decline.

    Raises:
        ValueError: There is no such grid, or the capabilities leave none of its cases.

    Example:
        >>> from fa4_triton.kernel_set import CAPABILITIES  # doctest: +SKIP
        >>> cases = case_grid("quick", CAPABILITIES)  # doctest: +SKIP
        >>> parametrised = pytest.mark.parametrize("case", cases, ids=str)  # doctest: +SKIP
    """
    if name not in _GRIDS:
        raise ValueError(f"there is no case grid {name!r}; choose one of {list(_GRIDS)}")
    declared = USUAL_CAPABILITIES if capabilities is None else capabilities
    if not declared.dtypes or not declared.head_dims:
        raise ValueError(
            f"case grid {name!r} is empty: the capabilities declare dtypes "
            f"{sorted(map(str, declared.dtypes))} and head dims {list(declared.head_dims)}"
        )
    cases = dict.fromkeys(_GRIDS[name](declared))
    return tuple(case for case in cases if case.is_declared(declared))


_SHAPES: dict[GridName, tuple[tuple[int, int], ...]] = {
    # One row, one key, whole blocks, ragged blocks, one behind whole blocks, more rows than keys.
    "quick": ((1, 1), (1, 130), (128, 128), (113, 203), (129, 257), (150, 97)),
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

_LONG_PACKED = (((3, 5), (150, 17)), ((5, 3), (150, 257)))
"""Packed sequences of several blocks: of rows alone, and of rows and keys; not the first ones."""

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
    yield replace(grouped, seq_q=1, seq_k=130)  # where a group's heads may be taken for rows
    yield replace(grouped, batch=2, window_left=30, seq_q=65, seq_k=97)
    yield replace(grouped, batch=4, heads=16, causal=False, seq_q=5, seq_k=9)  # many programs
    yield replace(base, batch=4, heads=12, kv_heads=12, seq_q=5, seq_k=9)
    few = ((5, 9), (1, 4), (3, 3), (9, 5))
    yield replace(grouped, batch=4, heads=16, seq_q=9, seq_k=9, lengths=few)
    yield replace(base, seq_q=300, seq_k=65)  # many blocks of rows, of keys, and of a window
    yield replace(base, seq_q=1, seq_k=1030)
    yield replace(base, seq_q=150, seq_k=97, window_left=9, window_right=70)
    yield replace(base, seq_q=65, seq_k=300, causal=True, window_left=128)
    yield _packed(grouped)
    yield replace(_packed(base), window_left=9, window_right=70)
    yield from _packed_in_blocks(base)
    yield replace(grouped, heads=6, seq_q=33, seq_k=65)  # groups of three, and not one alone
    yield replace(grouped, seq_q=65, seq_k=97, scale=-0.2)  # under which keys stay hidden
    head_dims = {*_ends(capabilities), *(_nearest(dim, capabilities) for dim in (80, 128))}
    for head_dim in sorted(head_dims):
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
    yield from _packed_in_blocks(base)
    yield replace(base, heads=6)
    other = replace(base, head_dim=_nearest(128, capabilities), dtype=dtypes[-1])
    for mask in _MASKS[1:4:2]:
        yield from _one_at_a_time(replace(other, **mask))
    many = replace(base, batch=5, seq_q=65, seq_k=97)
    yield replace(many, heads=16)
    yield replace(many, heads=12, kv_heads=12)
    yield replace(base, seq_k=777, causal=True, window_left=256)  # of many blocks


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


def _packed(base: SdpaCase, lengths: tuple[tuple[int, int], ...] = _PACKED) -> SdpaCase:
    queries, keys = (max(side) for side in zip(*lengths, strict=True))
    return replace(base, batch=len(lengths), seq_q=queries, seq_k=keys, lengths=lengths)


def _packed_in_blocks(base: SdpaCase) -> Iterator[SdpaCase]:
    """Without a mask, and causal."""
    more_rows, more_keys = _LONG_PACKED
    yield _packed(base, more_rows)
    yield _packed(replace(base, causal=True), more_keys)


def _dtypes(capabilities: Capabilities) -> list[torch.dtype]:
    """The declared dtypes; first the one that rounds most, whose errors show most."""
    return sorted(capabilities.dtypes, key=lambda dtype: (-torch.finfo(dtype).eps, str(dtype)))


def _ends(capabilities: Capabilities) -> tuple[int, int]:
    return min(capabilities.head_dims), max(capabilities.head_dims)


def _nearest(head_dim: int, capabilities: Capabilities) -> int:
    return min(capabilities.head_dims, key=lambda served: (abs(served - head_dim), served))
