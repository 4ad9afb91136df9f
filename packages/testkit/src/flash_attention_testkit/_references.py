"""Both references of one problem, kept so that several results can be compared with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_attention_testkit._blocks import Blocks
from flash_attention_testkit._compare import compare, compare_lse, largest_of
from flash_attention_testkit._luck import Luck, luck_of_delta
from flash_attention_testkit._problem import pack
from flash_attention_testkit._report import TensorParity
from flash_attention_testkit._rule import DEFAULT_RULE, ParityRule
from flash_attention_testkit.reference import (
    AttentionOptions,
    SdpaResult,
    faithful_sdpa,
    reference_sdpa,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack  # torch depends on it; typing has it from Python 3.11 on


@dataclass(frozen=True, slots=True, eq=False)
class References:
    """What is right for one problem, and how far from it a kernel may be.

    Attributes:
        exact: In float64; without gradients if there was no ``grad_out``.
        faithful: With a kernel's roundings, in a kernel's dtypes; likewise.
        luck: Additional errors of dq and dk, see ``luck_of_delta``.
        rows: Blocks of the query's rows.
        keys: Blocks of the key's rows.
        noise: Error of lse that sums of large products explain.
    """

    exact: SdpaResult
    faithful: SdpaResult
    luck: dict[str, Luck]
    rows: Blocks
    keys: Blocks
    noise: float

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        grad_out: Tensor | None = None,
        **options: Unpack[AttentionOptions],
    ) -> References:
        """The references of a problem; arguments as for ``reference_sdpa``."""
        exact = reference_sdpa(query, key, value, grad_out=grad_out, **options)
        luck: dict[str, Luck] = {}
        if grad_out is not None:
            luck = luck_of_delta(query, key, value, grad_out, exact, **options)
        spans = pack(query, key, value, grad_out, **options).spans
        rows, keys = (Blocks.of([span[side] for span in spans], query.device) for side in (0, 1))
        largest = _largest_score(query, key, options.get("scale"))
        return cls(
            exact=exact,
            faithful=faithful_sdpa(query, key, value, grad_out=grad_out, **options),
            luck=luck,
            rows=rows,
            keys=keys,
            noise=2 * torch.finfo(torch.float32).eps * largest,
        )

    def compare(
        self,
        name: str,
        actual: Tensor | None,
        rule: ParityRule = DEFAULT_RULE,
        empty_lse: float = float("-inf"),
    ) -> TensorParity:
        """One tensor of an implementation against both references.

        Args:
            name: ``out``, ``lse``, ``dq``, ``dk`` or ``dv``.
            actual: What the implementation returned.
            rule: How much worse than the faithful reference it may be.
            empty_lse: The lse that rows without a visible key must have.
        """
        truth, near = getattr(self.exact, name), getattr(self.faithful, name)
        problem = _form_problem(actual, near)
        if problem is not None or actual is None:
            return TensorParity(name, problems=(str(problem),))
        if name == "lse":
            return compare_lse(actual, truth, near, rule.lse_tolerance, self.noise, empty_lse)
        blocks = self.keys if name in ("dk", "dv") else self.rows
        return compare(name, actual, truth, near, rule, blocks, self.luck.get(name))


def _form_problem(actual: Tensor | None, faithful: Tensor) -> str | None:
    """What is wrong with a tensor before one looks at its values."""
    if actual is None:
        return "is missing, though grad_out was given"
    if actual.shape != faithful.shape:
        return f"has shape {list(actual.shape)}, but should have {list(faithful.shape)}"
    if actual.dtype != faithful.dtype:
        return f"is {actual.dtype}, but should be {faithful.dtype}"
    if actual.device != faithful.device:
        return f"is on {actual.device}, but should be on {faithful.device}"
    return None


def _largest_score(query: Tensor, key: Tensor, scale: float | None) -> float:
    """The largest score, scaled, that the norms of these queries and keys allow."""
    factor = query.shape[-1] ** -0.5 if scale is None else abs(scale)
    norms = (torch.linalg.vector_norm(tensor.double(), dim=-1) for tensor in (query, key))
    largest = [largest_of(torch.where(norm.isfinite(), norm, 0.0)) for norm in norms]
    return factor * largest[0] * largest[1]
