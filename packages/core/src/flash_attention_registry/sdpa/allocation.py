"""What a kernel set allocates: results that lie as torch's own would."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["empty_like", "empty_lse"]


def empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised, shaped, typed and laid out like `tensor`, with a contiguous last dimension.

    `torch.empty_like` alone may order the dimensions of overlapping rows (`unfold`) otherwise.
    """
    made = torch.empty_like(tensor)
    return made if made.stride(-1) == 1 else tensor.new_empty(tensor.shape)


def empty_lse(query: Tensor) -> Tensor:
    """Uninitialised float32, one number a row: `[B, Hq, Sq]`, or `[Hq, Tq]` if packed.

    Args:
        query: `[B, Sq, Hq, D]` or `[Tq, Hq, D]`.
    """
    shape = query.shape
    rows = (shape[0], shape[2], shape[1]) if len(shape) == 4 else (shape[1], shape[0])
    return query.new_empty(rows, dtype=torch.float32)
