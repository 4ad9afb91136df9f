"""A run from names and cells to a record, which is written after every cell."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flash_attention_registry import explain_flash_attention_impls
from flash_attention_testkit.bench import measure
from flash_attention_testkit.bench.backends import NATIVE, STOCK, StaysInstalledError
from flash_attention_testkit.bench.environment import environment
from flash_attention_testkit.bench.grids import Cell
from flash_attention_testkit.bench.record import rows_of, skipped_of, write_record
from flash_attention_testkit.bench.table import bar

__all__ = ["Contestants", "contestants", "device_to_measure", "run"]


def device_to_measure() -> str | None:
    """`"cuda"`; `"cpu"` if Triton's interpreter is asked for; None if there is neither."""
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y"):
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


@dataclass(frozen=True, slots=True)
class Contestants:
    """Who is measured.

    Attributes:
        names: In their order.
        unusable: Why others that were asked for cannot be.
        versions: Implementations among `names`, with their versions where they are known.
    """

    names: Sequence[str]
    unusable: Mapping[str, str]
    versions: Sequence[str]


def contestants(asked: Sequence[str], only: bool, device: str) -> Contestants:
    """Find out who can be measured.

    Args:
        asked: Of `STOCK`, or names of the registry; empty is all that can run here.
        only: Whether torch's own kernels are left out unless they are asked for.
        device: `"cuda"` or `"cpu"`.

    Raises:
        ValueError: A name is unknown; lists the known ones.
    """
    reports = {report.name: report for report in explain_flash_attention_impls()}
    unknown = [name for name in asked if name not in reports and name not in STOCK]
    if unknown:
        raise ValueError(
            f"unknown: {', '.join(unknown)}; there are {', '.join([*STOCK, *sorted(reports)])}. "
            "What is not installed can be registered with --register MODULE:FUNCTION"
        )
    stock = list(STOCK) if device == "cuda" else [NATIVE, "torch:flash"]
    wanted = list(asked) or [name for name, report in reports.items() if report.available]
    names = list(dict.fromkeys(wanted if only else [*stock, *wanted]))
    unusable = {
        name: reports[name].unavailable_reason or "not available"
        for name in names
        if name in reports and not reports[name].available
    }
    names = [name for name in names if name not in unusable]
    known = [reports[name] for name in names if name in reports]
    versions = [" ".join(filter(None, (report.name, report.version))) for report in known]
    return Contestants(names, unusable, versions)


def run(
    cells: Sequence[tuple[str, Cell]],
    who: Contestants,
    budget_s: float,
    device: str,
    commit: str,
    output: Path | None = None,
) -> dict[str, Any]:
    """Measure cell after cell; shows progress on stderr.

    Args:
        cells: Each with the name of its grid.
        who: Takes part.
        budget_s: Seconds for a cell's rounds; what is compiled and planned comes on top.
        device: `"cuda"` or `"cpu"`.
        commit: For the record.
        output: Where the record is written, after every cell.

    Returns:
        The record. `finished` is False in it if the run was interrupted, or could not go on.
    """
    record: dict[str, Any] = {
        "environment": environment(device, commit, who.versions),
        "finished": False,
        "ceilings": {},
        "host_us": {},
        "rows": [],
        "skipped": [{"impl": name, "reason": reason} for name, reason in who.unusable.items()],
    }
    began = time.monotonic()

    def show(done: int, text: str) -> None:
        _show(f"{bar(done, len(cells), text)}  {time.monotonic() - began:.0f} s", done, len(cells))

    try:
        clock = measure.clock_of(device)
        if device == "cuda":
            show(0, "host times and ceilings")
            # First of all, while the registry does not yet stand at torch's ops.
            record["host_us"] = measure.host_times(who.names)
            record["ceilings"] = measure.ceilings(clock)
        for done, (grid, cell) in enumerate(cells):
            show(done, str(cell))
            figures = measure.measure_cell(cell, who.names, budget_s, device, clock)
            record["rows"] += rows_of(grid, cell, figures, record["ceilings"])
            record["skipped"] += skipped_of(grid, cell, figures)
            record["finished"] = done + 1 == len(cells)
            if output is not None and record["rows"]:
                write_record(output, record)
    except (KeyboardInterrupt, StaysInstalledError) as error:
        print(f"\nended early: {str(error) or 'interrupted'}", file=sys.stderr)
    else:
        show(len(cells), "done")
    return record


def _show(line: str, done: int, total: int) -> None:
    """In one place of a terminal, line by line in a file."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\x1b[K{line[:100]}", end=end, file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)
