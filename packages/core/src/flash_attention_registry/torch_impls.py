"""What stands for our implementations in torch's registry, and for torch's in ours."""

from __future__ import annotations

import sys

from flash_attention_registry.indivisible import Call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from flash_attention_registry.handle import FlashAttentionHandle
    from flash_attention_registry.registry import Registry
    from flash_attention_registry.slot import Active


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


class TorchImpl:
    """The `register_fn` and the check of `torch:...`, an implementation of torch's registry.

    Attributes:
        name: What torch's registry calls it.
        register_fn: What torch's registry runs for it; None if it does not know any more.
    """

    def __init__(self, name: Any, register_fn: Callable[[], Any] | None) -> None:
        """Remember both."""
        self.name = name
        self.register_fn = register_fn

    def __call__(self) -> Any:
        """Install it; what was active before has been removed already.

        Torch's registry is not asked to: it would read and write its state while another thread may
        use it, and the handle could be lost. It is told when the transition ends.

        Returns:
            The handle that torch's own function gives, or None.
        """
        if self.register_fn is None:
            raise RuntimeError(
                f"torch's registry has no function any more that installs {self.name!r}"
            )
        set_fa3_switch_back = _keeping_fa3_switch()
        installation = Call()
        try:
            installation.run(self.register_fn)
            return installation.result
        except BaseException:
            if installation.finished and installation.result is not None:
                installation.result.remove()  # an interrupt of this code
            set_fa3_switch_back()
            raise

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
