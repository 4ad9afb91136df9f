"""One tensor of an implementation against both references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flash_attention_testkit._blocks import Blocks
from flash_attention_testkit._luck import Luck
from flash_attention_testkit._report import TensorParity
from flash_attention_testkit._rule import ParityRule

FP32_EPS = torch.finfo(torch.float32).eps


def compare(
    name: str,
    actual: Tensor,
    exact: Tensor,
    faithful: Tensor,
    rule: ParityRule,
    blocks: Blocks,
    luck: Luck | None = None,
) -> TensorParity:
    """The rule for out or a gradient, all three tensors of one shape: overall and by blocks.

    Args:
        name: Names the tensor in the report.
        actual: What was found, in the inputs' dtype.
        exact: float64.
        faithful: In the inputs' dtype.
        rule: Factors of the faithful reference's errors.
        blocks: The tensor's rows.
        luck: Errors that may come on top: divided by the root of the number of rows overall,
            undivided in a block, for one row may matter there.
    """
    comparable = exact.isfinite() & faithful.isfinite()
    error = _error(actual, exact, comparable)
    reference = _error(faithful, exact, comparable)
    largest = largest_of(torch.where(exact.isfinite(), exact.abs(), 0.0))
    rounding = torch.finfo(actual.dtype).eps * largest
    # One fp32 unit, so that a kernel may err at all where the faithful reference happens not to.
    negligible = FP32_EPS * largest
    unlucky = torch.zeros_like(exact) if luck is None else luck.error
    few = 1.0 if luck is None else luck.rows**-0.5
    max_limit = rule.k_max * largest_of(reference) + rounding + few * largest_of(unlucky)
    whole = _describe(
        name,
        actual,
        exact,
        error,
        max_limit=torch.full_like(error, max_limit),
        rms_limit=rule.k_rms * _rms(reference) + negligible + few * _rms(unlucky),
        reference=reference,
        problems=_finiteness_problems(actual, exact, comparable),
    )
    sizes = torch.where(comparable, exact, 0.0)
    local_limit = (
        rule.k_local * blocks.rms(reference)
        + _roundings(blocks.rms(sizes), actual.dtype)
        + blocks.rms(unlucky)
    )
    return _add_worst_block(whole, blocks, blocks.rms(error), local_limit, blocks.rms(reference))


def _roundings(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Two unit roundoffs of values of this size, and one unit of the smallest values there are."""
    info = torch.finfo(dtype)
    return info.eps * size + info.eps * info.smallest_normal


def _add_worst_block(
    whole: TensorParity, blocks: Blocks, error: Tensor, limit: Tensor, reference: Tensor
) -> TensorParity:
    """The comparison with its worst block, by errors and limits ``[blocks, H]``, added to it."""
    if error.numel() == 0:
        return whole
    worst = (error / limit).argmax()
    block, head = place_of(int(worst), error.shape)
    what = "keys" if whole.name in ("dk", "dv") else "rows"
    return replace(
        whole,
        local_error=float(error[block, head]),
        local_limit=float(limit[block, head]),
        local_reference=float(reference[block, head]),
        local_place=f"{blocks.describe(block, what)}, head {head}",
    )


def compare_lse(
    actual: Tensor,
    exact: Tensor,
    faithful: Tensor,
    tolerance: float,
    noise: float,
    empty_lse: float,
) -> TensorParity:
    """The rule for lse: each row by its own limit, empty rows by equality.

    Args:
        actual: What was found, float32.
        exact: float64, -inf in rows without a visible key.
        faithful: float32.
        tolerance: Error allowed, absolute up to 1 and relative beyond.
        noise: Error allowed on top of that.
        empty_lse: What rows without a visible key must have.
    """
    empty = exact.isneginf()
    comparable = exact.isfinite() & faithful.isfinite()
    error = _error(actual, exact, comparable)
    magnitude = torch.where(comparable, exact.abs(), 0.0).clamp(min=1.0)
    limit = tolerance * magnitude + noise
    problems = _finiteness_problems(actual, exact, comparable, but_not=empty)
    wrong = empty & (actual != empty_lse)
    if wrong.any():
        index, text = _first(wrong)
        problems += (
            f"{text} rows without a visible key are not {empty_lse}, the first at {index}, where "
            f"it is {float(actual[tuple(index)])}",
        )
    return _describe(
        "lse",
        actual,
        exact,
        error,
        max_limit=limit,
        rms_limit=_rms(limit),
        reference=_error(faithful, exact, comparable),
        problems=problems,
    )


def _describe(
    name: str,
    actual: Tensor,
    exact: Tensor,
    error: Tensor,
    *,
    max_limit: Tensor,
    rms_limit: float,
    reference: Tensor,
    problems: tuple[str, ...],
) -> TensorParity:
    if error.numel() == 0:
        return TensorParity(name, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, problems=problems)
    # Relative to the limit; the smallest float stands in for a limit of zero.
    share = error / max_limit.clamp(min=torch.finfo(torch.float64).tiny)
    worst = place_of(int(share.argmax()), error.shape)
    return TensorParity(
        name,
        max_error=float(error[worst]),
        max_limit=float(max_limit[worst]),
        rms_error=_rms(error),
        rms_limit=rms_limit,
        reference_max=largest_of(reference),
        reference_rms=_rms(reference),
        worst_index=worst,
        worst_actual=float(actual[worst]),
        worst_exact=float(exact[worst]),
        problems=problems,
    )


def _error(actual: Tensor, exact: Tensor, comparable: Tensor) -> Tensor:
    """Distances in float64; inf where a comparable value is not finite, 0 where none is asked."""
    wide = actual.double()
    distance = torch.where(wide.isfinite(), (wide - exact).abs(), float("inf"))
    return torch.where(comparable, distance, 0.0)


def _finiteness_problems(
    actual: Tensor, exact: Tensor, comparable: Tensor, but_not: Tensor | None = None
) -> tuple[str, ...]:
    problems: list[str] = []
    lost = comparable & ~actual.isfinite()
    if lost.any():
        index, text = _first(lost)
        problems.append(f"{text} elements are NaN or Inf and should be finite, first at {index}")
    hidden = ~exact.isfinite() & actual.isfinite()
    if but_not is not None:
        hidden &= ~but_not
    if hidden.any():
        index, text = _first(hidden)
        problems.append(
            f"{text} elements are finite, though an Inf or NaN among the inputs reaches them, "
            f"first at {index}"
        )
    return tuple(problems)


def _first(mask: Tensor) -> tuple[list[int], str]:
    places = mask.nonzero()
    return places[0].tolist(), f"{len(places)} of {mask.numel()}"


def place_of(number: int, shape: Sequence[int]) -> tuple[int, ...]:
    """The index of an element by its number; `torch.unravel_index` would import sympy for it."""
    place: list[int] = []
    for size in reversed(shape):
        number, rest = divmod(number, size)
        place.insert(0, rest)
    return tuple(place)


def largest_of(values: Tensor) -> float:
    """The largest value, 0 if there is none."""
    return float(values.max()) if values.numel() else 0.0


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
