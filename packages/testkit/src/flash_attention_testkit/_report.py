"""What a comparison found, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorParity:
    """One tensor against both references.

    Attributes:
        name: ``out``, ``lse``, ``dq``, ``dk`` or ``dv``.
        max_error: Largest distance from the exact value; inf where a finite value is missing.
        max_limit: What it may be at most; for lse the limit of the worst row.
        rms_error: Root mean square of the distances.
        rms_limit: What it may be at most.
        reference_max: What a faithful kernel of this precision errs by at most.
        reference_rms: Root mean square of a faithful kernel's errors.
        worst_index: Index of the element with the largest error (for lse: relative to its limit).
        worst_actual: What was found there.
        worst_exact: What belongs there.
        local_error: Root mean square of the distances in the worst block of one head, by its
            limit; 0 for lse, every row of which has its own limit.
        local_limit: What it may be at most; inf for lse.
        local_reference: Root mean square of a faithful kernel's errors in that block.
        local_place: Where that block is, as in ``sequence 0, keys 32 to 63, head 1``.
        problems: Anything that is no question of precision: shape, dtype, NaN, Inf.
    """

    name: str
    max_error: float = float("nan")
    max_limit: float = float("nan")
    rms_error: float = float("nan")
    rms_limit: float = float("nan")
    reference_max: float = float("nan")
    reference_rms: float = float("nan")
    worst_index: tuple[int, ...] = ()
    worst_actual: float = float("nan")
    worst_exact: float = float("nan")
    local_error: float = 0.0
    local_limit: float = float("inf")
    local_reference: float = 0.0
    local_place: str = ""
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong and all errors are within their limits."""
        overall = self.max_error <= self.max_limit and self.rms_error <= self.rms_limit
        return not self.problems and overall and self.local_error <= self.local_limit

    def failure_text(self) -> str:
        """What is wrong with this tensor, in full."""
        lines = [f"  {self.name}: {problem}" for problem in self.problems]
        if self.worst_index:
            index = ", ".join(str(place) for place in self.worst_index)
            lines.append(
                f"  {self.name}: max error {self.max_error:.3e} (limit {self.max_limit:.3e}), "
                f"rms error {self.rms_error:.3e} (limit {self.rms_limit:.3e}); worst at "
                f"{self.name}[{index}], which is {self.worst_actual:.6g} and should be "
                f"{self.worst_exact:.6g}; a kernel of this precision errs by max "
                f"{self.reference_max:.3e}, rms {self.reference_rms:.3e}"
            )
        if self.local_place:
            lines.append(
                f"  {self.name}: worst block: {self.local_place}; rms error there "
                f"{self.local_error:.3e} (local limit {self.local_limit:.3e}); a kernel of this "
                f"precision errs by rms {self.local_reference:.3e} there"
            )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class ParityReport:
    """One case: every tensor that was checked. ``str`` gives a table.

    Attributes:
        label: The case's name.
        tensors: One entry per checked tensor, in the order out, lse, dq, dk, dv.
    """

    label: str
    tensors: tuple[TensorParity, ...]

    @property
    def passed(self) -> bool:
        """Whether every tensor passed."""
        return all(tensor.passed for tensor in self.tensors)

    def __getitem__(self, name: str) -> TensorParity:
        """The entry of one tensor; KeyError lists those that were checked."""
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        checked = ", ".join(tensor.name for tensor in self.tensors)
        raise KeyError(f"{name!r} was not checked in {self.label!r}; checked were {checked}")

    def failure_text(self) -> str:
        """The case and everything that is wrong in it."""
        failed = [tensor for tensor in self.tensors if not tensor.passed]
        names = ", ".join(tensor.name for tensor in failed)
        texts = [tensor.failure_text() for tensor in failed]
        return "\n".join([f"{self.label}: {names} not as right as this precision allows", *texts])

    def __str__(self) -> str:
        """A table with one row per tensor: errors, limits, verdict."""
        header = (
            f"{'':4} {'max error':>10} {'limit':>10} {'rms error':>10} {'limit':>10} "
            f"{'in a block':>10} {'limit':>10}  {self.label}"
        )
        rows = [
            f"{tensor.name:4} {tensor.max_error:10.2e} {tensor.max_limit:10.2e} "
            f"{tensor.rms_error:10.2e} {tensor.rms_limit:10.2e} "
            f"{tensor.local_error:10.2e} {_limit(tensor.local_limit):>10}  "
            f"{'ok' if tensor.passed else 'FAILED'}"
            for tensor in self.tensors
        ]
        return "\n".join([header, *rows])


def _limit(limit: float) -> str:
    """A limit as a table shows it: a dash where there is none."""
    return "-" if limit == float("inf") else f"{limit:.2e}"
