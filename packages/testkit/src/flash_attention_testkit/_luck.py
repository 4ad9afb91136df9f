"""How far from the truth dq and dk may be by the luck of few roundings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_attention_testkit._attention import Precision
from flash_attention_testkit._problem import pack
from flash_attention_testkit.reference import AttentionOptions, SdpaResult, solve

if TYPE_CHECKING:
    from typing_extensions import Unpack  # torch depends on it; typing has it from Python 3.11 on


@dataclass(frozen=True, slots=True, eq=False)
class Luck:
    """Errors of dq or dk that one unlucky rounding per query row explains.

    Attributes:
        error: Absolute errors in float64, in the gradient's shape.
        rows: Query rows, over all sequences and heads, that see a key.
    """

    error: Tensor
    rows: int


def luck_of_delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    exact: SdpaResult,
    **options: Unpack[AttentionOptions],
) -> dict[str, Luck]:
    """What dq and dk err by if every element of out is off by an eps, two unit roundoffs.

    ``delta = sum(grad_out * out)`` takes the rounded output, so its error is one number per query
    row and head, and all of dq and dk inherits it. Two correct kernels draw different numbers.
    Over many rows their sizes average out; over one to ten rows, and so in a block of keys that
    few rows see, the faithful reference may happen to draw almost none, and then no fixed factor
    of its error is fair to a kernel.

    The signs of the errors of out are taken as random. A rounded element is off by half a unit
    roundoff, more or less, so that the error of one row is a quarter of this, more or less. Two
    unit roundoffs rather than one are for what is seldom: half of this once rejected a correct
    kernel in some thousand cases of few rows.

    Args:
        query: ``[B, Sq, Hq, D]`` or packed ``[Tq, Hq, D]``; this and the rest as for
            ``reference_sdpa``.
        key: Likewise.
        value: Likewise.
        grad_out: Likewise.
        exact: What ``reference_sdpa`` returned for the same arguments, gradients included.
        **options: Likewise.

    Returns:
        Entries ``dq`` and ``dk``; empty where no row sees a key.
    """
    rows = 0 if exact.lse is None else int(exact.lse.isfinite().sum())
    if rows == 0:
        return {}
    problem = pack(query, key, value, grad_out, **options)
    shaken = solve(problem, Precision(output_error=torch.finfo(query.dtype).eps))
    luck: dict[str, Luck] = {}
    for name in ("dq", "dk"):
        error = (getattr(shaken, name) - getattr(exact, name)).abs()
        luck[name] = Luck(torch.where(error.isfinite(), error, 0.0), rows)
    return luck
