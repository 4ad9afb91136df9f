"""The command `flash-attention-bench`.

The exit status is 0 if something was measured or shown; 1 if there is nothing to measure, the run
ended early or a record cannot be shown; 2 if the command line cannot be understood.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from flash_attention_testkit.bench.grids import (
    DIRECTIONS,
    DTYPE_BYTES,
    GRAD_LAYOUTS,
    GRIDS,
    Cell,
    own_grid,
)
from flash_attention_testkit.bench.markdown import markdown, with_table
from flash_attention_testkit.bench.record import BASES, read_record
from flash_attention_testkit.bench.table import render

__all__ = ["main"]

_AXES = ("head_dims", "seq_lens", "batches", "heads", "kv_heads", "causal", "dtypes")
_BASE_NAMES = [name.removeprefix("ratio_to_") for name in BASES]


class _NothingToMeasureError(Exception):
    """There is nothing to measure here; the text says why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What stands after the command's name; None takes it from `sys.argv`.

    Returns:
        The exit status: 0, or 1 if there is nothing to measure or to show, or the run ended early.

    Raises:
        SystemExit: With status 2, `arguments` cannot be understood; with 0, help was asked for.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = _COMMANDS.get(words[0]) if words else None
    try:
        return _measure(words) if command is None else command(words[1:])
    except (_NothingToMeasureError, ValueError, OSError, ModuleNotFoundError) as error:
        print(f"flash-attention-bench: {error}", file=sys.stderr)
        return 1


