"""One transition at a time, and what is said when it is over."""

from __future__ import annotations

from flash_attention_registry.errors import ReentrantTransitionError, add_error
from flash_attention_registry.indivisible import call_and_finish
from flash_attention_registry.lock import Lock
from flash_attention_registry.waiting import BusyError
from flash_attention_registry.warn import warn_caller

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol, TypeVar

    T = TypeVar("T")

    class Around(Protocol):
        """What happens before and after each transition."""

        def begin(self, turn: Turn) -> None:
            """Prepare, with the lock held."""

        def end(self, turn: Turn) -> None:
            """Finish, with the lock held, also after an error; it is called twice."""

        def released(self) -> None:
            """Do what had to wait for the lock to be free."""


class Turn:
    """What has to be said when a transition is over and the lock free again.

    Warnings wait until then because a filter may turn them into exceptions, which must not
    interrupt a transition half way. One exception leaves a turn: an interrupt before an error,
    an error before a warning that a filter made an exception. The others become its notes.
    """

    def __init__(self) -> None:
        """There is nothing to say yet."""
        self._warnings: list[str] = []
        self._errors: list[BaseException] = []

    def warn(self, text: str) -> None:
        """Give a `RegistryWarning` when the turn is over."""
        self._warnings.append(text)

    def raise_after(self, error: BaseException) -> None:
        """Raise `error` when the turn is over; if the turn itself raises, it is a note of that.

        An error that is no `Exception`, such as `KeyboardInterrupt`, is raised all the same.
        """
        self._errors.append(error)

    def speak(self, raised: BaseException | None, released: Callable[[], None]) -> None:
        """Warn, then raise what was to be raised.

        Args:
            raised: What the turn itself raised; the caller raises it unless another goes before.
            released: Called first of all.
        """
        errors = [*self._errors]
        try:
            released()
        except BaseException as error:
            errors.append(error)
        for text in self._warnings:
            try:
                warn_caller(text)
            except Exception as error:
                errors.append(error)
        first = raised if raised is not None else next(iter(errors), None)
        if first is None:
            return
        if isinstance(first, Exception):
            first = next((one for one in errors if not isinstance(one, Exception)), first)
        for other in errors:
            if other is not first:
                add_error(first, other)
        if first is not raised:
            raise first


class Transitions:
    """Makes the changes of a registry, one at a time.

    Other threads wait; the thread that makes one is refused with `ReentrantTransitionError`, where
    a plain lock would hang and a reentrant one would let a half-made change be changed again.
    """

    def __init__(self, around: Around) -> None:
        """Remember what happens around each."""
        self._lock = Lock()
        self._doing = ""
        self._around = around

    def refuse_reentry(self, wanted: str) -> None:
        """Raise if the calling thread is inside a transition.

        Args:
            wanted: What the caller wants to do, as in "activate 'fa4-triton'".

        Raises:
            ReentrantTransitionError: It is.
        """
        if self.is_mine():
            raise ReentrantTransitionError(
                f"Cannot {wanted}: this thread is in the middle of another transition "
                f"({self._doing}). A register_fn, prepare, remove, availability or recommended "
                f"callable, or a transition listener, must not change or load the registry; "
                f"do it after that call has returned."
            )

    def is_mine(self) -> bool:
        """Return whether the calling thread is inside a transition."""
        return self._lock.is_mine()

    def make(self, doing: str, change: Callable[[Turn], T]) -> T:
        """Make a transition and return what `change` does.

        Args:
            doing: What is done, for messages.
            change: Does it; takes warnings and errors to the end.

        Raises:
            ReentrantTransitionError: The calling thread is inside another one.
            BusyError: Another thread is, and this one must not wait.
        """
        self.refuse_reentry(doing)
        turn = Turn()

        def transition() -> T:
            self._doing = doing
            self._around.begin(turn)
            return change(turn)

        def transition_and_end() -> T:
            return call_and_finish(transition, lambda: self._around.end(turn))

        try:
            result = self._lock.hold(transition_and_end)
        except BusyError:
            raise
        except BaseException as error:
            turn.speak(error, self._around.released)
            raise
        turn.speak(None, self._around.released)
        return result
