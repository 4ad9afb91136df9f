"""What becomes of one call of attention, told from all others of the process.

Other threads may compute attention at the same time, and a backward may run on a thread of torch's
own. So a call is known by the memory of a tensor that it reads, which is nobody else's while that
tensor is held.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["CallWatch", "watches"]


class CallWatch:
    """A context manager in which the calls that read `tensor` are noted, in whatever thread.

    What a kernel set computes by attention of its own, inside of a call, is not noted.

    Attributes:
        tensor: Is held, so that its memory stays its own.
        counts: By aten op: `served`, how often a kernel set ran it, and `declined`, how often it
            went to stock, by reason.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Prepare to watch; `tensor` is not empty."""
        self.tensor = tensor
        self.counts: dict[str, dict[str, Any]] = {}
        self._address = tensor.data_ptr()

    def __enter__(self) -> CallWatch:
        """Begin."""
        watches.append(self)
        return self

    def __exit__(self, *_error: object) -> None:
        """End."""
        watches.remove(self)

    def note(self, op: str, arguments: Iterable[object], reason: str | None) -> None:
        """Note a call if it is one of those; `reason` is why it went to stock, None if served."""
        if not any(map(self._is_read, arguments)):
            return
        count = self.counts.setdefault(op, {"served": 0, "declined": {}})
        if reason is None:
            count["served"] += 1
        else:
            count["declined"][reason] = count["declined"].get(reason, 0) + 1

    def _is_read(self, argument: object) -> bool:
        try:
            return isinstance(argument, Tensor) and argument.data_ptr() == self._address
        except Exception:  # a tensor without memory, of somebody else's call
            return False


watches: list[CallWatch] = []
"""Those that every call is to be told to; empty but while somebody watches."""
