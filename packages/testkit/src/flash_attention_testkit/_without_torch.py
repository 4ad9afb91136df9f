"""A process in which torch is not installed, for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from types import ModuleType

TEST_TOOLS = frozenset({"_pytest", "execnet", "hypothesis", "pluggy", "pytest", "xdist"})
"""What runs the test and may load parts of itself meanwhile, without a thought of torch."""


@contextmanager
def without_torch() -> Iterator[None]:
    """Let ``import torch`` raise ``ModuleNotFoundError``, then put ``sys.modules`` back.

    Modules that were imported meanwhile are forgotten, because they may have settled for a world
    without torch. Those of Python itself and of what runs the test stay, and so does a package
    that has compiled modules, which cannot be loaded twice.
    """
    before = dict(sys.modules)
    for name in before:
        if _top(name) == "torch":
            del sys.modules[name]
    sys.modules["torch"] = None  # type: ignore[assignment]  # how Python is told to find none
    try:
        yield
    finally:
        _forget(sys.modules.keys() - before.keys())
        sys.modules.update(before)
        if "torch" not in before:
            sys.modules.pop("torch", None)


def _forget(new: set[str]) -> None:
    compiled = {_top(name) for name in new if _is_compiled(sys.modules[name])}
    kept = compiled | TEST_TOOLS | sys.stdlib_module_names
    for name in new:
        if _top(name) in kept:
            continue
        module = sys.modules.pop(name)
        package, _, last = name.rpartition(".")
        # The package remembers it too, for `from package import module`.
        namespace = getattr(sys.modules.get(package), "__dict__", {})
        if last in namespace and namespace[last] is module:
            delattr(sys.modules[package], last)


def _is_compiled(module: ModuleType | None) -> bool:
    origin = getattr(getattr(module, "__spec__", None), "origin", None)
    return isinstance(origin, str) and origin.endswith(tuple(EXTENSION_SUFFIXES))


def _top(name: str) -> str:
    return name.partition(".")[0]
