"""A record for a page, so that no figure in a page is ever typed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flash_attention_testkit.bench.record import BASES, TITLES, direction_of, means

__all__ = ["BEGIN", "END", "markdown", "with_table"]

BEGIN, END = "<!-- record:begin -->", "<!-- record:end -->"

COMPARED = ("ratio_to_flash", "ratio_to_cudnn")
"""The ratios that have a column."""

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")

Row = Mapping[str, Any]


def with_table(page: str, table: str) -> str:
    """`page` with `table` between its markers, each alone on a line.

    Raises:
        ValueError: The page lacks the markers.
    """
    lines = page.splitlines(keepends=True)
    alone = [line.strip() for line in lines]
    try:
        begin = alone.index(BEGIN)
        end = alone.index(END, begin)
    except ValueError:
        raise ValueError(
            f"the page lacks the markers {BEGIN} and {END}; add them, each on a line of its own"
        ) from None
    before, after = "".join(lines[: begin + 1]), "".join(lines[end:])
    return f"{before}\n{table}\n\n{after}"


def markdown(record: Mapping[str, Any], source: str) -> str:
    """The record as Markdown: what it depends on, a table for each grid, means, host times.

    Args:
        record: As `read_record` returns it.
        source: Where the record is, for the reader.
    """
    lines = [f"`{source}`: {_origin(record)}", ""]
    rows = record["rows"]
    grids = list(dict.fromkeys(row.get("grid", "") for row in rows))
    for grid in grids:
        mine = [row for row in rows if row.get("grid", "") == grid]
        if len(grids) > 1:
            lines += [f"**{grid}**", ""]
        lines += [*_table(mine), ""]
        found = _means(mine)
        if found:
            lines += [*found, ""]
    if record.get("host_us"):
        lines += ["Host time of one SDPA call without gradients, [1, 8, 128, 64] causal:", ""]
        lines += [f"- {what}: {value:.0f} us" for what, value in record["host_us"].items()]
    return "\n".join(lines).rstrip()


def _origin(record: Mapping[str, Any]) -> str:
    found = record["environment"]
    origin = (
        f"{found['gpu']}, torch {found['torch']}, cuDNN {found['cudnn']}, Triton "
        f"{found['triton']}, commit `{found['git_commit']}`, {found['date']}."
    )
    ceilings = record.get("ceilings", {})
    if {"matmul_tflops", "copy_gbs"} <= ceilings.keys():
        origin += (
            f" An 8192^3 bf16 matrix product ran at {ceilings['matmul_tflops']:.0f} TFLOP/s "
            f"there, a copy at {ceilings['copy_gbs']:.0f} GB/s."
        )
    return origin if record.get("finished", True) else f"{origin} The run did not finish."


def _table(rows: Sequence[Row]) -> list[str]:
    """One line for each cell: everybody's speed, then ratios of those that are not torch's."""
    impls = _in_order(row["impl"] for row in rows)
    others = [impl for impl in impls if impl not in TITLES]
    bases = [ratio for ratio in COMPARED if any(row.get(ratio) for row in rows)]
    ratios = [(impl, ratio) for impl in others for ratio in bases if BASES[ratio] in impls]
    decoding = all(row.get("gbs") is not None for row in rows)
    grouped = decoding or any(row["heads"] != row["kv_heads"] for row in rows)
    short = {"ratio_to_flash": "over FA2", "ratio_to_cudnn": "over cuDNN"}
    head = [
        *(["B", "Hq, Hkv"] if decoding else ["direction"]),
        *(["Hq, Hkv"] if grouped and not decoding else []),
        *("D", "S"),
        *([] if decoding else ["mask"]),
        *(TITLES.get(impl, impl) for impl in impls),
        *(short[ratio] if len(others) == 1 else f"{impl} {short[ratio]}" for impl, ratio in ratios),
    ]
    lines = [_line(head), "|" + "---|" * len(head)]
    for cell in _cells(rows):
        first = next(iter(cell.values()))
        heads = f"{first['heads']}, {first['kv_heads']}"
        length = f"{first['seq_len']} packed" if first.get("seq_lens") else str(first["seq_len"])
        lines.append(
            _line(
                [
                    *([str(first["batch"]), heads] if decoding else [direction_of(first)]),
                    *([heads] if grouped and not decoding else []),
                    *(str(first["head_dim"]), length),
                    *([] if decoding else ["causal" if first["causal"] else "full"]),
                    *(_speed(cell.get(impl)) for impl in impls),
                    *(_ratio(cell.get(impl), ratio) for impl, ratio in ratios),
                ]
            )
        )
    unit = "Microseconds, and GB/s of keys and values read" if decoding else "TFLOP/s"
    return [*lines, "", f"{unit}{_ending(len(ratios))}."]


def _ending(ratios: int) -> str:
    """What the last columns are, if there are any."""
    if ratios == 0:
        return ""
    number = _NUMBERS[ratios] if ratios < len(_NUMBERS) else str(ratios)
    which = "column is a ratio" if ratios == 1 else f"{number} columns are ratios"
    return f"; the last {which} of speed within the cell"


def _in_order(impls: Iterable[str]) -> list[str]:
    """Torch's own first, in the order of `TITLES`; the others as they come."""
    found = list(dict.fromkeys(impls))
    return [impl for impl in TITLES if impl in found] + [i for i in found if i not in TITLES]


def _cells(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """Rows of one cell together, by implementation."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    axes = (
        "direction",
        "head_dim",
        "seq_len",
        "causal",
        "batch",
        "heads",
        "kv_heads",
        "dtype",
        "grad_layout",
    )
    for row in rows:
        key = (
            *(row.get(axis) for axis in axes),
            row.get("deterministic", False),  # records from before it was noted have no such cells
            str(row.get("seq_lens")),
            row.get("query_len"),
        )
        cells.setdefault(key, {})[row["impl"]] = row
    return list(cells.values())


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _speed(row: Row | None) -> str:
    if row is None:
        return "-"
    gbs = row.get("gbs")
    return f"{row['tflops']:.0f}" if gbs is None else f"{row['ms'] * 1e3:.1f} us, {gbs:.0f}"


def _ratio(row: Row | None, ratio: str) -> str:
    return "-" if row is None or row.get(ratio) is None else f"{row[ratio]:.2f}"


def _means(rows: Sequence[Row]) -> list[str]:
    found = [one for one in means(rows) if one.impl not in TITLES and one.base in COMPARED]
    several = len({one.impl for one in found}) > 1
    return [
        f"- {f'{one.impl}, ' if several else ''}{one.direction} over {TITLES[BASES[one.base]]}: "
        f"geometric mean {one.mean:.2f}, worst cell {one.worst:.2f}"
        for one in sorted(found, key=lambda one: (one.impl, one.direction != "forward"))
    ]
