"""The command `flash-attention-bench`.

The exit status is 0 if something was measured or drawn, 1 if there is nothing to measure or the
figure cannot be drawn, 2 if the command line cannot be understood.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash_attention_testkit.bench.grids import DIRECTIONS, DTYPE_BYTES, GRIDS, Cell, own_grid
from flash_attention_testkit.bench.record import read_record, rows_of, skipped_of, write_record
from flash_attention_testkit.bench.table import bar, render

if TYPE_CHECKING:
    from flash_attention_registry import ImplReport

__all__ = ["main"]

_AXES = ("head_dims", "seq_lens", "batches", "heads", "kv_heads", "causal", "dtypes")


class _NothingToMeasureError(Exception):
    """There is nothing to measure here; the text says why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What stands after the command's name; None takes it from `sys.argv`.

    Returns:
        The exit status: 0, or 1 if there is nothing to measure or to draw.

    Raises:
        SystemExit: With status 2, `arguments` cannot be understood; with 0, help was asked for.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command: Callable[[list[str]], int] = _run
    if words[:1] == ["plot"]:
        command, words = _plot, words[1:]
    try:
        return command(words)
    except (_NothingToMeasureError, ValueError, OSError, ModuleNotFoundError) as error:
        print(f"flash-attention-bench: {error}", file=sys.stderr)
        return 1


def _plot(words: list[str]) -> int:
    from flash_attention_testkit.bench.plot import draw

    parser = argparse.ArgumentParser(
        prog="flash-attention-bench plot",
        description="Draw benchmark records into one figure.",
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.png|FILE.svg")
    options = parser.parse_args(words)
    draw([read_record(path) for path in options.records], options.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flash-attention-bench",
        description="Measure implementations side by side with torch's own kernels, in one process "
        "and in rounds. Without a GPU, TRITON_INTERPRET=1 runs a small grid through Triton's "
        "interpreter.",
        epilog="flash-attention-bench plot RECORD... -o FILE draws records. Exit status: 0, or 1 "
        "if there was nothing to measure, or 2 for a usage error.",
    )
    parser.add_argument(
        "impls",
        nargs="*",
        metavar="IMPL",
        help="what to measure: names of the registry, and of native (what torch chooses by "
        "itself), torch:flash, torch:cudnn, torch:efficient; default: all that can run here. "
        "Torch's kernels are always measured too, unless --only says otherwise",
    )
    parser.add_argument("--only", action="store_true", help="measure nothing but what is named")
    parser.add_argument("--grid", choices=GRIDS, help="default: anchors; small without a GPU")
    own = parser.add_argument_group("a grid of your own: every combination of")
    own.add_argument("--head-dim", dest="head_dims", nargs="+", type=int, metavar="D")
    own.add_argument("--seq-len", dest="seq_lens", nargs="+", type=int, metavar="S")
    own.add_argument("--batch", dest="batches", nargs="+", type=int, metavar="B")
    own.add_argument("--heads", dest="heads", nargs="+", type=int, metavar="H")
    own.add_argument("--kv-heads", dest="kv_heads", nargs="+", type=int, metavar="H")
    own.add_argument("--causal", choices=("yes", "no", "both"))
    own.add_argument("--dtype", dest="dtypes", nargs="+", choices=DTYPE_BYTES)
    parser.add_argument("--direction", choices=(*DIRECTIONS, "both"), default="both")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each implementation")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the record")
    parser.add_argument(
        "--commit", default="unknown", help="git commit of the measured code, for the record"
    )
    return parser


def _cells(options: argparse.Namespace, parser: argparse.ArgumentParser, device: str) -> list[Cell]:
    axes = {name: getattr(options, name) for name in _AXES if getattr(options, name) is not None}
    if axes and options.grid:
        parser.error("a grid has a name (--grid) or is your own (--head-dim and so on), not both")
    if "causal" in axes:
        axes["causal"] = {"yes": (True,), "no": (False,), "both": (False, True)}[axes["causal"]]
    try:
        if axes:
            cells = list(own_grid(**axes))
        else:
            cells = list(GRIDS[options.grid or ("anchors" if device == "cuda" else "small")]())
    except ValueError as error:
        parser.error(str(error))
    wanted = DIRECTIONS if options.direction == "both" else (options.direction,)
    chosen = [cell for cell in cells if cell.direction in wanted]
    if not chosen:
        parser.error(f"the grid {options.grid} has no {options.direction} cells")
    return chosen


