"""Torch's own registry of flash-attention implementations, kept in step with ours.

Ours are listed in torch's, and can be activated and restored there. What else torch's registry
knows, such as its own FA3 and FA4, is known here as `torch:FA3` and `torch:FA4`. After any sequence
of calls on either side both name the same implementation.

Torch's registry tells nobody when it changes, so it is looked at when a transition of ours begins
(`TorchRegistry.begin`), told when one ends (`end`), and read whenever somebody asks what is active.
Its module imports nothing of torch, and this one only looks whether it has been imported.
"""

from __future__ import annotations

import sys

from flash_attention_registry.registration import TORCH_PREFIX, Registration
from flash_attention_registry.slot import Active

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from flash_attention_registry.handle import FlashAttentionHandle
    from flash_attention_registry.lock import Turn
    from flash_attention_registry.registry import Registry
    from flash_attention_registry.slot import Slot

MODULE = "torch.nn.attention._registry"
"""Where torch keeps its registry."""


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

    # Asking; without a lock

    def names(self) -> list[str]:
        """Return the implementations that only torch's registry knows, as `torch:...`."""
        return list(self._only_theirs())

    def _only_theirs(self) -> dict[str, Any]:
        """Return the names in torch's registry of what only it knows, by their names here."""
        torch = self._loaded()
        if torch is None:
            return {}
        impls = dict(torch._FLASH_ATTENTION_IMPLS)
        return {_name_here(name): name for name, fn in impls.items() if not _is_ours(fn)}

    def registration(self, name: str) -> Registration | None:
        """Return what stands for `torch:...` here, or None if torch knows no such implementation.

        It stays the same object for as long as torch has the same `register_fn` for it.
        """
        names = self._only_theirs()
        torch = self._loaded()
        if torch is None or name not in names:
            return None
        own_name = names[name]
        register_fn = torch._FLASH_ATTENTION_IMPLS[own_name]
        known = self._registrations.get(name)
        if known is None or getattr(known.register_fn, "register_fn", None) is not register_fn:
            install = InstallThroughTorch(own_name, register_fn)
            known = self._registrations[name] = Registration(
                name,
                register_fn=install,
                availability=install.why_unavailable,
                recommended=_in_no_family,
            )
        return known

    def current(self) -> str | None:
        """Return the name of what is active, whichever of both registries it was activated in."""
        name = self._slot.name()
        torch = self._loaded()
        if torch is None:
            return name
        theirs = _foreign(torch)
        if theirs is not None:
            return _name_here(theirs[0])
        return None if name is not None and name.startswith(TORCH_PREFIX) else name

    # Round each transition of ours, inside of its lock

    def begin(self, turn: Turn) -> None:
        """Take note of what was activated or restored in torch's registry since the last time."""
        torch = self._loaded()
        if torch is None:
            return
        active = self._slot.active
        theirs = _foreign(torch)
        if theirs is None:
            if active is not None and _is_torchs(active):
                self._slot.adopt(None, turn)
        elif active is None or not _is_handle_of(active.handle, theirs[1]):
            name = _name_here(theirs[0])
            registration = self.registration(name)
            if registration is None:  # torch's registry cannot activate it again, nor can we
                registration = Registration(name, register_fn=InstallThroughTorch(theirs[0], None))
            if active is not None and not _is_torchs(active):
                self._slot.remove_below(turn)
            self._slot.adopt(Active(registration, TorchHandle(theirs[1])), turn)

    def end(self) -> None:
        """Let torch's registry list and name what ours does."""
        torch = self._loaded()
        if torch is None:
            return
        self._list_ours(torch)
        active = self._slot.active
        now = torch._FLASH_ATTENTION_ACTIVE
        if now is not None and not isinstance(now[1], (OurHandle, Untracked)):
            return  # activated there just now, by another thread: the next transition sees it
        if active is None:
            torch._FLASH_ATTENTION_ACTIVE = None
        elif not _is_torchs(active):
            handle = OurHandle(self._registry, active)
            torch._FLASH_ATTENTION_ACTIVE = (active.registration.name, handle)
        elif active.handle is None:  # a failed activation of another one has made it forget this
            own_name = getattr(active.registration.register_fn, "name", None)
            torch._FLASH_ATTENTION_ACTIVE = (own_name, Untracked())

    def released(self) -> None:
        """Go on with what the environment asks for, if that had to wait for this transition."""
        self._registry.request.resume()

    def _list_ours(self, torch: Any) -> None:
        impls = torch._FLASH_ATTENTION_IMPLS
        names = self._registry.names_known()
        for name in names:
            if name not in impls:
                torch.register_flash_attention_impl(
                    name, register_fn=Activator(self._registry, name)
                )
        for name, register_fn in list(impls.items()):
            if _is_ours(register_fn, self._registry) and name not in names:
                del impls[name]


class Activator:
    """The `register_fn` under which torch's registry knows an implementation of ours.

    Attributes:
        registry: Where it is activated.
    """

    def __init__(self, registry: Registry, name: str) -> None:
        """Remember what to activate."""
        self.registry = registry
        self._name = name

    def __call__(self) -> FlashAttentionHandle:
        """Activate it; torch's registry has restored what was active before."""
        return OurHandle(self.registry, self.registry.activate_for_torch(self._name))


class OurHandle:
    """What torch's registry holds while an implementation of ours is active.

    Attributes:
        active: What `remove()` is to remove.
    """

    def __init__(self, registry: Registry, active: Active | None) -> None:
        """Remember which activation this is."""
        self._registry = registry
        self.active = active

    def remove(self) -> None:
        """Restore stock kernels if this is what is active still.

        Warns:
            RegistryWarning: The implementation's own `remove()` raised. Torch's registry could
                never be used again if this raised as well.
        """
        self._registry.restore_for_torch(self.active)


