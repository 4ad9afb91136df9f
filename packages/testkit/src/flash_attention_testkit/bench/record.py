"""Figures as rows, rows as a record, records as JSON."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash_attention_testkit.bench.grids import Cell

if TYPE_CHECKING:
    from flash_attention_testkit.bench.measure import CellFigures

__all__ = [
    "BASES",
    "TITLES",
    "Mean",
    "direction_of",
    "fingerprint",
    "means",
    "read_record",
    "rows_of",
    "skipped_of",
    "write_record",
]

BASES = {
    "ratio_to_flash": "torch:flash",
    "ratio_to_cudnn": "torch:cudnn",
    "ratio_to_efficient": "torch:efficient",
    "ratio_to_native": "native",
}
"""Ratios of speed in a row, and to whom: above 1 is faster than they."""

TITLES = {
    "torch:flash": "FlashAttention-2",
    "torch:cudnn": "cuDNN",
    "torch:efficient": "efficient",
    "native": "native",
}
"""What torch's own kernels are called in tables and figures, in the order of their columns."""


def rows_of(
    grid: str, cell: Cell, figures: CellFigures, ceilings: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One row for each implementation that was measured in a cell of a grid.

    A ratio is None where the other has no figures; a share, where there is no ceiling to share.
    """
    rows = []
    for impl, found in figures.measured.items():
        ms = found.ms.median
        gbs = cell.key_value_bytes / ms / 1e6 if cell.is_decode else None
        tflops = cell.flops / ms / 1e9
        reached, limit = (tflops, "matmul_tflops") if gbs is None else (gbs, "copy_gbs")
        row: dict[str, Any] = {
            "impl": impl,
            "grid": grid,
            **_described(cell),
            "ms": _rounded(ms),
            "ms_quartiles": [_rounded(found.ms.low), _rounded(found.ms.high)],
            "rounds": found.rounds,
            "tflops": _rounded(tflops),
            "gbs": _rounded(gbs),
        }
        for ratio, base in BASES.items():
            other = figures.measured.get(base)
            row[ratio] = None if other is None else _rounded(other.ms.median / ms)
        row["share_of_ceiling"] = _rounded(reached / ceilings[limit]) if limit in ceilings else None
        row["host_us"] = round(found.host_us, 1)
        row["peak_mib"] = None if found.peak_mib is None else round(found.peak_mib, 1)
        rows.append(row)
    return rows


def direction_of(row: Mapping[str, Any]) -> str:
    """What tables call a row's direction; says too if its gradients were to repeat."""
    direction: str = row["direction"]
    return f"{direction}, deterministic" if row.get("deterministic") else direction


def skipped_of(grid: str, cell: Cell, figures: CellFigures) -> list[dict[str, Any]]:
    """One entry for each implementation without figures in a cell, with the reason."""
    return [
        {"impl": impl, "grid": grid, **_described(cell), "reason": reason}
        for impl, reason in figures.skipped.items()
    ]


def _described(cell: Cell) -> dict[str, Any]:
    described = asdict(cell)
    described["query_len"] = cell.rows
    described["seq_lens"] = list(cell.seq_lens)
    return described


def _rounded(value: float | None) -> float | None:
    """Four digits: more than times repeat to, and as many for the interpreter as for a GPU."""
    return None if value is None else float(f"{value:.4g}")


@dataclass(frozen=True, slots=True)
class Mean:
    """Ratios of one implementation's speed to another's, over the cells that both ran.

    Attributes:
        impl: Whose speed.
        grid: Of which cells; empty in records from before grids were noted.
        direction: Of which cells.
        base: A key of `BASES`.
        mean: Geometric mean.
        worst: Smallest.
    """

    impl: str
    grid: str
    direction: str
    base: str
    mean: float
    worst: float


def means(rows: Iterable[Mapping[str, Any]]) -> list[Mean]:
    """Means over each grid and direction; nobody is compared with itself."""
    found: dict[tuple[str, str, str, str], list[float]] = {}
    for row in rows:
        for base, impl in BASES.items():
            if row.get(base) and row["impl"] != impl:
                key = (row["impl"], row.get("grid", ""), row["direction"], base)
                found.setdefault(key, []).append(row[base])
    return [
        Mean(*key, math.exp(statistics.fmean(map(math.log, ratios))), min(ratios))
        for key, ratios in found.items()
    ]


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON; what stood there before stays until the new one is whole."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def fingerprint(record: Mapping[str, Any]) -> str:
    """What tells a record from any other; figures carry it."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.

    Raises:
        ValueError: The file is no record; says what is missing.
        OSError: It cannot be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no benchmark record: it is not JSON ({error})") from error
    needed: Sequence[str] = ("environment", "rows")
    missing = [name for name in needed if not isinstance(record, dict) or name not in record]
    if missing:
        raise ValueError(
            f"{path} is no benchmark record: it lacks {' and '.join(missing)}; "
            "flash-attention-bench --output writes one"
        )
    fields = ("impl", "direction", "head_dim", "seq_len", "causal", "ms", "tflops")
    for number, row in enumerate(record["rows"]):
        lacking = [name for name in fields if name not in row]
        if lacking:
            raise ValueError(f"{path} is no benchmark record: row {number} lacks {lacking}")
    return dict(record)