def _run(words: list[str]) -> int:
    parser = _parser()
    options = parser.parse_args(words)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, found {options.rounds}")
    if options.only and not options.impls:
        parser.error("--only needs the names of what to measure")
    if options.output is not None and not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: there is no folder {options.output.parent}")
    device = _device()
    cells = _cells(options, parser, device)
    names, reports, unusable = _names(options, parser, device)
    record = _measured(cells, names, options, device)
    record["environment"].update(_environment(device, options.commit, names, reports))
    record["skipped"][:0] = [{"impl": name, "reason": reason} for name, reason in unusable.items()]
    print(render(record))
    if options.output is not None and record["rows"]:
        write_record(options.output, record)
    return 0 if record["rows"] else 1


def _device() -> str:
    """The device to measure on.

    Raises:
        _NothingToMeasureError: There is none.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise _NothingToMeasureError(
            "nothing to measure: torch is not installed; "
            "install it with: pip install 'flash-attention-testkit[torch]'"
        ) from error
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    raise _NothingToMeasureError(
        f"nothing to measure: torch {torch.__version__} finds no CUDA device. Set "
        "TRITON_INTERPRET=1 to run a small grid through Triton's interpreter, which shows that the "
        "bench works, not how fast anything is."
    )


def _names(
    options: argparse.Namespace, parser: argparse.ArgumentParser, device: str
) -> tuple[list[str], tuple[ImplReport, ...], dict[str, str]]:
    """What to measure in which order, what is known of it, and why some of it cannot be."""
    from flash_attention_registry import explain_flash_attention_impls
    from flash_attention_testkit.bench.backends import NATIVE, STOCK

    reports = explain_flash_attention_impls()
    known = {report.name: report for report in reports}
    unknown = [name for name in options.impls if name not in known and name not in STOCK]
    if unknown:
        parser.error(
            f"unknown: {', '.join(unknown)}; there are {', '.join([*STOCK, *sorted(known)])}"
        )
    stock = list(STOCK) if device == "cuda" else [NATIVE, "torch:flash"]
    available = [report.name for report in reports if report.available]
    asked = list(dict.fromkeys(options.impls or available))
    names = asked if options.only else [*stock, *(name for name in asked if name not in stock)]
    unusable = {
        name: known[name].unavailable_reason or "not available"
        for name in names
        if name in known and not known[name].available
    }
    return [name for name in names if name not in unusable], reports, unusable


def _measured(
    cells: list[Cell], names: list[str], options: argparse.Namespace, device: str
) -> dict[str, Any]:
    from flash_attention_testkit.bench import measure

    clock = measure.clock_of(device)
    record: dict[str, Any] = {"environment": {}}
    # First of all: unless the environment asked for something, torch's own calls are made before
    # any router is in.
    record["host_us"] = measure.small_call_times(names, device, clock)
    record["ceilings"] = measure.ceilings(device, clock)
    record["rows"], record["skipped"] = [], []
    for done, cell in enumerate(cells):
        _show(bar(done, len(cells), str(cell)))
        figures = measure.measure_cell(cell, names, options.rounds, device, clock)
        record["rows"] += rows_of(cell, figures, record["ceilings"])
        record["skipped"] += skipped_of(cell, figures)
    _show(bar(len(cells), len(cells), "done"), last=True)
    return record


def _show(line: str, last: bool = False) -> None:
    """Progress, on stderr: in one place of a terminal, line by line in a file."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line[:100]}", end="\n" if last else "", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)


def _environment(
    device: str, commit: str, names: list[str], reports: tuple[ImplReport, ...]
) -> dict[str, str]:
    """What the figures depend on."""
    import torch

    try:
        import triton
    except ModuleNotFoundError:
        triton_version = "none"
    else:
        triton_version = str(triton.__version__)
    versions = {report.name: report.version or "?" for report in reports if report.name in names}
    on_gpu = device == "cuda"
    environment = {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none (CPU, Triton's interpreter)",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()) if on_gpu else "none",
        "triton": triton_version,
        "implementations": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "git_commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if not on_gpu:
        environment["times"] = (
            "of Triton's interpreter and of torch's CPU kernels: they say nothing about a GPU"
        )
    return environment
