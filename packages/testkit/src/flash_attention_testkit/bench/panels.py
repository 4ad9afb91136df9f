"""What a figure shows, worked out without drawing it: rows of panels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flash_attention_testkit.bench.grids import DIRECTIONS
from flash_attention_testkit.bench.record import BASES, TITLES

__all__ = ["Panel", "names_of", "panels", "title_of"]

Row = Mapping[str, Any]
Value = tuple[float, float, float]
"""A value, and the same at the slow and at the fast quartile."""


@dataclass(slots=True)
class Panel:
    """One set of axes.

    Attributes:
        title: What all of its cells have in common.
        unit: Of the values.
        is_ratio: Whether the values are ratios of speed.
        points: Labels along the x axis.
        series: By implementation: values by point.
    """

    title: str
    unit: str
    is_ratio: bool = False
    points: list[str] = field(default_factory=list)
    series: dict[str, dict[str, Value]] = field(default_factory=dict)


def panels(
    records: Mapping[str, Mapping[str, Any]],
    *,
    directions: Collection[str] = DIRECTIONS,
    grids: Collection[str] | None = None,
    impls: Collection[str] | None = None,
    ratio_to: str | None = None,
) -> list[list[Panel]]:
    """Sort the rows of records into rows of panels.

    Forward stands above backward, full above causal, head dimensions and groups of heads side by
    side. Decoding has a row of its own, in GB/s; so have packed sequences.

    Args:
        records: By the name of their file. Where there are several, series are also named for the
            GPU, or for the file if a GPU has more than one.
        directions: Of the rows to show.
        grids: Of the rows to show; None for all. Old records name no grid, which is `""`.
        impls: Of the rows to show; None for all.
        ratio_to: Show ratios of speed to this one: `"flash"`, `"cudnn"`, `"efficient"` or
            `"native"`; None for speeds.
    """
    found: dict[tuple[Any, ...], dict[tuple[Any, ...], Panel]] = {}
    for name, record in records.items():
        suffix = _suffix(name, records)
        for row in record["rows"]:
            if row["direction"] not in directions:
                continue
            if grids is not None and row.get("grid", "") not in grids:
                continue
            if impls is not None and row["impl"] not in impls:
                continue
            value = _value(row, ratio_to)
            if value is None:
                continue
            line, place, title, point = _place(row)
            fresh = Panel(title, _unit(row, ratio_to), ratio_to is not None)
            panel = found.setdefault(line, {}).setdefault(place, fresh)
            series = panel.series.setdefault(TITLES.get(row["impl"], row["impl"]) + suffix, {})
            if point in series:  # cells of an own grid may differ in what is seldom told
                point = f"{point}\nB {row['batch']}, heads {row['heads']}"
            if point not in panel.points:
                panel.points.append(point)
            series[point] = value
    return [[row[place] for place in sorted(row)] for _, row in sorted(found.items())]


def _suffix(name: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    if len(records) == 1:
        return ""
    gpus = [record["environment"].get("gpu", "?") for record in records.values()]
    distinct = len(set(gpus)) == len(gpus)
    return f" ({records[name]['environment'].get('gpu', '?') if distinct else name})"


def _unit(row: Row, ratio_to: str | None) -> str:
    if ratio_to is not None:
        return f"speed over {TITLES[BASES[f'ratio_to_{ratio_to}']]}"
    return "TFLOP/s" if row.get("gbs") is None else "GB/s"


def _value(row: Row, ratio_to: str | None) -> Value | None:
    """What a row contributes, if anything; nobody is compared with itself."""
    if ratio_to is None:
        value = row["tflops"] if row.get("gbs") is None else row["gbs"]
    else:
        base = f"ratio_to_{ratio_to}"
        value = None if row["impl"] == BASES[base] else row.get(base)
    if value is None:
        return None
    low, high = row.get("ms_quartiles") or (row["ms"], row["ms"])
    return (value, value * row["ms"] / high, value * row["ms"] / low)


def _place(row: Row) -> tuple[tuple[Any, ...], tuple[Any, ...], str, str]:
    """Where a row of a record stands: row of panels, panel, the panel's title, point."""
    mask = "causal" if row["causal"] else "full"
    backward = row["direction"] == "backward"
    heads = f"{row.get('heads')}/{row.get('kv_heads')}"
    dtype = "" if row.get("dtype", "bfloat16") == "bfloat16" else f", {row['dtype']}"
    dim = f"head dim {row['head_dim']}{dtype}"
    place: tuple[Any, ...] = (row["head_dim"], dtype)
    if row.get("gbs") is not None:
        point = f"B {row['batch']}\nheads {heads}\nS {row['seq_len']}"
        return (3,), place, f"decode, {dim}", point
    if row.get("seq_lens"):
        title = f"{row['direction']}, {len(row['seq_lens'])} packed sequences, {dim}"
        return (2,), (backward, *place), title, mask
    if row.get("heads") != row.get("kv_heads"):
        title = f"{row['direction']}, {mask}, heads {heads}, {dim}"
        groups = (row["heads"] / row["kv_heads"], row["heads"])
        return (1, backward, row["causal"]), (*place, *groups), title, f"S {row['seq_len']}"
    title = f"{row['direction']}, {mask}, {dim}"
    return (0, backward, row["causal"]), place, title, f"S {row['seq_len']}"


def names_of(rows: Sequence[Sequence[Panel]]) -> list[str]:
    """Everybody who has a series, torch's own first."""
    found = dict.fromkeys(name for row in rows for panel in row for name in panel.series)
    titles = list(dict.fromkeys([*TITLES.values(), *map(title_of, found)]))
    return sorted(found, key=lambda name: titles.index(title_of(name)))


def title_of(name: str) -> str:
    """The name of a series without the GPU or the file."""
    return name.partition(" (")[0]
