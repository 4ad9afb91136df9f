"""Torch's own registry of flash-attention implementations, kept in step with ours.

Ours are listed in torch's, and can be activated and restored there. What else torch's registry
knows, such as its own FA3 and FA4, is known here as `torch:FA3` and `torch:FA4`. After any sequence
of calls on either side both name the same implementation.

Torch's registry tells nobody when it changes, so it is looked at when a transition of ours begins
(`TorchRegistry.begin`), told when one ends (`end`), and read whenever somebody asks what is active.
What was activated in ours stands there with a handle of ours, so that a restore there is a
transition here. What was activated there has torch's own handle, and counts as removed when torch's
registry no longer holds it.

Torch's registry takes no lock. If one thread uses it while another uses ours, it may go on to name
what was active a moment ago until the next transition; but nothing that either has installed is
forgotten here.
"""

from __future__ import annotations

from flash_attention_registry.swap import Active
from flash_attention_registry.torch_impls import (
    Activator,
    OurHandle,
    TorchRegistration,
    name_here,
)
from flash_attention_registry.torch_state import (
    active_there,
    impls_there,
    loaded,
    replace_active,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from flash_attention_registry.registration import Registration
    from flash_attention_registry.registry import Registry
    from flash_attention_registry.slot import Slot
    from flash_attention_registry.torch_state import Entry
    from flash_attention_registry.transition import Turn


class TorchRegistry:
    """Keeps a registry of ours in step with torch's, as far as torch has been imported."""

    def __init__(self, registry: Registry, slot: Slot, *, connected: bool) -> None:
        """Remember what to keep in step.

        Args:
            registry: Is told what was activated or restored in torch's registry.
            slot: Where it keeps what is active.
            connected: Whether to do anything at all; torch's registry is one, ours may be many.
        """
        self._registry = registry
        self._slot = slot
        self._loaded = loaded if connected else _never
        self._registrations: dict[str, Registration] = {}
        self._adopted: Active | None = None  # what was last seen to be activated there
        slot.on_removed = self._take_out_what_is_removed

    # Asking; without a lock

    def names(self) -> list[str]:
        """Return the implementations that only torch's registry knows, as `torch:...`."""
        return list(self._only_theirs())

    def _only_theirs(self) -> dict[str, Any]:
        """Return the names in torch's registry of what only it knows, by their names here."""
        torch = self._loaded()
        if torch is None:
            return {}
        impls = dict(impls_there(torch))
        return {name_here(name): name for name, fn in impls.items() if not _is_ours(fn)}

    def registration(self, name: str) -> Registration | None:
        """Return what stands for `torch:...` here, or None if torch knows no such implementation.

        It stays the same object for as long as torch has the same `register_fn` for it.
        """
        names = self._only_theirs()
        torch = self._loaded()
        if torch is None or name not in names:
            return None
        own_name = names[name]
        register_fn = impls_there(torch).get(own_name)
        known = self._registrations.get(name)
        if known is None or known.register_fn is not register_fn:
            known = self._registrations[name] = TorchRegistration(own_name, register_fn)
        return known

    def current(self) -> str | None:
        """Return the name of what is active, whichever of both registries it was activated in."""
        active = self._slot.active
        torch = self._loaded()
        if torch is not None:
            theirs = _foreign(torch)
            if theirs is not None:
                return name_here(theirs[0])
            if active is not None and active.by_torch:
                return None  # it has been restored there
        return None if active is None else active.registration.name

    # Round each transition of ours, inside of its lock

    def begin(self, turn: Turn) -> None:
        """Take note of what was activated or restored in torch's registry since the last time."""
        torch = self._loaded()
        if torch is None:
            return
        self._take_out_what_is_removed()
        active = self._slot.active
        theirs = _foreign(torch)
        if theirs is None:
            if active is not None and active.by_torch:
                self._slot.adopt(None, turn)
        elif active is None or active.handle is not theirs[1]:
            if active is not None and not active.by_torch:
                self._slot.put(None, turn)  # what was installed there is on top of it
            registration = self.registration(name_here(theirs[0]))
            if registration is None:  # torch's registry cannot activate it again, nor can we
                registration = TorchRegistration(theirs[0], None)
            adopted = self._adopted = Active(registration, theirs[1], by_torch=True)
            self._slot.adopt(adopted, turn)

    def end(self) -> None:
        """Let torch's registry list and name what ours does."""
        torch = self._loaded()
        if torch is None:
            return
        self._take_out_what_is_removed()
        self._list_ours(torch)
        while not self._name_active(torch):
            pass

    def _name_active(self, torch: Any) -> bool:
        """Return whether torch's registry names what is active, or something of its own."""
        active, seen = self._slot.active, active_there(torch)
        if seen is not None and not isinstance(seen[1], OurHandle):
            return True  # if it was activated there just now, the next transition sees it
        if active is None or active.by_torch:
            return replace_active(torch, seen, None)
        if seen is not None and seen[1].active is active:
            return True
        of = active.registration
        name = of.name_there if isinstance(of, TorchRegistration) else of.name
        return replace_active(torch, seen, (name, OurHandle(self._registry, active)))

    def _take_out_what_is_removed(self) -> None:
        """Let torch's registry forget what was activated there, once we have removed it."""
        torch, adopted = self._loaded(), self._adopted
        if torch is None or adopted is None or not adopted.removal.begun:
            return
        seen = active_there(torch)
        if seen is not None and seen[1] is adopted.handle:
            replace_active(torch, seen, None)

    def _list_ours(self, torch: Any) -> None:
        impls = impls_there(torch)
        names = self._registry.names_known()
        for name in names:
            if name not in impls:
                torch.register_flash_attention_impl(
                    name, register_fn=Activator(self._registry, name)
                )
        for name, register_fn in list(impls.items()):
            if _is_ours(register_fn, self._registry) and name not in names:
                del impls[name]


def _never() -> None:
    """Stand in for `loaded` where torch's registry is none of our business."""


def _is_ours(register_fn: object, registry: Registry | None = None) -> bool:
    """Whether it activates an implementation of a registry of ours, or of that very registry."""
    if not isinstance(register_fn, Activator):
        return False
    return registry is None or register_fn.registry is registry


def _foreign(torch: Any) -> Entry | None:
    """Return the name and handle of what was activated in torch's registry and is not ours."""
    entry = active_there(torch)
    return None if entry is None or isinstance(entry[1], OurHandle) else entry
