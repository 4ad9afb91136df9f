"""How much further from the truth dq and dk may be where there are few query rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_attention_testkit._attention import Precision
from flash_attention_testkit._problem import pack
from flash_attention_testkit.reference import AttentionOptions, SdpaResult, solve

if TYPE_CHECKING:
    from typing_extensions import Unpack  # torch depends on it; typing has it from Python 3.11 on

FEW_ROWS = 1024
"""Beyond this many rows the allowance is a percent of the limit, and not worth a third pass."""


def few_rows_allowance(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    exact: SdpaResult,
    **options: Unpack[AttentionOptions],
) -> dict[str, Tensor]:
    """Errors of dq and dk that the luck of a few roundings explains.

    ``delta = sum(grad_out * out)`` takes the rounded output, so its error is one number per query
    row and head, and all of dq and dk inherits it. Two correct kernels draw different numbers.
    Over many rows their sizes average out; over one to ten rows the faithful reference may happen
    to draw almost none, and then no fixed factor of its error is fair to a kernel.

    The allowance is what dq and dk err by if every element of out is off by a unit roundoff
    (half an eps) with random signs, divided by the root of the number of rows. Over 4320 cases
    with 1 to 136 rows that see a key, a correct kernel needed at most 52 % of it.

    Args:
        query: ``[B, Sq, Hq, D]`` or packed ``[Tq, Hq, D]``; this and the rest as for
            ``reference_sdpa``.
        key: Likewise.
        value: Likewise.
        grad_out: Likewise.
        exact: What ``reference_sdpa`` returned for the same arguments, gradients included.
        **options: Likewise.

    Returns:
        ``dq`` and ``dk`` in float64; empty where there are many rows.
    """
    rows = 0 if exact.lse is None else int(exact.lse.isfinite().sum())  # those that see a key
    if not 0 < rows <= FEW_ROWS:
        return {}
    problem = pack(query, key, value, grad_out, **options)
    shaken = solve(problem, Precision(output_error=0.5 * torch.finfo(query.dtype).eps))
    allowance: dict[str, Tensor] = {}
    for name in ("dq", "dk"):
        error = (getattr(shaken, name) - getattr(exact, name)).abs()
        allowance[name] = torch.where(error.isfinite(), error, 0.0) / rows**0.5
    return allowance
