"""What committed measurements say: the kernels' speed beside what torch itself would run.

The rule of the family: the kernels are recommended on a compute capability where their geometric
mean is at least that of torch's choice, at each head dim and in each direction that was measured,
and nothing is known to be slower beside them. Where nothing is listed nobody had such a GPU at
hand, and they are not recommended.

Speeds are from the records in docs/benchmarks/results, which tests/test_benchmarks.py reads again.
They have head dims 64, 128 and 256, dense, full and causal, both directions of one finished run.
What is slower besides stands in no record, but in rows of the notebook, docs/kernels/fa4-triton.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["MEASURED", "Evidence", "why_slower"]

# The same names as in `fa4_triton.hopper`, which must not be imported here: it needs Triton.
Direction = Literal["forward", "backward"]
Speeds = Mapping[int, float]


@dataclass(frozen=True)
class Evidence:
    """Of one compute capability.

    Attributes:
        rival: What torch runs there.
        records: The file that each direction's numbers are from.
        speeds: By direction and head dim: speed over the rival's, geometric mean of six cells.
        besides: What is slower where the records do not reach, from rows of the notebook.
    """

    rival: str
    records: Mapping[Direction, str]
    speeds: Mapping[Direction, Speeds]
    besides: str | None = None


MEASURED: dict[tuple[int, int], Evidence] = {
    (9, 0): Evidence(
        "cuDNN's attention",
        {
            "forward": "nvidia-h100-fa4-triton-hopper.json",
            "backward": "nvidia-h100-fa4-triton-hopper.json",
        },
        {
            "forward": {64: 1.09, 128: 1.06, 256: 1.05},
            "backward": {64: 1.09, 128: 1.13, 256: 1.29},
        },
        "the forward of head dims 136 to 192, which is padded to 256, has 0.83 to 0.92",
    ),
}
"""By compute capability."""


def why_slower(capability: tuple[int, int]) -> str | None:
    """What the measurements say against the kernels on a compute capability, or None."""
    where = f"compute capability {capability[0]}.{capability[1]}"
    evidence = MEASURED.get(capability)
    if evidence is None:
        return f"not yet measured against stock on {where}"
    slower = {
        direction: {head_dim: speed for head_dim, speed in speeds.items() if speed < 1}
        for direction, speeds in evidence.speeds.items()
    }
    told = [
        f"in the {direction} these kernels have {_listed(speeds)}"
        for direction, speeds in slower.items()
        if speeds
    ]
    if evidence.besides is not None:
        told.append(evidence.besides)
    if not told:
        return None
    won = [f"the {direction} is no slower" for direction, speeds in slower.items() if not speeds]
    if len(won) == len(slower):
        won = ["all that the records hold is no slower"]
    return (
        f"{evidence.rival}, which torch runs on {where}, is faster: "
        f"{'; '.join(told)} of its speed{''.join(f', {text}' for text in won)}"
    )


def _listed(speeds: Speeds) -> str:
    parts = [f"{speed:.2f} (head dim {head_dim})" for head_dim, speed in speeds.items()]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
