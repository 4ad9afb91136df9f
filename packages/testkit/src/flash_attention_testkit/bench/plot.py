"""Panels as a figure."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flash_attention_testkit.bench.grids import DIRECTIONS
from flash_attention_testkit.bench.panels import Panel, names_of, panels, title_of
from flash_attention_testkit.bench.record import TITLES, fingerprint

__all__ = ["draw"]

FORMATS = (".png", ".svg")
COLUMNS = 3
WIDTH, ROW_HEIGHT, AROUND = 10.5, 2.6, 0.9
"""Inches: of a figure, of a row of panels, for legend and origin."""

MOST_NUMBERS = 7
"""Series in a panel whose bars are wide enough for numbers."""

STOCK_COLOURS = dict(
    zip(TITLES.values(), ("#8fb3d9", "#1f4e79", "#c9d3dc", "#8a8f94"), strict=True)
)
"""Torch's kernels are shades of blue and grey, so that the others stand out."""

COLOURS = ("#e8710a", "#7b3fa0", "#2a9d5c", "#c2255c", "#0b9aa6")
PALER = (0.0, 0.45, 0.7)
"""By record, where there are several: how much white is mixed into the colours."""


def draw(
    records: Mapping[str, Mapping[str, Any]],
    path: Path,
    *,
    directions: Collection[str] = DIRECTIONS,
    grids: Collection[str] | None = None,
    impls: Collection[str] | None = None,
    ratio_to: str | None = None,
) -> None:
    """Draw records into a file: bars, with whiskers from quartile to quartile.

    Args:
        records: By the name of their file; the figure carries their fingerprints.
        path: Ends in .png or .svg.
        directions: See `panels`, also for the other arguments.
        grids: Of the rows to show.
        impls: Of the rows to show.
        ratio_to: Show ratios of speed to this one.

    Raises:
        ValueError: The file name ends otherwise, or there is nothing to draw.
        ModuleNotFoundError: matplotlib is not installed; names the extra that brings it.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path} should end in .png or .svg, the formats that are drawn")
    rows = panels(records, directions=directions, grids=grids, impls=impls, ratio_to=ratio_to)
    if not rows:
        raise ValueError("no rows of the records are to be shown, so there is nothing to draw")
    rows = [line[at : at + COLUMNS] for line in rows for at in range(0, len(line), COLUMNS)]
    # Any: matplotlib is not needed to check the types of this package.
    matplotlib: Any = _matplotlib()
    with matplotlib.rc_context({"svg.hashsalt": "flash-attention-bench", "font.size": 9}):
        figure = matplotlib.figure.Figure(
            figsize=(WIDTH, ROW_HEIGHT * len(rows) + AROUND), layout="constrained"
        )
        names = names_of(rows)
        colours = _colours(names)
        grid = figure.add_gridspec(len(rows), COLUMNS)
        for number, row in enumerate(rows):
            _fill_row(figure, grid, number, row, colours)
        patch = matplotlib.patches.Patch
        handles = [patch(label=name, color=colours[name]) for name in names]
        across = int(WIDTH / (0.6 + 0.08 * max(map(len, names))))  # inches, of an entry
        figure.legend(handles=handles, loc="outside upper center", ncols=max(1, across))
        figure.supxlabel("\n".join(map(_origin, records.values())), fontsize=8, color="0.35")
        marks = [f"{name} sha256:{fingerprint(record)}" for name, record in records.items()]
        metadata: dict[str, str | None] = {"Description": " ".join(marks)}
        if path.suffix.lower() == ".svg":
            metadata["Date"] = None  # the same record gives the same file
        figure.savefig(path, dpi=150, metadata=metadata)


def _matplotlib() -> Any:
    try:
        for module in ("figure", "patches"):
            importlib.import_module(f"matplotlib.{module}")
        return importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "figures need matplotlib, which is not installed; install it with: "
            "pip install 'flash-attention-testkit[bench]'",
            name=error.name,
        ) from error


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Colours by implementation, torch's always the same; paler from record to record."""
    titles = list(dict.fromkeys(map(title_of, names)))
    others = [title for title in titles if title not in STOCK_COLOURS]
    plain = dict(STOCK_COLOURS)
    for place, title in enumerate(others):
        plain[title] = COLOURS[place % len(COLOURS)]
    suffixes = list(dict.fromkeys(name.removeprefix(title_of(name)) for name in names))
    return {
        name: _mixed_with_white(
            plain[title_of(name)],
            PALER[suffixes.index(name.removeprefix(title_of(name))) % len(PALER)],
        )
        for name in names
    }


def _mixed_with_white(colour: str, share: float) -> str:
    parts = [round(part + (255 - part) * share) for part in _rgb(colour)]
    return "#" + "".join(f"{part:02x}" for part in parts)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))


def _origin(record: Mapping[str, Any]) -> str:
    found = record["environment"]
    parts = [
        found.get("gpu", "?"),
        *(f"{what} {found[what]}" for what in ("torch", "cudnn", "triton") if what in found),
        f"commit {found.get('git_commit', '?')}",
        found.get("date", ""),
    ]
    return ", ".join(filter(None, parts))


def _fill_row(
    figure: Any, grid: Any, number: int, row: Sequence[Panel], colours: Mapping[str, str]
) -> None:
    """Draw one row; its panels share the y axis."""
    top = max(
        fast for panel in row for points in panel.series.values() for _, _, fast in points.values()
    )
    first = None
    for place, panel in enumerate(row):
        alone = len(row) == 1 and len(panel.points) > COLUMNS
        cell = grid[number, :] if alone else grid[number, place]
        axis = figure.add_subplot(cell, sharey=first)
        _fill(axis, panel, colours, top)
        if first is None:
            first = axis
            axis.set_ylabel(panel.unit)
        else:
            axis.tick_params(axis="y", labelleft=False)


def _fill(axis: Any, panel: Panel, colours: Mapping[str, str], top: float) -> None:
    """Draw one panel: groups of bars, each with its number at its foot."""
    present = [name for name in colours if name in panel.series]
    width = 0.86 / len(present)
    for place, name in enumerate(present):
        for index, point in enumerate(panel.points):
            if point not in panel.series[name]:
                continue
            value, slow, fast = panel.series[name][point]
            x = index + (place - (len(present) - 1) / 2) * width
            whisker = [[max(0.0, value - slow)], [max(0.0, fast - value)]]
            axis.bar(
                x,
                value,
                width * 0.94,
                yerr=whisker if fast > slow else None,
                error_kw={"ecolor": "0.25", "elinewidth": 0.8},
                color=colours[name],
            )
            if len(present) > MOST_NUMBERS:
                continue
            inside = value > 0.2 * top
            axis.annotate(
                f"{value:.2f}" if panel.is_ratio else f"{value:.0f}",
                (x, 0 if inside else fast),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                rotation=90,
                fontsize=7.5,
                color=_ink(colours[name]) if inside else "black",
            )
    if panel.is_ratio:
        axis.axhline(1.0, color="0.1", linewidth=1.2, linestyle="--")
    axis.set_ylim(0, 1.08 * (max(top, 1.0) if panel.is_ratio else top))
    axis.set_title(panel.title, fontsize=9.5)
    axis.set_xticks(range(len(panel.points)), panel.points, fontsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)


def _ink(paper: str) -> str:
    """Black or white, whichever can be read on a colour such as `#1f4e79`."""
    red, green, blue = _rgb(paper)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
