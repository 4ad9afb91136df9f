"""The hook that providers let torch call at the end of `import torch`.

It lists what is installed in torch's own registry and honours `FLASH_ATTENTION_IMPL`, so that an
unmodified program can be run on other kernels. A provider's distribution (never this one, which
frameworks depend on) declares it in torch's group of entry points::

    [project.entry-points."torch.backends"]
    my-impl = "my_package_autoload:autoload"

where `my_package_autoload` is a module beside the package that holds nothing but::

    def autoload():
        try:
            from flash_attention_registry.autoload import autoload
        except Exception as error:  # this package is gone or damaged
            ...
        else:
            autoload()

In the place of the dots it says so if `FLASH_ATTENTION_IMPL` asks for something, and raises if
`FLASH_ATTENTION_IMPL_STRICT` is set as well; `fa4_triton_autoload` is an example.

Torch ends with an error if an entry point cannot be loaded, so it must not be in the package, nor
in this one: either may be gone while the other's metadata is still there. Torch calls no entry
point with `TORCH_DEVICE_BACKEND_AUTOLOAD=0`.
"""

from __future__ import annotations

from flash_attention_registry.default import default_registry
from flash_attention_registry.errors import describe
from flash_attention_registry.waiting import do_unless_busy
from flash_attention_registry.warn import warn_or_log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_called = False


def autoload() -> None:
    """List what is installed in torch's registry, and honour `FLASH_ATTENTION_IMPL`.

    Does so once in a process, however many providers call it. CUDA is not initialised: if a GPU has
    to be asked, that waits for the first attention call on one. Whatever goes wrong is a warning,
    unless `FLASH_ATTENTION_IMPL_STRICT` is set.

    Raises:
        EnvironmentVariableError: A variable of this package cannot be understood, in a strict
            environment.
        RequestUnavailableError: Nothing that it asks for could be activated, in a strict
            environment.
    """
    global _called
    if _called:
        return
    _called = True
    registry = default_registry()
    try:
        registry.discovery.entries()
        do_unless_busy(registry.show_to_torch)
    except Exception as error:
        warn_or_log(
            f"Installed flash attention implementations cannot be listed: {describe(error)}"
        )
    registry.request.honour(_await_first_call)


def was_called() -> bool:
    """Return whether torch, or anybody, has called the hook in this process."""
    return _called


def _await_first_call(device_type: str, first: Callable[[], bool]) -> None:
    """Let the next attention call on a device settle what is pending."""
    from flash_attention_registry.sdpa.router import await_first_call

    await_first_call(device_type, first)
