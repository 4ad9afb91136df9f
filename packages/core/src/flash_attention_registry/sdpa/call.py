"""The one record in which every attention request reaches a kernel."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

__all__ = ["AttentionCall"]


class AttentionCall(NamedTuple):
    """One attention request, whatever aten op it came from.

    A named tuple rather than a dataclass because one is built in every served call and a tuple
    costs a third of a frozen dataclass to make.

    `B` is the batch size, `Sq` and `Sk` the sequence lengths of queries and keys, `Hq` and `Hkv`
    their head counts (`Hq` is a multiple of `Hkv`; query head `h` reads key head
    `h // (Hq // Hkv)`), `D` the head dimension, `Tq` and `Tk` the summed lengths of packed
    sequences. All tensors are on one device; query, key and value share one dtype and have a
    contiguous last dimension, other strides are arbitrary (0 included, for expanded inputs).

    Which keys query row `i` sees, both sequences aligned at their ends (bottom-right): with
    `d = i + Sk - Sq`, key `j` is seen if `j >= d - window_left` and `j <= d + window_right`, where
    `None` is unbounded and `causal` is a right window of 0. Packed sequences are aligned each on
    its own.

    Attributes:
        query: `[B, Sq, Hq, D]`, or `[Tq, Hq, D]` with `cu_seqlens_query`.
        key: `[B, Sk, Hkv, D]`, or `[Tk, Hkv, D]` with `cu_seqlens_key`.
        value: Shaped like `key`.
        scale: Factor on the scores before the softmax. Any float, zero and negative included;
            never to be derived from the head dimension again, since callers pad that.
        causal: No key after the diagonal. `window_right` is `None` then.
        window_left: Keys before the diagonal that are seen, `None` for all, else `>= 0`.
        window_right: Keys after the diagonal that are seen, `None` for all, else `> 0` (0 arrives
            as `causal`).
        cu_seqlens_query: `[B + 1]` int32 contiguous, first row of each packed sequence; `None` in
            a dense call. Given with `cu_seqlens_key` or not at all.
        cu_seqlens_key: `[B + 1]` int32 contiguous, as above for the keys.
        max_seqlen_query: Longest packed query sequence; 0 in a dense call.
        max_seqlen_key: Longest packed key sequence; 0 in a dense call.
        out: What `KernelSet.forward` must write and return, shaped like `query` with arbitrary
            strides; `None` lets the kernel set allocate. Always `None` in a backward call.
        lse_of_empty_rows: What lse reads for a row that sees no key (its `out` is 0): the ops
            differ.
        attn_bias: Added to the scaled scores, broadcastable to `[B, Hq, Sq, Sk]`.
        alibi_slopes: `[Hq]` or `[B, Hq]` float32.
        seqused_key: `[B]` int32, keys in use of each sequence.
        block_table: `[B, blocks]` int32, pages of a paged key and value.
        num_splits: Split-KV request, `None` where the caller left it to the kernel.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    causal: bool
    window_left: int | None = None
    window_right: int | None = None
    cu_seqlens_query: Tensor | None = None
    cu_seqlens_key: Tensor | None = None
    max_seqlen_query: int = 0
    max_seqlen_key: int = 0
    out: Tensor | None = None
    lse_of_empty_rows: float = -math.inf
    attn_bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    seqused_key: Tensor | None = None
    block_table: Tensor | None = None
    num_splits: int | None = None
