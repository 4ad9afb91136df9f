"""Validity of a request's tensors: what must hold before a kernel set may see it.

Each function returns None or the reason to decline. An invalid request is declined rather than
refused, so that stock gets it and raises its own error. Reasons name properties and no unbounded
number, because calls are counted by reason.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "normalised_window",
    "reason_of_backward",
    "reason_of_dense",
    "reason_of_options",
    "reason_of_packed",
    "reason_of_seqused",
]

_HEADS = "the number of query heads is not a multiple of the number of key heads"


def reason_of_options(
    dropout_p: float,
    return_debug_mask: bool,
    extra: tuple[object, ...],
    unknown: dict[str, object],
) -> str | None:
    """Why arguments that no kernel set can serve rule a call out.

    Dropout and the debug mask cannot be expressed by (out, lse). `extra` and `unknown` are
    positional and keyword arguments of a schema newer than this module: None is a default, any
    other value asks for something that would be ignored.
    """
    if dropout_p != 0.0:
        return "dropout_p > 0 is not supported"
    if return_debug_mask:
        return "return_debug_mask is not supported"
    if any(value is not None for value in extra):
        return "an additional positional argument is not supported"
    for name, value in unknown.items():
        if value is not None:
            return f"argument {name} is not supported"
    return None


def reason_of_dense(query: Tensor, key: Tensor, value: Tensor, head_axis: int) -> str | None:
    """Why dense tensors are no valid request.

    Args:
        query: `[B, Hq, Sq, D]` with `head_axis` 1, `[B, Sq, Hq, D]` with 2.
        key: Likewise.
        value: Likewise.
        head_axis: The axis that counts heads; the other of 1 and 2 counts rows.
    """
    query_shape, key_shape = query.shape, key.shape
    if len(query_shape) != 4 or len(key_shape) != 4:
        return "query, key and value are not all 4-dimensional"
    if key_shape != value.shape:
        return "key and value differ in shape"
    if 0 in query_shape or 0 in key_shape:
        return "a tensor is empty"
    if query_shape[0] != key_shape[0]:
        return "query and key differ in batch size"
    if query_shape[3] != key_shape[3]:
        return "query and key differ in head_dim"
    if query_shape[head_axis] % key_shape[head_axis]:
        return _HEADS
    return _reason_of_storage(query, key, value)


def reason_of_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_query: Tensor | None,
    cu_seqlens_key: Tensor | None,
    paged: bool,
) -> str | None:
    """Why packed sequences are no valid request.

    Args:
        query: `[Tq, Hq, D]`.
        key: `[Tk, Hkv, D]`, or pages `[blocks, rows, Hkv, D]` if `paged`.
        value: Like `key`.
        cu_seqlens_query: `[B + 1]` int32 contiguous, on the query's device.
        cu_seqlens_key: Likewise.
        paged: Whether a block table says where the rows of key and value are.
    """
    if cu_seqlens_query is None or cu_seqlens_key is None:
        return "cum_seq_q and cum_seq_k are not given together"
    query_shape, key_shape = query.shape, key.shape
    if len(query_shape) != 3 or len(key_shape) != (4 if paged else 3):
        return "query, key or value has an unexpected number of dimensions for packed sequences"
    if key_shape != value.shape:
        return "key and value differ in shape"
    if 0 in query_shape or 0 in key_shape:
        return "a tensor is empty"
    if query_shape[2] != key_shape[-1]:
        return "query and key differ in head_dim"
    if query_shape[1] % key_shape[-2]:
        return _HEADS
    device_index = query.get_device()
    for offsets in (cu_seqlens_query, cu_seqlens_key):
        if offsets.dtype is not torch.int32 or offsets.dim() != 1 or not offsets.is_contiguous():
            return "cum_seq_q and cum_seq_k are not both one-dimensional, contiguous and int32"
        if offsets.get_device() != device_index:
            return "cum_seq_q or cum_seq_k is on another device"
    sequences = cu_seqlens_query.shape[0]
    if sequences < 2 or sequences != cu_seqlens_key.shape[0]:
        return "cum_seq_q and cum_seq_k do not describe the same sequences"
    return _reason_of_storage(query, key, value)


def reason_of_seqused(
    query: Tensor, seqused_key: Tensor, *, cu_seqlens_key: Tensor | None
) -> str | None:
    """Why `seqused_key` does not say how many keys of each packed sequence count.

    Args:
        query: For its device.
        seqused_key: `[B]` int32 contiguous, on the query's device.
        cu_seqlens_key: `[B + 1]`; None of a dense batch, in which torch does not read it.
    """
    if cu_seqlens_key is None:
        return "seqused_k without cum_seq_k: torch reads it of packed sequences only"
    if seqused_key.dtype is not torch.int32 or not seqused_key.is_contiguous():
        return "seqused_k is not contiguous and int32"
    if seqused_key.shape != (cu_seqlens_key.shape[0] - 1,):
        return "seqused_k and cum_seq_k do not describe the same sequences"
    if seqused_key.get_device() != query.get_device():
        return "seqused_k is on another device"
    return None


def reason_of_backward(
    grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor, lse_shape: tuple[int, ...]
) -> str | None:
    """Why what a backward is given does not belong to a forward of `query`.

    Args:
        grad_out: Shaped and typed like `query`.
        query: As the op took it.
        out: Shaped and typed like `query`.
        lse: float32 of shape `lse_shape`.
        lse_shape: What the op's forward returns.
    """
    if grad_out.shape != query.shape or out.shape != query.shape:
        return "grad_out or out differs from query in shape"
    if grad_out.dtype is not query.dtype or out.dtype is not query.dtype:
        return "grad_out or out differs from query in dtype"
    if lse.dtype is not torch.float32 or lse.shape != lse_shape:
        return "logsumexp is not what this op's forward returns"
    device_index = query.get_device()
    if not device_index == grad_out.get_device() == out.get_device() == lse.get_device():
        return "grad_out, out or logsumexp is on another device"
    return None


def normalised_window(
    causal: bool,
    window_left: int | None,
    window_right: int | None,
    seq_len_query: int,
    seq_len_key: int,
) -> tuple[bool, int | None, int | None]:
    """Causal flag and window in `AttentionCall`'s form.

    As in stock, any negative bound means none and causal wins over a right bound. Bounds that
    rule nothing out become None, so that kernels never add a huge bound to an index.

    Args:
        causal: As the op took it.
        window_left: As the op took it.
        window_right: As the op took it.
        seq_len_query: Number of query rows, of the longest packed sequence if packed.
        seq_len_key: Likewise for the keys.

    Returns:
        causal, window_left, window_right: a right bound of 0 has become causal.
    """
    if window_left is not None and not 0 <= window_left < seq_len_key:
        window_left = None
    if causal or window_right == 0:
        return True, window_left, None
    if window_right is not None and not 0 <= window_right < seq_len_query:
        window_right = None
    return False, window_left, window_right


def _reason_of_storage(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    dtype = query.dtype
    if key.dtype is not dtype or value.dtype is not dtype:
        return "query, key and value differ in dtype"
    # An index instead of a device: an attribute of a tensor that makes no object. It is -1 for
    # every tensor outside accelerators, of which there is one kind behind a dispatch key.
    device_index = query.get_device()
    if key.get_device() != device_index or value.get_device() != device_index:
        return "query, key and value are not on one device"
    if query.stride()[-1] != 1 or key.stride()[-1] != 1 or value.stride()[-1] != 1:
        return "the last dimension of query, key or value is not contiguous"
    return None
