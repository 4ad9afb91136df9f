"""Plain text in the width of a terminal: paragraphs, columns, sections."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence

__all__ = ["columns", "one_line", "plain", "section", "terminal_width", "wrapped"]

NARROWEST = 40
"""Text is not folded further than this: a narrower terminal may do it itself."""


def terminal_width() -> int:
    """Return the columns of the terminal, or what `COLUMNS` says; 80 if there is neither."""
    return max(NARROWEST, shutil.get_terminal_size().columns)


def wrapped(text: str, indent: int = 0) -> str:
    """Fold each line of `text` at the terminal's width.

    Args:
        text: Its lines stay lines. What is folded goes on two columns further to the right than
            the line began.
        indent: How far to move everything to the right.
    """
    folded = []
    for line in text.splitlines():
        start = " " * (indent + len(line) - len(line.lstrip()))
        folded += textwrap.wrap(
            line.strip(),
            terminal_width(),
            initial_indent=start,
            subsequent_indent=f"{start}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(folded)


def section(title: str, lines: Iterable[str]) -> str:
    """Return `title`, and below it the lines, folded and moved to the right."""
    return "\n".join((title, *(wrapped(line, indent=2) for line in lines)))


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of equal length as lines, each column as wide as it need be.

    The lines are not folded: a machine may want to read them too.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def plain(text: str) -> str:
    """Return `text` in ASCII, which every terminal and log can take."""
    return text.encode("ascii", "backslashreplace").decode("ascii")


def one_line(text: str) -> str:
    """Return `text` as one line, whatever lines it has."""
    return " ".join(text.split())