def _plot(words: list[str]) -> int:
    from flash_attention_testkit.bench.plot import draw

    parser = argparse.ArgumentParser(
        prog="flash-attention-bench plot", description="Draw benchmark records into one figure."
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.png|FILE.svg")
    parser.add_argument("--direction", choices=(*DIRECTIONS, "both"), default="both")
    parser.add_argument("--grid", nargs="+", help="rows of these grids only")
    parser.add_argument("--impl", nargs="+", help="rows of these implementations only")
    parser.add_argument(
        "--ratio-to", choices=_BASE_NAMES, help="draw ratios of speed instead of speeds"
    )
    options = parser.parse_args(words)
    draw(
        {path.name: read_record(path) for path in options.records},
        options.output,
        directions=DIRECTIONS if options.direction == "both" else (options.direction,),
        grids=options.grid,
        impls=options.impl,
        ratio_to=options.ratio_to,
    )
    return 0


def _table(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="flash-attention-bench table",
        description="Show a benchmark record as text, or write it into a page as Markdown.",
    )
    parser.add_argument("record", type=Path, metavar="RECORD")
    parser.add_argument(
        "--into",
        type=Path,
        metavar="PAGE.md",
        help="replace what stands in the page between the comments <!-- record:begin --> and "
        "<!-- record:end -->",
    )
    options = parser.parse_args(words)
    record = read_record(options.record)
    if options.into is None:
        print(render(record))
    else:
        page = options.into.read_text(encoding="utf-8")
        shown = markdown(record, options.record.as_posix())
        options.into.write_text(with_table(page, shown), encoding="utf-8")
    return 0


_COMMANDS: Mapping[str, Callable[[list[str]], int]] = MappingProxyType(
    {"plot": _plot, "table": _table}
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flash-attention-bench",
        description="Measure implementations side by side with torch's own kernels, in one process "
        "and in rounds. Without a GPU, TRITON_INTERPRET=1 runs a small grid through Triton's "
        "interpreter.",
        epilog="flash-attention-bench table RECORD shows a record, flash-attention-bench plot "
        "RECORD... -o FILE draws records; both have a --help of their own. Exit status: 0, or 1 "
        "if there was nothing to measure or the run ended early, or 2 for a usage error.",
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
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="call this first, as the entry point of an installed provider would be called; for "
        "implementations that are not installed, such as a checkout's on PYTHONPATH",
    )
    parser.add_argument(
        "--grid", nargs="+", choices=GRIDS, help="default: anchors; small without a GPU"
    )
    own = parser.add_argument_group("a grid of your own: every combination of")
    own.add_argument("--head-dim", dest="head_dims", nargs="+", type=int, metavar="D")
    own.add_argument("--seq-len", dest="seq_lens", nargs="+", type=int, metavar="S")
    own.add_argument("--batch", dest="batches", nargs="+", type=int, metavar="B")
    own.add_argument("--heads", dest="heads", nargs="+", type=int, metavar="H")
    own.add_argument("--kv-heads", dest="kv_heads", nargs="+", type=int, metavar="H")
    own.add_argument("--causal", choices=("yes", "no", "both"))
    own.add_argument("--dtype", dest="dtypes", nargs="+", choices=DTYPE_BYTES)
    parser.add_argument("--direction", choices=(*DIRECTIONS, "both"), default="both")
    parser.add_argument(
        "--grad-layout",
        choices=GRAD_LAYOUTS,
        default=GRAD_LAYOUTS[0],
        help="how the gradient that a backward is given lies in memory: as out does (bshd), or "
        "heads before rows (bhsd), as torch.randn(out.shape) does; default bshd",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="for the rounds of one cell, of all implementations together; default 2. There are "
        "at least 4 rounds; compiling comes on top",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="write the record, after every cell"
    )
    parser.add_argument(
        "--commit", default="unknown", help="git commit of the measured code, for the record"
    )
    return parser


def _cells(
    options: argparse.Namespace, parser: argparse.ArgumentParser, device: str
) -> list[tuple[str, Cell]]:
    axes = {name: getattr(options, name) for name in _AXES if getattr(options, name) is not None}
    if axes and options.grid:
        parser.error("a grid has a name (--grid) or is your own (--head-dim and so on), not both")
    if "causal" in axes:
        axes["causal"] = {"yes": (True,), "no": (False,), "both": (False, True)}[axes["causal"]]
    grids = options.grid or ["anchors" if device == "cuda" else "small"]
    try:
        if axes:
            cells = [("own", cell) for cell in own_grid(**axes)]
        else:
            cells = [(name, cell) for name in grids for cell in GRIDS[name]()]
    except ValueError as error:
        parser.error(str(error))
    wanted = DIRECTIONS if options.direction == "both" else (options.direction,)
    chosen = [
        (name, dataclasses.replace(cell, grad_layout=options.grad_layout))
        for name, cell in cells
        if cell.direction in wanted
    ]
    if not chosen:
        parser.error(f"the grid {', '.join(grids)} has no {options.direction} cells")
    return chosen


def _measure(words: list[str]) -> int:
    parser = _parser()
    options = parser.parse_args(words)
    if not options.budget >= 0:
        parser.error(f"--budget must be at least 0 seconds, found {options.budget}")
    if options.only and not options.impls:
        parser.error("--only needs the names of what to measure")
    if options.output is not None and not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: there is no folder {options.output.parent}")
    if options.output is not None and options.output.is_dir():
        parser.error(f"--output {options.output} is a folder; name a file in it")
    device = _device()
    cells = _cells(options, parser, device)
    for reference in options.register:
        _register(reference, parser)

    from flash_attention_testkit.bench.run import contestants, run

    try:
        who = contestants(options.impls, options.only, device)
    except ValueError as error:
        parser.error(str(error))
    record = run(cells, who, options.budget, device, options.commit, options.output)
    print(render(record))
    return 0 if record["rows"] and record["finished"] else 1


def _register(reference: str, parser: argparse.ArgumentParser) -> None:
    """Call what `reference` names, such as `my_package:register`."""
    module, colon, function = reference.partition(":")
    if not (module and colon and function):
        parser.error(f"--register takes MODULE:FUNCTION, found {reference!r}")
    try:
        getattr(importlib.import_module(module), function)()
    except Exception as error:
        parser.error(f"--register {reference}: {type(error).__name__}: {error}")


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

    from flash_attention_testkit.bench.run import device_to_measure

    device = device_to_measure()
    if device is None:
        raise _NothingToMeasureError(
            f"nothing to measure: torch {torch.__version__} finds no CUDA device. Set "
            "TRITON_INTERPRET=1 to run a small grid through Triton's interpreter, which shows that "
            "the bench works, not how fast anything is."
        )
    return device
