"""What stands for our implementations in torch's registry, and for torch's in ours."""

from __future__ import annotations

import sys

from flash_attention_registry.registration import TORCH_PREFIX, Registration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from flash_attention_registry.handle import FlashAttentionHandle
    from flash_attention_registry.indivisible import Call
    from flash_attention_registry.registry import Registry
    from flash_attention_registry.swap import Active


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
    """What torch's registry holds while something that was activated in ours is active.

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


class TorchRegistration(Registration):
    """An implementation of torch's own registry, as one of ours.

    Its `register_fn` is the one that torch's registry has for it. Torch's registry is not asked to
    run it: that would read and write its state while another thread may use it, and a handle could
    be lost. It is told when the transition ends.

    Attributes:
        name_there: What torch's registry calls it; it takes any object.
    """

    __slots__ = ("name_there",)

    def __init__(self, name_there: object, register_fn: Callable[[], Any] | None) -> None:
        """Keep both.

        Args:
            name_there: What torch's registry calls it.
            register_fn: What torch's registry runs for it; None if it does not know any more.
        """
        self.name_there = name_there
        super().__init__(
            name_here(name_there),
            register_fn=_forgotten if register_fn is None else register_fn,
            availability=lambda: _why_not_importable(name_there, register_fn),
            recommended=_in_no_family,
        )

    def install(self, call: Call) -> None:
        """Run the `register_fn`; if it fails, torch's switch for FA3 is what it was before.

        Torch turns it on before it registers FA3's kernels, and leaves it on if that fails.
        """
        internals = getattr(sys.modules.get("torch"), "_C", None)
        read = getattr(internals, "_get_fa3_sdp_enabled", None)
        write = getattr(internals, "_set_sdp_use_fa3", None)
        before = None if read is None or write is None else read()
        try:
            super().install(call)
        finally:
            if write is not None and before is not None and not call.finished:
                write(before)


def name_here(name_there: object) -> str:
    """Return what an implementation of torch's registry is called here."""
    return f"{TORCH_PREFIX}{name_there}".strip()


def _forgotten() -> None:
    raise RuntimeError("torch's registry has no function for this implementation any more")


def _why_not_importable(name_there: object, register_fn: object) -> str | None:
    """Return which module it needs that is not installed, as far as torch's code tells."""
    code = getattr(register_fn, "__code__", None)
    defaults = getattr(register_fn, "__defaults__", None)
    if code is None or not defaults or code.co_varnames[:1] != ("module_path",):
        return None
    module = str(defaults[0])
    if module in sys.modules:
        return None
    from importlib.util import find_spec

    package = module.partition(".")[0]
    if package in sys.modules or find_spec(package) is not None:
        return None
    return f"torch's {name_there} needs the module {module}, and {package} is not installed"


def _in_no_family() -> str:
    return "it belongs to no family and is used only if it is asked for by this name"
