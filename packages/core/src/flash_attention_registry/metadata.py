"""The entry points of what is installed, read distribution by distribution.

`importlib.metadata.entry_points()` reads all of them or raises: one file that cannot be decoded, of
whatever distribution, would hide every implementation. Here it hides its own distribution's, and is
told of.
"""

from __future__ import annotations

import os
from pathlib import Path

from flash_attention_registry.errors import describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.metadata import Distribution, EntryPoint

FILE = "entry_points.txt"
"""Where a distribution's metadata declares its entry points."""

LEFT_BY_PIP = "~"
"""What the names of folders begin with that pip puts aside and deletes, if it can, in the end."""


class Declared:
    """One entry point, and whose it is.

    Attributes:
        point: The entry point.
        distribution: The distribution's name; that of its folder of metadata if those do not tell,
            or None if there is no folder either.
        version: The distribution's version, or None if its metadata does not tell.
    """

    __slots__ = ("distribution", "point", "version")

    def __init__(self, point: EntryPoint, distribution: str | None, version: str | None) -> None:
        """Keep the parts."""
        self.point = point
        self.distribution = distribution
        self.version = version


def declared_in(prefix: str) -> tuple[list[Declared], list[str]]:
    """Read the entry points of all groups whose names begin with `prefix`; import nothing.

    Of two installations of one distribution the first on `sys.path` counts, as for imports. What
    pip could not delete of one that it has replaced is none, for pip neither.

    Returns:
        The entry points, in the order of `sys.path`, and for each file that could not be read a
        text that names it and says why. A file without the prefix in it is read and not parsed.
    """
    from importlib.metadata import distributions  # 30 to 40 ms that most processes need not pay

    declared: list[Declared] = []
    unreadable: list[str] = []
    seen: set[str] = set()
    try:
        for distribution in distributions():
            declared += _declared_by(distribution, prefix, seen, unreadable)
    except Exception as error:  # of an import hook that offers distributions
        unreadable.append(f"not every installed distribution can be listed: {describe(error)}")
    return declared, unreadable


def unreadable() -> list[str]:
    """Parse the entry points of everything that is installed; return what could not be read.

    A text names each file and says why. For people: it takes ten times as long as a scan, which
    does not parse what is none of its business.
    """
    return declared_in("")[1]


def _declared_by(
    distribution: Distribution, prefix: str, seen: set[str], unreadable: list[str]
) -> Iterable[Declared]:
    """Read one distribution, unless another of its name has been `seen`."""
    folder = _folder(distribution)
    if folder is not None and os.path.basename(folder).startswith(LEFT_BY_PIP):
        return ()
    try:
        # As entry_points() does: the folder's name tells whose it is, at a hundredth of the time
        # that reading METADATA takes. The attribute is Python's own, hence the other way.
        key = getattr(distribution, "_normalized_name", None) or distribution.name
    except Exception:
        key = folder
    if key is not None and key in seen:
        return ()
    if key is not None:
        seen.add(key)
    try:
        text = distribution.read_text(FILE)
        if text is None and folder is not None:
            _read_what_is_there(os.path.join(folder, FILE))
        if text is None or prefix not in text:
            return ()
        points = [point for point in distribution.entry_points if point.group.startswith(prefix)]
    except Exception as error:
        unreadable.append(f"{_file(folder, FILE)} cannot be read: {describe(error)}")
        return ()
    name, version = None, None
    try:
        metadata = distribution.metadata  # parsed at each access
        name, version = ((metadata.get_all(key) or [None])[0] for key in ("Name", "Version"))
    except Exception as error:
        unreadable.append(f"{_file(folder, 'METADATA')} cannot be read: {describe(error)}")
    if name is None and folder is not None:
        name = os.path.basename(folder)
    return [Declared(point, name, version) for point in points]


def _read_what_is_there(path: str) -> None:
    """Raise if there is a file that cannot be read: `importlib.metadata` takes it for none."""
    if os.path.lexists(path):
        Path(path).read_bytes()


def _folder(distribution: Distribution) -> str | None:
    """Return the path of a distribution's metadata; it may lie inside of an archive."""
    path = getattr(distribution, "_path", None)
    return None if path is None else str(path).rstrip("/\\")


def _file(folder: str | None, name: str) -> str:
    return f"{name} of an installed distribution" if folder is None else os.path.join(folder, name)
