"""The context manager that activates an implementation for a while."""

from __future__ import annotations

from flash_attention_registry.errors import RegistryWarning, add_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from flash_attention_registry.registration import Registration
    from flash_attention_registry.registry import Registry
    from flash_attention_registry.slot import Slot
    from flash_attention_registry.swap import Active
    from flash_attention_registry.transition import Turn


class Entry:
    """One entry into a scope.

    Attributes:
        noted: Whether it is known what was active before.
        previous: What that was.
        activated: Whether the activation has been made, so that an error came after it.
    """

    __slots__ = ("activated", "noted", "previous")

    def __init__(self) -> None:
        """Nothing has been done yet."""
        self.noted = False
        self.previous: Active | None = None
        self.activated = False

    def note(self, previous: Active | None) -> None:
        """Note what to return to."""
        self.previous = previous
        self.noted = True

    def return_to_previous(
        self, slot: Slot, registration: Callable[[str], Registration | None], turn: Turn
    ) -> None:
        """Make active again what was; stock kernels if that cannot be.

        Args:
            slot: Where.
            registration: Tells what is registered under a name by now.
            turn: Takes the warnings.
        """
        now, previous = slot.active, self.previous
        if now is previous:
            return
        target = None
        if previous is not None:
            name = previous.registration.name
            if registration(name) is not None:
                target = previous.registration  # what was active, even if registered again since
            else:
                turn.warn(
                    f"Cannot return to flash attention impl {name!r}: it was unregistered in the "
                    f"meantime. No implementation is active: stock kernels run."
                )
        if now is not None and now.registration is target:
            return
        try:
            slot.put(target, turn)
        except BaseException:
            # The slot holds what is to be left; that must not outlive its scope.
            slot.put(None, turn)
            raise


class ImplScope:
    """Activates an implementation on entry and returns to the previous one on exit.

    It may be entered again, also inside itself.
    """

    def __init__(self, registry: Registry, impl: str) -> None:
        """Remember what to activate; nothing happens before the block is entered."""
        self._registry = registry
        self._impl = impl
        self._entries: tuple[Entry, ...] = ()

    def __enter__(self) -> str | None:
        """Activate; return the name of the implementation that is active then.

        If this raises, what was active before is active again, if it can be.
        """
        before, entry = self._entries, Entry()
        try:
            self._registry.enter(self._impl, entry)
            self._entries = (*before, entry)
            return self._registry.current()
        except BaseException as error:
            self._entries = before
            # A failed activation has put it back; but not an interrupt, or an error after it.
            if entry.activated or (entry.noted and not isinstance(error, Exception)):
                try:
                    self._registry.leave(entry)
                except Exception as second:
                    add_error(error, second)
            raise

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Return to what was active at the matching entry.

        Raises:
            RuntimeError: There is none: it was left as often as it was entered.
        """
        entries = self._entries
        if not entries:
            raise RuntimeError(
                f"Cannot leave the scope of flash attention impl {self._impl!r}: it was left as "
                f"often as it was entered. Nothing has changed, {self._registry.current()!r} is "
                "active. Call __exit__ once for each __enter__, or use a with statement."
            )
        try:
            self._leave(entries[-1])
        except RegistryWarning as warning:  # a filter made it an error
            if exc is None:
                raise
            add_error(exc, warning)
        finally:
            self._entries = entries[:-1]

    def _leave(self, entry: Entry) -> None:
        try:
            self._registry.leave(entry)
        except Exception:
            raise
        except BaseException:
            self._registry.leave(entry)  # what an interrupt may have prevented
            raise
