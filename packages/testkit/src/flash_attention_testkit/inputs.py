"""Numbers for a case: query, key, value and the gradient of out.

What is found depends on the numbers. A leaked key has no weight among large scores, a missing
rescale shows only there; a wrong mask is best read off values that are one-hot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from flash_attention_testkit._problem import Problem, pack
from flash_attention_testkit.cases import Family, SdpaCase
from flash_attention_testkit.reference import AttentionOptions

PEAK = 4.0
"""How many times its key a peaked query is: at head_dim 64 the peak's score is 32."""

OFFSET = 4.0
"""What is added to every key and value; half of it to the queries, so that scores shift one way:
by 64 at head_dim 64."""

MEAN = 2.0
"""Mean of the values beside equal keys. The gradient of such a query is zero, and what a kernel
returns is what out was rounded by; with a mean, out is as large in the many rows that see many keys
as in the few that see few, and the largest error is not a matter of those alone."""

LOUD = 8.0
"""How much larger the rows that see nothing are, so that it shows if they reach a gradient."""


@dataclass(frozen=True, slots=True, eq=False)
class SdpaInputs:
    """The tensors of one case.

    Attributes:
        query: ``[B, Sq, Hq, D]``, or ``[Tq, Hq, D]`` for packed sequences; strides as the case's
            layout says.
        key: ``[B, Sk, Hkv, D]`` or ``[Tk, Hkv, D]``; likewise.
        value: As ``key``.
        grad_out: As ``query``, contiguous, or in the case of layout BHSD as that.
        options: The keyword arguments of ``reference_sdpa`` and its like: masks, scale and, for
            packed sequences, ``cu_seqlens_query`` and ``cu_seqlens_key`` (int32 ``[B + 1]``).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    options: AttentionOptions


def make_inputs(case: SdpaCase, seed: int, device: torch.device | str = "cpu") -> SdpaInputs:
    """Make the tensors of a case; the same ones for a seed, on whatever device.

    The families, all but the first three with a standard deviation of 1:

    * ``std-0.3``, ``std-1``, ``std-3``: query and key of that standard deviation.
    * ``peaked``: each query is four times a key that it sees, which gets nearly all its weight,
      unless the case's scale is far from the usual.
    * ``offset``: keys and values have one large offset in common and scores are large; attention
      depends on their differences all the same.
    * ``one-hot-values``: queries are zero and key j has the value 1 in column ``j % head_dim``. So
      all weights are equal, and out shows which keys a row saw.
    * ``equal-keys``: all keys of a head are one, and values have a mean; every row weighs all that
      it sees equally.
    * ``masked-rows``: rows that see no key have large queries and gradients, which must reach
      nothing.

    Args:
        case: What to make.
        seed: Any integer.
        device: Where the tensors are to be.
    """
    generator = torch.Generator().manual_seed(seed)
    total_q, total_k = (sum(lengths) for lengths in zip(*case.sequences, strict=True))
    stored = 1 if case.layout == "expanded" else case.kv_heads

    def normal(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, case.head_dim, generator=generator)

    query, grad_out = normal(total_q, case.heads), normal(total_q, case.heads)
    key, value = normal(total_k, stored), normal(total_k, stored)
    offsets = [
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        for lengths in zip(*case.sequences, strict=True)
    ]
    problem = pack(
        query,
        key.expand(-1, case.kv_heads, -1),
        value.expand(-1, case.kv_heads, -1),
        grad_out,
        causal=case.causal,
        window_left=case.window_left,
        window_right=case.window_right,
        scale=case.scale,
        cu_seqlens_query=offsets[0],
        cu_seqlens_key=offsets[1],
    )
    # In place: the problem's tensors are views of these.
    _FAMILIES[case.family](problem, key, value, generator)
    tensors = [tensor.to(case.dtype).to(device) for tensor in (query, key, value, grad_out)]
    options: AttentionOptions = {
        "causal": case.causal,
        "window_left": case.window_left,
        "window_right": case.window_right,
        "scale": case.scale,
    }
    if case.lengths is not None:
        options["cu_seqlens_query"], options["cu_seqlens_key"] = (
            edges.to(device) for edges in offsets
        )
    else:
        tensors = [tensor.unflatten(0, (case.batch, -1)) for tensor in tensors]
    return SdpaInputs(*_laid_out(case, *tensors), options)


def _laid_out(
    case: SdpaCase, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same numbers with the strides of the case's layout."""
    if case.layout == "BHSD":
        tensors = (query, key, value, grad_out)
        query, key, value, grad_out = (
            tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors
        )
    elif case.layout == "packed QKV slice":
        heads = [case.heads, case.kv_heads, case.kv_heads]
        query, key, value = torch.cat([query, key, value], dim=-2).split(heads, dim=-2)
    elif case.layout == "expanded":
        key, value = (tensor.expand(-1, -1, case.kv_heads, -1) for tensor in (key, value))
    return query, key, value, grad_out


Change = Callable[[Problem, Tensor, Tensor, torch.Generator], None]
"""Turns normal numbers into those of a family: the problem, its key and value as they are stored,
and where random numbers come from."""


def _scaled(std: float) -> Change:
    def change(problem: Problem, key: Tensor, value: Tensor, generator: torch.Generator) -> None:
        problem.query.mul_(std)
        key.mul_(std)

    return change


def _peaked(problem: Problem, key: Tensor, value: Tensor, generator: torch.Generator) -> None:
    group = problem.query.shape[1] // problem.key.shape[1]
    for rows, keys in problem.spans:
        queries, length = rows.stop - rows.start, keys.stop - keys.start
        draw = torch.rand(queries, length, generator=generator)
        if queries and length:
            visible = problem.visible(range(queries), queries, length)
            chosen = draw.masked_fill(~visible, -1.0).argmax(-1)
            peaks = problem.key[keys][chosen].repeat_interleave(group, 1)
            problem.query[rows] = PEAK * peaks


def _offset(problem: Problem, key: Tensor, value: Tensor, generator: torch.Generator) -> None:
    problem.query.add_(OFFSET / 2)
    key.add_(OFFSET)
    value.add_(OFFSET)


def _one_hot_values(
    problem: Problem, key: Tensor, value: Tensor, generator: torch.Generator
) -> None:
    problem.query.zero_()
    value.zero_()
    for _, keys in problem.spans:
        places = torch.arange(keys.stop - keys.start)
        value[keys][places, :, places % value.shape[-1]] = 1.0


def _equal_keys(problem: Problem, key: Tensor, value: Tensor, generator: torch.Generator) -> None:
    key.copy_(key[:1].clone())
    value.add_(MEAN)


def _masked_rows(problem: Problem, key: Tensor, value: Tensor, generator: torch.Generator) -> None:
    for rows, keys in problem.spans:
        queries, length = rows.stop - rows.start, keys.stop - keys.start
        unseeing = ~problem.visible(range(queries), queries, length).any(-1)
        problem.query[rows][unseeing] *= LOUD
        if problem.grad_out is not None:
            problem.grad_out[rows][unseeing] *= LOUD


_FAMILIES: dict[Family, Change] = {
    "std-0.3": _scaled(0.3),
    "std-1": _scaled(1.0),
    "std-3": _scaled(3.0),
    "peaked": _peaked,
    "offset": _offset,
    "one-hot-values": _one_hot_values,
    "equal-keys": _equal_keys,
    "masked-rows": _masked_rows,
}
