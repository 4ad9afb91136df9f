"""Write a benchmark record into a page as a table, between two markers.

    python docs/benchmarks/table.py docs/kernels/fa4-triton-portable.md \
        docs/benchmarks/results/nvidia-h200-fa4-triton.json

The page holds `<!-- record:begin -->` and `<!-- record:end -->`; what is between is replaced, so
that no figure is ever typed by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- record:begin -->", "<!-- record:end -->"
STOCK = {"torch:flash": "FlashAttention-2", "torch:cudnn": "cuDNN"}


def render(record: dict[str, Any], name: str) -> str:
    """The record as Markdown: environment, one row a cell, means and host times."""
    found = record["environment"]
    (impl,) = {row["impl"] for row in record["rows"]} - STOCK.keys()
    lines = [
        f"`docs/benchmarks/results/{name}`: {found['gpu']}, torch {found['torch']}, cuDNN "
        f"{found['cudnn']}, Triton {found['triton']}, commit `{found['git_commit']}`, "
        f"{found['date']}. An 8192^3 bf16 matrix product ran at "
        f"{record['ceilings']['matmul_tflops']:.0f} TFLOP/s there, a copy at "
        f"{record['ceilings']['copy_gbs']:.0f} GB/s.",
        "",
        f"| direction | D | S | mask | FlashAttention-2 | cuDNN | {impl} | over FA2 | over cuDNN |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        key = (row["direction"], row["head_dim"], row["seq_len"], row["causal"])
        cells.setdefault(key, {})[row["impl"]] = row
    for (direction, head_dim, seq_len, causal), rows in cells.items():
        mine = rows[impl]
        lines.append(
            f"| {direction} | {head_dim} | {seq_len} | {'causal' if causal else 'full'} | "
            f"{rows['torch:flash']['tflops']:.0f} | {rows['torch:cudnn']['tflops']:.0f} | "
            f"{mine['tflops']:.0f} | {mine['ratio_to_flash']:.2f} | {mine['ratio_to_cudnn']:.2f} |"
        )
    lines += ["", "TFLOP/s; the last two columns are ratios of speed within the cell.", ""]
    for direction in ("forward", "backward"):
        mine_rows = [
            row for row in record["rows"] if (row["impl"], row["direction"]) == (impl, direction)
        ]
        for base, field in (("FlashAttention-2", "ratio_to_flash"), ("cuDNN", "ratio_to_cudnn")):
            ratios = [row[field] for row in mine_rows]
            mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
            lines.append(
                f"- {direction} over {base}: geometric mean {mean:.2f}, worst cell "
                f"{min(ratios):.2f}"
            )
    lines += ["", "Host time of one SDPA call without gradients, [1, 8, 128, 64] causal:", ""]
    lines += [f"- {what}: {value:.0f} us" for what, value in record["host_us"].items()]
    return "\n".join(lines)


def replaced(page: str, table: str) -> str:
    """`page` with `table` between the markers."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the page lacks the markers {BEGIN} and {END}; add them")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main() -> None:
    """Rewrite one page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("record", type=Path)
    options = parser.parse_args()
    record = json.loads(options.record.read_text())
    page = options.page.read_text()
    options.page.write_text(replaced(page, render(record, options.record.name)))


if __name__ == "__main__":
    main()
