"""What the demonstration prints with: headings, findings, tables, a progress bar."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TypeVar

BAR = 32
Item = TypeVar("Item")


def heading(text: str) -> None:
    """Begin a section."""
    print(f"\n{text}\n{'-' * len(text)}")


def say(text: str) -> None:
    """Print `text` in lines of at most 100 columns, each as far to the right as its beginning."""
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        print(textwrap.fill(line, 100, subsequent_indent=indent))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as they need be: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        print("  " + "   ".join([row[0].ljust(widths[0]), *cells[1:]]))


class Verdict:
    """Keeps what was to be shown, and whether it was."""

    def __init__(self) -> None:
        """Begin with no findings."""
        self.failed: list[str] = []

    def check(self, holds: bool, what: str) -> None:
        """Print a finding, and keep it if it is a bad one."""
        print(f"  {'ok    ' if holds else 'FAILED'}  {what}")
        if not holds:
            self.failed.append(what)


def progress(label: str, items: Collection[Item]) -> Iterator[Item]:
    """Pass `items` on, drawing on stderr how many of them have been worked through.

    In a terminal the bar is redrawn, with the time that is left; in a log it is drawn once, from
    left to right.
    """
    sys.stdout.flush()  # what was printed before the bar is to stand before it
    start = time.perf_counter()
    redrawn = sys.stderr.isatty()
    _draw(f"  {label:<26} [")
    marks = 0
    for done, item in enumerate(items, start=1):
        yield item
        added = BAR * done // len(items) - marks
        marks += added
        if redrawn:
            left = (time.perf_counter() - start) * (len(items) - done) / done
            _draw(f"\r  {label:<26} [{'#' * marks:.<{BAR}}] {left:4.0f} s left")
        else:
            _draw("#" * added)
    seconds = f"{time.perf_counter() - start:4.0f} s"
    _draw(f"\r  {label:<26} [{'#' * BAR}] {seconds}     \n" if redrawn else f"] {seconds}\n")


def _draw(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
