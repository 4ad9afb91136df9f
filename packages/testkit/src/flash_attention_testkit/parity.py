"""Is a kernel as right as its precision allows? The two-sided rule, and the same in every block.

For every tensor, with ``err = |actual - exact|`` and ``ref = |faithful - exact|``:

* ``max(err) <= k_max * max(ref) + eps(dtype) * max|exact|``: no element is far off;
* ``rms(err) <= k_rms * rms(ref)``: the whole is not worse than rounding explains;
* ``rms(err) <= k_local * rms(ref) + eps(dtype) * rms(exact)`` over every block of 32 rows of every
  sequence and head: and no part is wrong that is small beside the others.

The first alone misses a softmax scale that is 1 % off, the second alone a single wrong element.
Both miss what they measure on the scale of something larger: under a causal mask the gradients of
the first keys are a thousand times those of the last, which could be missing. The third finds that.
An absolute tolerance does none of it: loose enough for large inputs, it passes anything small.
The log-sum-exp is fp32 whatever the inputs are and has its own limit for every row, see
``ParityRule``. With few query rows the limits of dq and dk are wider, see ``luck_of_delta``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from flash_attention_testkit._references import References
from flash_attention_testkit._report import ParityReport, TensorParity
from flash_attention_testkit._rule import DEFAULT_RULE, ParityRule
from flash_attention_testkit.reference import AttentionOptions, SdpaResult

if TYPE_CHECKING:
    from typing_extensions import Unpack  # torch depends on it; typing has it from Python 3.11 on

__all__ = [
    "ParityReport",
    "ParityRule",
    "TensorParity",
    "assert_sdpa_parity",
    "measure_sdpa_parity",
]


def assert_sdpa_parity(
    label: object,
    actual: SdpaResult,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grad_out: Tensor | None = None,
    empty_lse: float = float("-inf"),
    rule: ParityRule = DEFAULT_RULE,
    **options: Unpack[AttentionOptions],
) -> ParityReport:
    """Raise unless an implementation's results are as right as their precision allows.

    Args:
        label: As for ``measure_sdpa_parity``, as are all other arguments.
        actual: What the implementation returned.
        query: What it was called with.
        key: Likewise.
        value: Likewise.
        grad_out: Likewise; None to leave the gradients out.
        empty_lse: The lse that rows without a visible key must have.
        rule: How much worse than the faithful reference the results may be.
        **options: Masking, scale and packing, as for ``reference_sdpa``.

    Returns:
        The report, every tensor of which passed.

    Raises:
        AssertionError: A tensor fails; the text names the case, the errors with their limits, the
            worst element, the worst block with its head, and what a kernel of this precision errs
            by.
        ValueError: The inputs do not fit together, or gradients came without ``grad_out``.
    """
    __tracebackhide__ = True
    report = measure_sdpa_parity(
        label,
        actual,
        query,
        key,
        value,
        grad_out=grad_out,
        empty_lse=empty_lse,
        rule=rule,
        **options,
    )
    if not report.passed:
        raise AssertionError(report.failure_text())
    return report


def measure_sdpa_parity(
    label: object,
    actual: SdpaResult,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    grad_out: Tensor | None = None,
    empty_lse: float = float("-inf"),
    rule: ParityRule = DEFAULT_RULE,
    **options: Unpack[AttentionOptions],
) -> ParityReport:
    """Compare an implementation's results with both references; a difference does not raise.

    Checked are shape, dtype, finiteness and the rule's three limits, for out; for lse where
    ``actual.lse`` is not None; and for dq, dk and dv where ``grad_out`` is given. Where the exact
    value is Inf or NaN the actual one must not be finite; where it exceeds the range of the dtype
    nothing is asked.

    Args:
        label: Names the case in the report; anything with a ``str``.
        actual: What the implementation returned: out, dq, dk, dv in the inputs' dtype, lse in
            float32; layouts as ``SdpaResult`` says.
        query: What it was called with: ``[B, S, H, D]``, or ``[T, H, D]`` with ``cu_seqlens``.
        key: Likewise.
        value: Likewise.
        grad_out: What out was differentiated with; the gradients in ``actual`` must then be there.
        empty_lse: The lse that rows without a visible key must have: ``-inf``, or ``inf`` for
            implementations that say so.
        rule: How much worse than the faithful reference the results may be.
        **options: Masking, scale and packing, as for ``reference_sdpa``.

    Returns:
        The report; its ``passed`` is the verdict and its ``str`` a table.

    Raises:
        ValueError: The inputs do not fit together, or gradients came without ``grad_out``.
    """
    names = ["out", *(["lse"] if actual.lse is not None else ())]
    if grad_out is not None:
        names += ["dq", "dk", "dv"]
    elif given := [name for name in ("dq", "dk", "dv") if getattr(actual, name) is not None]:
        raise ValueError(
            f"{label}: actual has {', '.join(given)}, but there is no grad_out to check them with; "
            "pass the gradient that out was differentiated with"
        )
    references = References.of(query, key, value, grad_out=grad_out, **options)
    tensors = (references.compare(name, getattr(actual, name), rule, empty_lse) for name in names)
    return ParityReport(str(label), tuple(tensors))
