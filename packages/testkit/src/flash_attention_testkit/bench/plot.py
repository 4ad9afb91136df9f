"""Records as a figure: a panel for each direction, mask and head dimension.

What a panel shows is worked out without matplotlib, which only draws it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Panel", "draw", "panels"]

FORMATS = (".png", ".svg")


@dataclass(slots=True)
class Panel:
    """One set of axes.

    Attributes:
        title: Direction, mask and head dimension.
        unit: Of the values: `"TFLOP/s"` or `"GB/s"`.
        points: Labels along the x axis.
        series: By implementation: value, and its value at the slow and at the fast quartile, by
            point.
    """

    title: str
    unit: str
    points: list[str] = field(default_factory=list)
    series: dict[str, dict[str, tuple[float, float, float]]] = field(default_factory=dict)


def panels(records: Sequence[dict[str, Any]]) -> list[Panel]:
    """Sort the rows of all records into panels.

    A series is named for its implementation, and also for its GPU where records are of several.
    """
    gpus = {record["environment"].get("gpu", "?") for record in records}
    found: dict[tuple[str, bool, bool, int], Panel] = {}
    for record in records:
        suffix = f" ({record['environment'].get('gpu', '?')})" if len(gpus) > 1 else ""
        for row in record["rows"]:
            gbs = row.get("gbs")
            unit, value = ("TFLOP/s", row["tflops"]) if gbs is None else ("GB/s", gbs)
            mask = "causal" if row["causal"] else "full"
            title = f"{row['direction']}, {mask}, D {row['head_dim']}"
            # Forward above backward, full above causal, head dimensions from left to right.
            place = (unit, row["direction"] == "backward", row["causal"], row["head_dim"])
            panel = found.setdefault(place, Panel(title, unit))
            point = _point(row)
            if point not in panel.points:
                panel.points.append(point)
            low, high = row.get("ms_quartiles") or (row["ms"], row["ms"])
            values = (value, value * row["ms"] / high, value * row["ms"] / low)
            panel.series.setdefault(row["impl"] + suffix, {})[point] = values
    return [found[place] for place in sorted(found)]


def _point(row: dict[str, Any]) -> str:
    """Where a row stands on the x axis: its length, and its heads where they are grouped."""
    if row.get("gbs") is not None:
        return f"B{row['batch']} H{row['heads']}/{row['kv_heads']} S{row['seq_len']}"
    grouped = row.get("heads") != row.get("kv_heads")
    packed = " packed" if row.get("seq_lens") else ""
    return f"{row['seq_len']}{packed}" + (f" H{row['heads']}/{row['kv_heads']}" if grouped else "")


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw records into a file, bars with whiskers from quartile to quartile.

    Raises:
        ValueError: The file name ends in neither .png nor .svg, or there is nothing to draw.
        ModuleNotFoundError: matplotlib is not installed; names the extra that brings it.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path} should end in .png or .svg, the formats that are drawn")
    shown = panels(records)
    if not shown:
        raise ValueError("the records have no rows, so there is nothing to draw")
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "figures need matplotlib, which is not installed; install it with: "
            "pip install 'flash-attention-testkit[bench]'",
            name=error.name,
        ) from error
    across = min(3, max(len({panel.title.rpartition(" ")[2] for panel in shown}), 2), len(shown))
    down = -(-len(shown) // across)
    # Any: matplotlib is not needed to check the types of this package.
    figure: Any = figures.Figure(figsize=(4.6 * across, 3.2 * down + 0.6), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    names = list(dict.fromkeys(name for panel in shown for name in panel.series))
    for axis, panel in zip(axes.flat, shown, strict=False):
        _fill(axis, panel, names)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_axis_off()
    handles = [_patch(f"C{index}", name) for index, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(names)))
    figure.savefig(path, dpi=150)


def _patch(colour: str, name: str) -> Any:
    return importlib.import_module("matplotlib.patches").Patch(color=colour, label=name)


def _fill(axis: Any, panel: Panel, names: Sequence[str]) -> None:
    """Draw one panel; an implementation has the same colour in all of them."""
    present = [name for name in names if name in panel.series]
    width = 0.8 / len(present)
    for place, name in enumerate(present):
        for index, point in enumerate(panel.points):
            if point not in panel.series[name]:
                continue
            value, slow, fast = panel.series[name][point]
            whisker = [[max(0.0, value - slow)], [max(0.0, fast - value)]]
            x = index + (place - (len(present) - 1) / 2) * width
            colour = f"C{names.index(name)}"
            axis.bar(x, value, width * 0.92, color=colour, yerr=whisker, ecolor="0.3")
    axis.set_title(panel.title, fontsize=10)
    axis.set_ylabel(panel.unit)
    axis.set_xlabel("sequence length" if panel.unit == "TFLOP/s" else "shape", fontsize=8)
    axis.set_xticks(range(len(panel.points)), panel.points, fontsize=8)
    axis.tick_params(axis="x", rotation=20 if max(map(len, panel.points)) > 8 else 0)
    axis.spines[["top", "right"]].set_visible(False)
