"""One tensor of an implementation against both references."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attention_testkit._report import TensorParity

FP32_EPS = torch.finfo(torch.float32).eps


def compare(
    name: str,
    actual: Tensor,
    exact: Tensor,
    faithful: Tensor,
    k_max: float,
    k_rms: float,
    allowance: Tensor | None = None,
) -> TensorParity:
    """The two-sided rule for out or a gradient, all three tensors of one shape.

    Args:
        name: Names the tensor in the report.
        actual: What was found, in the inputs' dtype.
        exact: float64.
        faithful: In the inputs' dtype.
        k_max: Factor of the largest error.
        k_rms: Factor of the root mean square error.
        allowance: Errors that may come on top, in the same shape.
    """
    comparable = exact.isfinite() & faithful.isfinite()
    error = _error(actual, exact, comparable)
    reference = _error(faithful, exact, comparable)
    largest = largest_of(torch.where(exact.isfinite(), exact.abs(), 0.0))
    rounding = torch.finfo(actual.dtype).eps * largest
    # One fp32 unit, so that a kernel may err at all where the faithful reference happens not to.
    negligible = FP32_EPS * largest
    extra = torch.zeros_like(exact) if allowance is None else allowance
    max_limit = k_max * largest_of(reference) + rounding + largest_of(extra)
    return _describe(
        name,
        actual,
        exact,
        error,
        max_limit=torch.full_like(error, max_limit),
        rms_limit=k_rms * _rms(reference) + negligible + _rms(extra),
        reference=reference,
        problems=_finiteness_problems(actual, exact, comparable),
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
    worst = tuple(int(place) for place in torch.unravel_index(share.argmax(), error.shape))
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


def largest_of(values: Tensor) -> float:
    """The largest value, 0 if there is none."""
    return float(values.max()) if values.numel() else 0.0


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
