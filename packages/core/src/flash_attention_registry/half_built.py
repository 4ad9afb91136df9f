"""What a `register_fn` has installed by the time it fails, and how that is undone.

It may have installed kernels and raise before it returns their handle, or return something else:
then nobody has the handle. So whatever installs leaves word of how to undo it, beforehand.
"""

from __future__ import annotations

import _thread  # threading would double the time that importing this package takes

from flash_attention_registry.indivisible import Call, call_and_finish

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Installation(Call):
    """The call of a `register_fn`, which can be undone where it gave no handle."""

    __slots__ = ("_undoing",)

    def __init__(self) -> None:
        """Nothing is called yet, and nothing to be undone."""
        super().__init__()
        self._undoing: list[Callable[[], object]] = []

    def run(self, function: Callable[..., object], *arguments: object) -> None:
        """Call `function`, and raise what it raises; keep what `undo_on_failure` is given."""
        outer = _here.undoing

        def keeping() -> None:
            _here.undoing = self._undoing
            super(Installation, self).run(function, *arguments)

        call_and_finish(keeping, lambda: setattr(_here, "undoing", outer))

    def undo(self) -> None:
        """Undo what has been installed, the latest first; after an interrupt, the rest of it."""
        while self._undoing:
            self._undoing[-1]()
            self._undoing.pop()


class _Thread(_thread._local):
    """What undoes the installation that this thread is in; None if it is in none."""

    undoing: list[Callable[[], object]] | None = None


_here = _Thread()


def undo_on_failure(undo: Callable[[], object]) -> None:
    """Let `undo` be called if the `register_fn` that this thread is in gives no handle.

    To be called before what it undoes is done, lest an interrupt come between. Outside of a
    `register_fn` it does nothing: the caller gets a handle.

    Args:
        undo: Called once or, after an interrupt, again; does nothing where nothing is to be undone.
    """
    if _here.undoing is not None:
        _here.undoing.append(undo)
