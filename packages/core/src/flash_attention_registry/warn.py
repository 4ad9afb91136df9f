"""Warnings, given as if from the line outside of this package that called into it."""

from __future__ import annotations

import sys

from flash_attention_registry.errors import RegistryWarning

_PACKAGE = __name__.partition(".")[0]


def warn_caller(text: str) -> None:
    """Give a `RegistryWarning`.

    Raises:
        RegistryWarning: A warnings filter makes it an error.
    """
    import warnings  # not loaded in every process, and this is not called in most

    level = 1
    frame = sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        level += 1
    warnings.warn(text, RegistryWarning, stacklevel=level)


def warn_or_log(text: str) -> None:
    """Give a `RegistryWarning`, or log the text where a filter makes warnings errors.

    For what must not fail because of what is to be said about it, such as `import torch`.
    """
    try:
        warn_caller(text)
    except Exception:
        from logging import getLogger  # seldom needed, and slow to import

        getLogger(_PACKAGE).warning("%s", text)


def _is_ours(module: str) -> bool:
    return module == _PACKAGE or module.startswith(_PACKAGE + ".")
