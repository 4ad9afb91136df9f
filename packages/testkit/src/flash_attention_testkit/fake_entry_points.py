"""Distributions with entry points that appear without being installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self  # for type checkers only; typing has it from Python 3.11 on

    from flash_attention_registry import Registry
    from flash_attention_testkit.fakes import FakeProvider

_OFFERED: dict[str, Callable[[], None]] = {}
"""What the modules that ``FakeEntryPoints.offer`` writes call, by their names."""

_numbers = count(1)


class FakeEntryPoints:
    """Distributions that ``importlib.metadata`` sees though nobody installed them.

    A context manager: inside of it a folder stands on ``sys.path``, and metadata and modules are
    written into that. Afterwards the folder is off the path and its modules are forgotten. A
    registry scans entry points once: ask a new ``Registry()``, or call ``discovery.refresh()``.

    Attributes:
        folder: Where metadata and modules are.
    """

    def __init__(self, folder: Path) -> None:
        """Take an existing folder, empty and for this purpose alone."""
        self.folder = folder
        self._modules: list[str] = []

    def __enter__(self) -> Self:
        """Let the interpreter see the folder, before all others."""
        sys.path.insert(0, str(self.folder))
        importlib.invalidate_caches()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the folder away, and what was imported or offered from it."""
        if str(self.folder) in sys.path:
            sys.path.remove(str(self.folder))
        importlib.invalidate_caches()
        for name in self._modules:
            sys.modules.pop(name, None)
            _OFFERED.pop(name, None)

    def distribution(
        self,
        name: str,
        entry_points: Mapping[str, Mapping[str, str]],
        *,
        version: str = "1.0",
        requires: Iterable[str] = (),
        modules: Mapping[str, str] | None = None,
    ) -> None:
        """Let a distribution appear.

        Args:
            name: The distribution's name.
            entry_points: Its entry points by group: ``{"group": {"name": "module:attribute"}}``.
            version: Its version.
            requires: What it requires, such as ``"flash-attention-registry>=0.1,<0.2"``.
            modules: Source text of the modules that it has, by name.

        Raises:
            FileExistsError: It is there already, in this version.
        """
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text(_lines(metadata), encoding="utf-8")
        lines: list[str] = []
        for group, points in entry_points.items():
            lines += [f"[{group}]", *(f"{point} = {value}" for point, value in points.items())]
        (info / "entry_points.txt").write_text(_lines(lines), encoding="utf-8")
        for module, source in (modules or {}).items():
            (self.folder / f"{module}.py").write_text(source, encoding="utf-8")
            self._modules.append(module)
        importlib.invalidate_caches()

    def offer(
        self,
        provider: FakeProvider,
        *,
        registry: Registry | None = None,
        distribution: str | None = None,
        version: str = "1.0",
    ) -> str:
        """Let a distribution appear that offers a fake provider as real ones are offered.

        Args:
            provider: Is registered when the entry point is loaded, and not before.
            registry: Where; None for the process's own.
            distribution: The distribution's name; None for ``<provider's name>-dist``.
            version: The distribution's version.

        Returns:
            The name of its module, which is in ``sys.modules`` once the entry point was loaded.
        """
        from flash_attention_registry.discovery import ENTRY_POINT_GROUP

        module = f"fake_provider_{next(_numbers)}"
        _OFFERED[module] = lambda: provider.register(registry)
        self.distribution(
            distribution or f"{provider.name}-dist",
            {ENTRY_POINT_GROUP: {provider.name: f"{module}:register"}},
            version=version,
            modules={module: f"from {__name__} import _OFFERED\nregister = _OFFERED[__name__]\n"},
        )
        return module


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
