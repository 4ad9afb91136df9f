"""Direct calls: what the functions known from flash-attn 2 are handed, before a kernel may see it.

For providers that export `flash_attn_func` and `flash_attn_varlen_func`.

A `TypeError` is for what is no tensor or no number, a `ValueError` for arguments that do not fit
together, a `NotImplementedError` for what is valid and not served. All say what was asked, what was
found and what to do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Mask",
    "check_dense",
    "check_options",
    "check_packed",
    "mask_of",
    "not_served",
    "with_unit_stride",
]

_ADVICE = "torch.nn.functional.scaled_dot_product_attention serves more, on torch's own kernels"


class Mask(NamedTuple):
    """Which keys a row sees, in the terms of `AttentionCall`."""

    causal: bool
    window_left: int | None
    window_right: int | None


def mask_of(causal: bool, window_size: tuple[int, int]) -> Mask:
    """Bring a window in which negative means unbounded into the form that `AttentionCall` has.

    Args:
        causal: Hides the keys after the diagonal, whatever the window says of them.
        window_size: Keys seen before and after the diagonal.

    Raises:
        TypeError: `window_size` is not a pair of integers.
    """
    if not (
        isinstance(window_size, (tuple, list))
        and len(window_size) == 2
        and not any(side is None or isinstance(side, (float, str)) for side in window_size)
    ):
        raise TypeError(
            f"window_size must be a pair of integers (left, right), but is {window_size!r}; "
            "give -1 for a side without a bound"
        )
    left = None if window_size[0] < 0 else window_size[0]
    right = None if window_size[1] < 0 else window_size[1]
    if causal or right == 0:
        return Mask(True, left, None)
    return Mask(False, left, right)


def check_options(
    provider: str,
    dropout_p: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    block_table: Tensor | None = None,
) -> None:
    """Refuse what cannot be expressed by out and lse of an `AttentionCall`.

    Args:
        provider: Its name, for the message.
        dropout_p: Must be 0.
        softcap: Must be 0.
        alibi_slopes: Must be None.
        block_table: Must be None.

    Raises:
        NotImplementedError: An option is set.
    """
    asked = [
        f"{name}={value}"
        for name, value in (("dropout_p", dropout_p), ("softcap", softcap))
        if value != 0
    ]
    for name, tensor in (("alibi_slopes", alibi_slopes), ("block_table", block_table)):
        if tensor is not None:
            asked.append(name)
    if asked:
        raise NotImplementedError(
            f"{provider} does not serve {', '.join(asked)}; leave it at its default. {_ADVICE}"
        )


def not_served(provider: str, reason: str) -> NotImplementedError:
    """The error for a call that the kernel set of `provider` declines for `reason`."""
    return NotImplementedError(f"{provider} does not serve this call: {reason}. {_ADVICE}")


def check_dense(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Refuse dense tensors that do not fit together.

    Args:
        query: `[B, Sq, Hq, D]`.
        key: `[B, Sk, Hkv, D]`, Hkv a divisor of Hq.
        value: Like `key`.

    Raises:
        TypeError: One is no tensor.
        ValueError: They differ in what they must share.
    """
    _check_tensors(query, key, value, "[B, S, H, D]")
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"q has batch size {query.shape[0]} and k {key.shape[0]}; they must be the same"
        )


def check_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
) -> None:
    """Refuse packed sequences that do not fit together; the offsets themselves are not read.

    Args:
        query: `[Tq, Hq, D]`.
        key: `[Tk, Hkv, D]`, Hkv a divisor of Hq.
        value: Like `key`.
        cu_seqlens: `[B + 1]` int32 offsets of the queries and of the keys.
        max_seqlens: The longest sequence of either.

    Raises:
        TypeError: One is no tensor, or a length no integer.
        ValueError: They differ in what they must share.
    """
    _check_tensors(query, key, value, "[T, H, D]")
    for side, rows, offsets, longest in zip(
        "qk", (query.shape[0], key.shape[0]), cu_seqlens, max_seqlens, strict=True
    ):
        name = f"cu_seqlens_{side}"
        _check_is_tensor(name, offsets, "[B + 1] int32")
        if longest is None or isinstance(longest, (float, str)):
            raise TypeError(
                f"max_seqlen_{side} must be an integer, the length of the longest sequence, but is "
                f"a {type(longest).__name__}"
            )
        if offsets.dtype is not torch.int32 or offsets.dim() != 1:
            raise ValueError(
                f"{name} must be [B + 1] int32, but has shape {list(offsets.shape)} and dtype "
                f"{offsets.dtype}; use offsets.to(torch.int32)"
            )
        if offsets.device != query.device:
            raise ValueError(
                f"{name} is on {offsets.device} and q on {query.device}; move it to {query.device}"
            )
        if rows and (offsets.shape[0] < 2 or longest < 1):
            raise ValueError(
                f"{name} has {offsets.shape[0]} entries and max_seqlen_{side} is {longest}, but "
                f"there are {rows} rows; give [B + 1] offsets from 0 to {rows} and the length of "
                "the longest sequence"
            )
    if cu_seqlens[0].shape != cu_seqlens[1].shape:
        raise ValueError(
            f"cu_seqlens_q has {cu_seqlens[0].shape[0]} entries and cu_seqlens_k "
            f"{cu_seqlens[1].shape[0]}; both must describe the same sequences"
        )


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, layout: str) -> None:
    rank = layout.count(",") + 1
    for name, tensor in (("q", query), ("k", key), ("v", value)):
        _check_is_tensor(name, tensor, layout)
        if tensor.dim() != rank:
            raise ValueError(f"{name} must be {layout}, but has shape {list(tensor.shape)}")
        if tensor.dtype is not query.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} and q {query.dtype}; q, k and v must share one dtype"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"{name} is on {tensor.device} and q on {query.device}; move all to one device"
            )
    if key.shape != value.shape:
        raise ValueError(
            f"k has shape {list(key.shape)} and v {list(value.shape)}; they must be the same"
        )
    if query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        raise ValueError(
            f"q has head_dim {query.shape[-1]} and k {key.shape[-1]}; they must be the same, "
            "and not 0"
        )
    heads, heads_kv = query.shape[-2], key.shape[-2]
    if heads_kv == 0 or heads % heads_kv:
        raise ValueError(
            f"q has {heads} heads and k {heads_kv}; the first must be a multiple of the second"
        )


def _check_is_tensor(name: str, given: object, layout: str) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, but is a {type(given).__name__}")


def with_unit_stride(tensor: Tensor) -> Tensor:
    """`tensor`, copied if its last dimension is not contiguous, which the kernels rely on."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
