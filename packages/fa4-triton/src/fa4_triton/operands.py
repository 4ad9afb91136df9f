"""From tensors to what the kernels are told of them: sizes, strides, alignment."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from flash_attention_registry.sdpa import AttentionCall
    from torch import Tensor

__all__ = ["Operands", "Sizes", "sizes"]


class Sizes(NamedTuple):
    """The sizes of one call. Sequence lengths of a packed call are the longest of the batch."""

    batch: int
    heads: int
    heads_kv: int
    head_dim: int
    seq_len_q: int
    seq_len_k: int
    left: int | None
    right: int | None
    varlen: bool


def sizes(call: AttentionCall) -> Sizes:
    """Read the sizes of a call off its tensors."""
    query_shape = call.query.shape
    key_shape = call.key.shape
    heads, head_dim = query_shape[-2:]
    cu_seqlens = call.cu_seqlens_query
    if cu_seqlens is not None:
        batch, seq_len_q, seq_len_k = cu_seqlens.shape[0] - 1, call.max_seqlen_query, call.max_seqlen_key
    else:
        batch, seq_len_q, seq_len_k = query_shape[0], query_shape[1], key_shape[1]
    left = call.window_left
    right = 0 if call.causal else call.window_right
    # A window as wide as both sequences hides nothing, and its width may not fit the kernels' int32.
    widest = seq_len_q + seq_len_k
    if left is not None and left >= widest:
        left = None
    if right is not None and right >= widest:
        right = None
    return Sizes(
        batch, heads, key_shape[-2], head_dim, seq_len_q, seq_len_k, left, right, cu_seqlens is not None
    )


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Elements between batches, heads and rows of [B, S, H, D] or [T, H, D]; 0 where there is but one."""
    shape = tensor.shape
    stride = tensor.stride()
    if len(shape) == 3:
        return 0, 0 if shape[1] == 1 else stride[1], 0 if shape[0] == 1 else stride[0]
    return (
        0 if shape[0] == 1 else stride[0],
        0 if shape[2] == 1 else stride[2],
        0 if shape[1] == 1 else stride[1],
    )


class Operands:
    """The tensors one kernel reads and writes, and what their layout decides.

    Attributes:
        strides: Batch, head and row stride of each tensor, in units of `unit` elements.
        unit: 8 where every stride is a multiple of 8 elements (16 bytes), else 1.
        alignment: Bit i is set where tensor i starts at a multiple of 16 bytes.
        wide: Whether a tile may span 2^31 elements, so that offsets within it need 64 bits.
    """

    __slots__ = ("alignment", "strides", "unit", "wide")

    def __init__(self, tensors: tuple[Tensor, ...], tile_rows: int) -> None:
        at = [_strides(tensor) for tensor in tensors]
        union = alignment = longest = 0
        for bit, (tensor, (batch, head, row)) in enumerate(zip(tensors, at, strict=True)):
            union |= batch | head | row
            longest = max(longest, row)
            if tensor.data_ptr() % 16 == 0:
                alignment |= 1 << bit
        self.alignment = alignment
        self.unit = unit = 1 if union % 8 else 8
        self.strides = [stride // unit for one in at for stride in one]
        self.wide = longest * tile_rows >= 1 << 31
