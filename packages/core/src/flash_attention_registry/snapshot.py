"""A moment of a registry, to which a test can go back."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from flash_attention_registry.discovery import Scan
    from flash_attention_registry.registration import Registration
    from flash_attention_registry.slot import Active, Listener


class RegistrySnapshot:
    """What `Registry.snapshot` returns and `Registry.reset` takes; its contents are theirs."""

    __slots__ = ("active", "discovery", "listeners", "registrations")

    def __init__(
        self,
        registrations: dict[str, Registration],
        active: Active | None,
        listeners: Mapping[object, Listener],
        discovery: tuple[Scan | None, dict[str, str]],
    ) -> None:
        """Keep the parts."""
        self.registrations = registrations
        self.active = active
        self.listeners = listeners
        self.discovery = discovery
