"""The protocol of what a `register_fn` returns.

It has a module of its own because `typing` alone would cost most of the time that importing this
package may take; the package loads this module when somebody asks for the name.
"""

from __future__ import annotations

from typing import Protocol


class FlashAttentionHandle(Protocol):
    """What a `register_fn` returns so that the registry can take its kernels away again."""

    def remove(self) -> None:
        """Uninstall the kernels, so that the ones below run again."""
        ...
