"""A record for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flash_attention_registry.layout import columns
from flash_attention_testkit.bench.record import BASES, direction_of, means

__all__ = ["bar", "render"]

HEADER = (
    *("DIRECTION", "B", "H", "S", "D", "MASK", "IMPL", "MS", "QUARTILES", "SPEED"),
    *("xFLASH", "xCUDNN", "xEFFIC", "xNATIVE", "CEILING", "HOST US", "PEAK MIB"),
)


def render(record: Mapping[str, Any]) -> str:
    """The record as text: environment, a line for each row, means, and what was not measured."""
    environment = record["environment"]
    parts = [", ".join(f"{name} {value}" for name, value in environment.items())]
    if record["rows"]:
        parts.append(columns([HEADER, *map(_cells, record["rows"])]))
        parts.append(
            "SPEED is TFLOP/s, or GB/s of keys and values read where one query row is decoded. "
            "x is the ratio of speed\nin the same cell, above 1 is faster. CEILING is the share of "
            "a matrix product's TFLOP/s, or of a copy's GB/s."
        )
    ratios = [
        f"{' '.join(filter(None, (one.impl, one.grid, one.direction)))} over {BASES[one.base]}: "
        f"geometric mean {one.mean:.3f}, worst {one.worst:.3f}"
        for one in means(record["rows"])
    ]
    if ratios:
        parts.append("\n".join(ratios))
    if record.get("ceilings"):
        reached = [f"{name} {value:.4g}" for name, value in record["ceilings"].items()]
        parts.append(f"Ceilings: {', '.join(reached)}")
    if record.get("host_us"):
        small = [f"{impl} {value:.1f} us" for impl, value in record["host_us"].items()]
        parts.append(f"Host time of a small call: {', '.join(small)}")
    if not record.get("finished", True):
        parts.append("The run did not finish.")
    reasons: dict[tuple[str, str], int] = {}
    for one in record.get("skipped", ()):
        key = (one["impl"], one["reason"])
        reasons[key] = reasons.get(key, 0) + 1
    if reasons:
        parts.append(
            "Not measured:\n"
            + "\n".join(
                f"  {impl}, {number} {'cell' if number == 1 else 'cells'}: {reason}"
                for (impl, reason), number in reasons.items()
            )
        )
    return "\n\n".join(parts)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    heads, kv_heads = row["heads"], row["kv_heads"]
    query_len = row.get("query_len", row["seq_len"])
    length = str(row["seq_len"]) if query_len == row["seq_len"] else f"{query_len}x{row['seq_len']}"
    low, high = row.get("ms_quartiles") or (None, None)
    speed = f"{row['tflops']:.4g} TF" if row.get("gbs") is None else f"{row['gbs']:.4g} GB"
    share = row.get("share_of_ceiling")
    return (
        direction_of(row),
        str(row["batch"]),
        str(heads) if heads == kv_heads else f"{heads}/{kv_heads}",
        f"{length} packed" if row.get("seq_lens") else length,
        str(row["head_dim"]),
        "causal" if row["causal"] else "full",
        row["impl"],
        f"{row['ms']:.4g}",
        "-" if low is None else f"{low:.4g}-{high:.4g}",
        speed,
        *(
            _number(row.get(f"ratio_to_{base}"), ".3f")
            for base in ("flash", "cudnn", "efficient", "native")
        ),
        _number(share, ".1%"),
        _number(row.get("host_us"), ".1f"),
        _number(row.get("peak_mib"), ".1f"),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def bar(done: int, total: int, text: str, width: int = 24) -> str:
    """A progress bar: `[######......] 3/6 text`."""
    full = width * done // max(total, 1)
    return f"[{'#' * full}{'.' * (width - full)}] {done}/{total} {text}"
