"""The context manager that activates an implementation for a while."""

from __future__ import annotations

from flash_attention_registry.errors import RegistryWarning, add_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from flash_attention_registry.registry import Registry
    from flash_attention_registry.slot import Active


class ImplScope:
    """Activates an implementation on entry and returns to the previous one on exit.

    It may be entered again, also inside itself.
    """

    def __init__(self, registry: Registry, impl: str) -> None:
        """Remember what to activate; nothing happens before the block is entered."""
        self._registry = registry
        self._impl = impl
        self._previous: list[Active | None] = []

    def __enter__(self) -> str | None:
        """Activate; return the name of the implementation that is active then."""
        self._previous.append(self._registry.enter(self._impl))
        return self._registry.current()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Return to what was active at the matching entry."""
        try:
            self._registry.leave(self._previous.pop())
        except RegistryWarning as warning:  # a filter made it an error
            if exc is None:
                raise
            add_error(exc, warning)
