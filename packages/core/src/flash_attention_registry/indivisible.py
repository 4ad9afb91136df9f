"""Steps that nothing can divide, and an end that nothing can prevent.

An interrupt, such as the `KeyboardInterrupt` of Ctrl-C, may come between any two instructions of
Python code, the registry's own included, and another thread may run there. A call of a function
that is written in C is one instruction, and the iterators of `itertools` make one call of several.
"""

from __future__ import annotations

from _operator import is_  # operator itself is a module to load, and this its part in C
from itertools import compress, starmap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")

_BEGUN = object()


class Call:
    """A call of which it is known how far it got, whatever interrupted it."""

    __slots__ = ("_progress",)

    def __init__(self) -> None:
        """Nothing is called yet."""
        self._progress: list[Any] = []

    def run(self, function: Callable[..., object], *arguments: object) -> None:
        """Call `function`, and raise what it raises."""
        append = self._progress.append
        begin, call = map(append, (_BEGUN,)), map(append, starmap(function, (arguments,)))
        # What consumes an iterator to its end would take a StopIteration of the function for that.
        next(zip(begin, call, strict=False))

    @property
    def begun(self) -> bool:
        """Whether the function was called, even if it raised."""
        return len(self._progress) > 0

    @property
    def finished(self) -> bool:
        """Whether the function has returned."""
        return len(self._progress) > 1

    @property
    def result(self) -> Any:
        """What the function has returned; only once it is `finished`."""
        return self._progress[1]

    def forget_result(self) -> None:
        """Let go of the result: the call counts as one that raised."""
        del self._progress[1:]


def compare_and_set(namespace: dict[str, Any], name: str, expected: object, new: object) -> bool:
    """Set a variable if it is what it was seen to be; return whether it was.

    Between the comparison and the setting no other thread runs.

    Args:
        namespace: Where the variable is, such as `vars(module)`.
        name: Its name there.
        expected: What it must be, by identity, to be set.
        new: What to set it to.
    """
    is_expected = map(is_, map(namespace.get, (name,)), (expected,))
    return len(list(starmap(namespace.__setitem__, compress(((name, new),), is_expected)))) > 0


def call_and_finish(action: Callable[[], T], finish: Callable[[], object]) -> T:
    """Return `action()` after calling `finish`, which is called whatever the action raises.

    An interrupt at any one instruction, those of `finish` included, does not keep it from being
    done: it is called twice, and has to do nothing where nothing is left to do. A `with` statement
    does not hold as much: an interrupt right before or inside of `__exit__` ends it undone.
    """
    try:
        try:
            return action()
        finally:
            finish()
    finally:
        finish()