class TorchHandle:
    """Takes away what was activated in torch's registry.

    Attributes:
        theirs: The handle that torch's registry holds.
    """

    def __init__(self, theirs: FlashAttentionHandle) -> None:
        """Keep the handle."""
        self.theirs = theirs

    def remove(self) -> None:
        """Remove it, and let torch's registry know also if that raises: it would be stuck."""
        torch = loaded()
        now = None if torch is None else torch._FLASH_ATTENTION_ACTIVE
        try:
            self.theirs.remove()
        finally:
            if now is not None and now[1] is self.theirs:
                torch._FLASH_ATTENTION_ACTIVE = None


class Untracked:
    """What we put into torch's registry for an implementation that gave it no handle."""

    def remove(self) -> None:
        """Do nothing: there is no way to remove those kernels, and the next transition says so."""


class InstallThroughTorch:
    """The `register_fn` of `torch:...`: activates it in torch's registry.

    Attributes:
        name: What torch's registry calls it.
        register_fn: What torch's registry runs for it.
    """

    def __init__(self, name: Any, register_fn: Any) -> None:
        """Remember the name that torch has for it."""
        self.name = name
        self.register_fn = register_fn

    def __call__(self) -> TorchHandle | None:
        """Activate it there; what was active before has been removed already."""
        torch = loaded()
        if torch is None:
            raise RuntimeError("torch's registry of flash-attention implementations is gone")
        if _foreign(torch) is None:
            torch._FLASH_ATTENTION_ACTIVE = None
        impls = torch._FLASH_ATTENTION_IMPLS
        latest = impls.get(self.name)
        impls[self.name] = self.register_fn  # this one, also if another has its name since
        reset_fa3 = _keeping_fa3_switch()
        try:
            torch.activate_flash_attention_impl(self.name)
        except BaseException:
            reset_fa3()
            raise
        finally:
            if latest is None:
                del impls[self.name]
            else:
                impls[self.name] = latest
        now = torch._FLASH_ATTENTION_ACTIVE
        if now is None:  # it returned no handle, and torch's registry would name nothing
            torch._FLASH_ATTENTION_ACTIVE = (self.name, Untracked())
            return None
        return TorchHandle(now[1])

    def why_unavailable(self) -> str | None:
        """Return which module it needs that is not installed, as far as torch's code tells."""
        code = getattr(self.register_fn, "__code__", None)
        defaults = getattr(self.register_fn, "__defaults__", None)
        if code is None or not defaults or code.co_varnames[:1] != ("module_path",):
            return None
        module = str(defaults[0])
        if module in sys.modules:
            return None
        from importlib.util import find_spec

        package = module.partition(".")[0]
        if package in sys.modules or find_spec(package) is not None:
            return None
        return f"torch's {self.name} needs the module {module}, and {package} is not installed"


def _keeping_fa3_switch() -> Callable[[], object]:
    """Return what sets torch's switch for FA3 back to what it is now.

    Torch turns it on before it registers FA3's kernels, and leaves it on if that fails.
    """
    internals = getattr(sys.modules.get("torch"), "_C", None)
    read = getattr(internals, "_get_fa3_sdp_enabled", None)
    write = getattr(internals, "_set_sdp_use_fa3", None)
    if read is None or write is None:
        return bool
    now = read()
    return lambda: write(now)


def loaded() -> Any:
    """Return the module of torch's registry if it has been imported and is of a known form.

    `why_apart` says what is the matter if it has been imported and this returns None.
    """
    module = sys.modules.get(MODULE)
    return module if module is not None and why_apart() is None else None


def why_apart() -> str | None:
    """Return why the registry of the imported torch is not kept in step, or None if it is.

    Torch offers no way to be told of changes or to name what is active, so two private names of
    its module are used. They are checked for each time, since torch may change them.
    """
    module = sys.modules.get(MODULE)
    if module is None:
        return "torch has not been imported"
    active = getattr(module, "_FLASH_ATTENTION_ACTIVE", ())
    known_form = active is None or (isinstance(active, tuple) and len(active) == 2)
    if known_form and isinstance(getattr(module, "_FLASH_ATTENTION_IMPLS", None), dict):
        return None
    return (
        f"{MODULE} of this torch is not of the form that torch 2.11 to 2.13 have, so what is "
        f"activated there is not seen here, and the other way round"
    )


def _never() -> None:
    """Stand in for `loaded` where torch's registry is none of our business."""


def _name_here(own_name: object) -> str:
    """Return what an implementation of torch's registry is called here; it takes any object."""
    return f"{TORCH_PREFIX}{own_name}".strip()


def _is_ours(register_fn: object, registry: Registry | None = None) -> bool:
    """Whether it activates an implementation of a registry of ours, or of that very registry."""
    if not isinstance(register_fn, Activator):
        return False
    return registry is None or register_fn.registry is registry


def _foreign(torch: Any) -> tuple[str, Any] | None:
    """Return the name and handle of what is active in torch's registry and is not ours."""
    now: tuple[str, Any] | None = torch._FLASH_ATTENTION_ACTIVE
    return None if now is None or isinstance(now[1], OurHandle) else now


def _is_handle_of(handle: object, theirs: object) -> bool:
    """Whether `handle` is ours for the handle that torch's registry holds."""
    if isinstance(theirs, Untracked):
        return handle is None
    return isinstance(handle, TorchHandle) and handle.theirs is theirs


def _is_torchs(active: Active) -> bool:
    return active.registration.name.startswith(TORCH_PREFIX)


def _in_no_family() -> str:
    return "it belongs to no family and is used only if it is asked for by this name"
