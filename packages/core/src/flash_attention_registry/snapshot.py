"""A moment of a registry, to which a test can go back."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from flash_attention_registry.catalogue import Catalogue
    from flash_attention_registry.discovery import Discovery
    from flash_attention_registry.slot import Slot
    from flash_attention_registry.transition import Turn


class RegistrySnapshot:
    """What `Registry.snapshot` returns and `Registry.reset` takes; its contents are theirs."""

    __slots__ = ("_active", "_discovery", "_listeners", "_registrations")

    def __init__(self, catalogue: Catalogue, slot: Slot, discovery: Discovery) -> None:
        """Keep what there is now."""
        self._registrations = catalogue.registrations
        self._active = slot.active
        self._listeners = dict(slot.listeners)
        self._discovery = discovery.save()

    def put_back(self, catalogue: Catalogue, slot: Slot, discovery: Discovery, turn: Turn) -> None:
        """Make everything what it was, with the transition lock held."""
        now = slot.active
        target = None if self._active is None else self._active.registration
        if now is not None and now.registration is not target:
            slot.put(None, turn)
        catalogue.registrations = self._registrations
        slot.keep_listeners(self._listeners)
        discovery.restore(self._discovery)
        if target is not None and slot.active is None:
            slot.put(target, turn)
