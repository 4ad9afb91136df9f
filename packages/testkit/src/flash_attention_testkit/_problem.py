"""One attention problem in the one layout that the references work in.

Dense batches ``[B, S, H, D]`` are read as packed sequences ``[T, H, D]`` of equal length, so that
nothing after this file knows two layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Span = tuple[slice, slice]
"""The query rows and the key rows of one sequence."""


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Packed inputs, the sequences in them and what each row may see.

    Attributes:
        query: ``[Tq, Hq, D]``.
        key: ``[Tk, Hkv, D]``.
        value: ``[Tk, Hkv, Dv]``.
        grad_out: ``[Tq, Hq, Dv]``, or None where no gradients are wanted.
        spans: Query rows and key rows of every sequence.
        scale: Factor of the scores before the softmax.
        window_left: Keys visible before the diagonal; None for all.
        window_right: Keys visible after the diagonal; None for all.
        shapes: Shapes of query, key and value as the caller gave them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor | None
    spans: tuple[Span, ...]
    scale: float
    window_left: int | None
    window_right: int | None
    shapes: tuple[torch.Size, torch.Size, torch.Size]

    def visible(self, rows: range, query_length: int, key_length: int) -> Tensor:
        """Which keys (columns) the given query rows of one sequence see: bool ``[R, Sk]``.

        Row i stands on the diagonal at key ``i + Sk - Sq``: the last query sees the last key
        (bottom-right alignment), also where the lengths differ.
        """
        device = self.query.device
        diagonal = torch.arange(rows.start, rows.stop, device=device) + (key_length - query_length)
        distance = torch.arange(key_length, device=device) - diagonal[:, None]
        visible = torch.ones_like(distance, dtype=torch.bool)
        if self.window_left is not None:
            visible &= distance >= -self.window_left
        if self.window_right is not None:
            visible &= distance <= self.window_right
        return visible


def pack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor | None,
    *,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    scale: float | None = None,
    cu_seqlens_query: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
) -> Problem:
    """Check one problem and bring it into the packed layout.

    Raises:
        ValueError: Shapes, devices, sequence offsets or windows do not fit together.
    """
    shapes = (query.shape, key.shape, value.shape)
    varlen = cu_seqlens_query is not None or cu_seqlens_key is not None
    _check_tensors(query, key, value, grad_out, rank=3 if varlen else 4)
    left, right = _window("window_left", window_left), _window("window_right", window_right)
    if causal:
        right = 0 if right is None else min(right, 0)
    if varlen:
        query_edges = _edges("cu_seqlens_query", cu_seqlens_query, query.shape[0])
        key_edges = _edges("cu_seqlens_key", cu_seqlens_key, key.shape[0])
        if len(query_edges) != len(key_edges):
            raise ValueError(
                f"cu_seqlens_query describes {len(query_edges) - 1} sequences and cu_seqlens_key "
                f"{len(key_edges) - 1}; give both the same number of sequences"
            )
    else:
        batch = query.shape[0]
        query_edges = [row * query.shape[1] for row in range(batch + 1)]
        key_edges = [row * key.shape[1] for row in range(batch + 1)]
        query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
        grad_out = None if grad_out is None else grad_out.flatten(0, 1)
    spans = zip(_slices(query_edges), _slices(key_edges), strict=True)
    return Problem(
        query=query,
        key=key,
        value=value,
        grad_out=grad_out,
        spans=tuple(spans),
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        window_left=left,
        window_right=right,
        shapes=shapes,
    )


def _check_tensors(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor | None, rank: int
) -> None:
    layout = "[B, S, H, D]" if rank == 4 else "[T, H, D] (cu_seqlens are given)"
    named = {"query": query, "key": key, "value": value, "grad_out": grad_out}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.dim() != rank:
            raise ValueError(f"{name} must be {layout}, but has shape {list(tensor.shape)}")
        if tensor.device != query.device:
            raise ValueError(
                f"{name} is on {tensor.device} and query on {query.device}; move them to one device"
            )
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"query has {heads} heads and key {kv_heads}; the first must be a multiple of the other"
        )
    expected = {
        "key": ((*query.shape[:-3], key.shape[-3], kv_heads, query.shape[-1]), key),
        "value": ((*key.shape[:-1], value.shape[-1]), value),
        "grad_out": ((*query.shape[:-1], value.shape[-1]), grad_out),
    }
    for name, (shape, tensor) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but beside query {list(query.shape)} and "
                f"key {list(key.shape)} it must be {list(shape)}"
            )


def _window(name: str, size: int | None) -> int | None:
    if size is None or size == -1:  # torch's ops say "no limit" either way
        return None
    if size < -1:
        raise ValueError(f"{name} is {size}; give a number of keys >= 0, or None (or -1) for all")
    return size


def _edges(name: str, offsets: Tensor | None, total: int) -> list[int]:
    if offsets is None:
        raise ValueError(f"{name} is missing; packed sequences need both cu_seqlens tensors")
    edges = [int(edge) for edge in offsets.tolist()]
    ascending = all(first <= second for first, second in pairwise(edges))
    if not edges or edges[0] != 0 or edges[-1] != total or not ascending:
        raise ValueError(
            f"{name} must rise from 0 to the number of packed rows, {total}, but is {edges}"
        )
    return edges


def _slices(edges: list[int]) -> list[slice]:
    return [slice(first, second) for first, second in pairwise(edges)]
