"""The command `flash-attention`: what is installed, why it is not used, and whether it really is.

Nothing imports this module but the command itself. On standard output there is its answer and
nothing else; whatever torch, a provider or a child process prints goes to standard error, until the
process has ended. With `--json` the answer is one JSON document. Its keys are stable, and what is
unknown is null:

`list`
    `implementations`, a list of `name`, `family`, `distribution`, `version`, `active` and
    `problem` (why it would not be used; a conflict between distributions, for instance);
    `unreadable`, a list of texts: the files of installed metadata that cannot be read, and why.

`explain`
    `implementations`, a list of what `ImplReport` holds, all of it or what the name means; `name`,
    which was asked about; `usable` and, if so, `would_take`, which implementation activating the
    name would take; if not, `reason`. Without a name these four are null. `unreadable`, as above.
    `torch_problem`, why torch cannot be used, or null.

`doctor`
    `ok`, and what `flash_attention_registry.doctor.findings.Diagnosis` holds.

any of them, if there is nothing else to say
    `error`, a text.

The exit status is 0 if all is well, 1 if what was asked for is not usable or an environment
variable cannot be understood, 2 if the command line cannot be.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass

from flash_attention_registry import environment
from flash_attention_registry.errors import (
    FlashAttentionRegistryError,
    UnknownImplError,
    text_of,
)
from flash_attention_registry.layout import columns, plain, wrapped

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, TextIO

    from flash_attention_registry.report import ImplReport

__all__ = ["main"]


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a command has to say.

    Attributes:
        document: For machines.
        text: For people.
        ok: Whether what was asked for is usable.
    """

    document: dict[str, Any]
    text: str
    ok: bool = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What stands after the command's name. None takes it from `sys.argv`, and the
            standard output of the process, to its end, for the answer alone.

    Returns:
        The exit status: 0, or 1 if what was asked for is not usable.

    Raises:
        SystemExit: With status 2, `arguments` cannot be understood; with 0, help was asked for.
    """
    options = _parser().parse_args(arguments)
    taken = _take_standard_output() if arguments is None else None
    try:
        # What torch or a provider prints meanwhile must not be taken for the answer.
        with redirect_stdout(sys.stderr):
            answer: _Answer = options.command(options)
    except FlashAttentionRegistryError as error:
        answer = _Answer({"error": text_of(error)}, "", ok=False)
        if not options.json:
            print(plain(wrapped(f"flash-attention: {text_of(error)}")), file=sys.stderr)
            return 1
    text = json.dumps(answer.document, indent=2) if options.json else plain(answer.text)
    if taken is None:
        _print(text, sys.stdout)
    else:
        with taken:
            _print(text, taken)
    return 0 if answer.ok else 1


def _take_standard_output() -> TextIO | None:
    """Return a stream to standard output, which from now on nothing else writes to.

    Not even a child process, which inherits the descriptor and knows nothing of `sys.stdout`, nor
    what is printed when the interpreter ends: the descriptor stands for standard error from now on.

    Returns:
        The stream, or None if somebody has put another one in the place of `sys.stdout`, or if
        there is none.
    """
    out, err = sys.__stdout__, sys.__stderr__
    if out is None or out is not sys.stdout:
        return None
    out.flush()
    elsewhere = os.open(os.devnull, os.O_WRONLY) if err is None else err.fileno()
    kept = os.dup(out.fileno())
    os.dup2(elsewhere, out.fileno())
    return open(kept, "w", encoding="ascii")


def _print(text: str, stream: TextIO) -> None:
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flash-attention",
        description="Which flash-attention kernels are there, and are they really used?",
        epilog="Exit status: 0, or 1 if what was asked for is not usable, or 2 for a usage error.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    listing = commands.add_parser(
        "list",
        help="print what is installed, without importing it",
        description="Print one line for each implementation that is installed. Nothing is imported "
        "for it, neither the implementations nor torch, so their families are not known.",
    )
    listing.set_defaults(command=_list)
    explain = commands.add_parser(
        "explain",
        help="print why each implementation is or is not usable here",
        description="Ask each implementation whether it can run here, and whether it is "
        "recommended here.",
    )
    explain.add_argument("name", nargs="?", metavar="NAME", help="an implementation or a family")
    explain.set_defaults(command=_explain)
    doctor = commands.add_parser(
        "doctor",
        help="find out whether kernels are really used, and if not, why",
        description="Import torch as a program would, and tell what the environment asks for, what "
        "is active, which kernel would run typical calls, and what is in the way.",
    )
    doctor.add_argument(
        "--run",
        nargs="?",
        const=True,
        default=False,
        metavar="NAME",
        help="really make one call, forward and backward: under NAME, or under what is active",
    )
    doctor.set_defaults(command=_doctor)
    for command in (listing, explain, doctor):
        command.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _list(_options: argparse.Namespace) -> _Answer:
    from flash_attention_registry.default import default_registry
    from flash_attention_registry.metadata import unreadable

    environment.check()
    registry = default_registry()
    entries = registry.discovery.entries()
    implementations = []
    for name in registry.names():
        registration, entry = registry.registration(name), entries.get(name)
        implementations.append(
            {
                "name": name,
                "family": None if registration is None else registration.family,
                "distribution": None if entry is None else entry.distribution,
                "version": None if entry is None else entry.version,
                "active": name == registry.current(),
                "problem": registry.discovery.failure(name),
            }
        )
    header = ("NAME", "FAMILY", "DISTRIBUTION", "VERSION", "ACTIVE", "PROBLEM")
    rows = [tuple(map(_cell, one.values())) for one in implementations]
    text = columns([header, *rows]) if rows else "No flash attention implementation is installed."
    damaged = unreadable()
    document = {"implementations": implementations, "unreadable": damaged}
    return _Answer(document, "\n\n".join([text, *map(wrapped, damaged)]))


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def _explain(options: argparse.Namespace) -> _Answer:
    from flash_attention_registry.default import explain_flash_attention_impls
    from flash_attention_registry.doctor import import_torch
    from flash_attention_registry.doctor.usable import (
        meant_by,
        of_unknown_family,
        why_not_usable,
        would_take,
    )
    from flash_attention_registry.metadata import unreadable
    from flash_attention_registry.report import format_reports

    environment.check()
    # Before anything is asked, as in a program: torch's own implementations are known then, and
    # what the environment asks for is active.
    imported = import_torch()
    damaged = unreadable()
    if imported.refusal is not None:
        raise imported.refusal
    if imported.why_not_again() is not None:
        told = [f"{imported.problem}. {imported.why_not_again()}", *damaged]
        raise FlashAttentionRegistryError("\n".join(told))
    reports: Sequence[ImplReport] = explain_flash_attention_impls()
    name, reason, taken, verdict = options.name, None, None, []
    if name is not None:
        reason, taken = why_not_usable(name, reports), would_take(name, reports)
        others, reports = of_unknown_family(reports), meant_by(name, reports)
        if not reports:
            raise UnknownImplError("\n".join([f"{reason}", *damaged]))
        would = "fail" if taken is None else f"take {taken.name}"
        verdict = [f"Activating {name} would {would} here."]
        if taken is None and reports[0].name != name:
            verdict = [*map(wrapped, others), *verdict]
    document = {
        "name": name,
        "usable": None if name is None else taken is not None,
        "would_take": None if taken is None else taken.name,
        "reason": reason,
        "implementations": [asdict(report) for report in reports],
        "unreadable": damaged,
        "torch_problem": imported.problem,
    }
    if imported.problem is not None:
        damaged = [f"No kernels can be used: {imported.problem}.", *damaged]
    parts = [wrapped(format_reports(reports)), *map(wrapped, damaged), *verdict]
    return _Answer(document, "\n\n".join(parts), reason is None)


def _doctor(options: argparse.Namespace) -> _Answer:
    from flash_attention_registry.doctor import diagnose

    diagnosis = diagnose(options.run)
    return _Answer(diagnosis.as_dict(), str(diagnosis), diagnosis.ok)
