"""Choose which flash-attention kernels run, by name, at any time, and always be able to go back.

A *provider* registers an *implementation*: a name and a function that installs kernels. A *user*
activates it by that name. This package knows nothing of tensors: it imports neither torch nor
anything else outside the standard library, and a framework can depend on it at no cost.

A provider, whole:

>>> import flash_attention_registry as registry
>>> kernel = "stock"
>>> class Handle:
...     def remove(self):
...         global kernel
...         kernel = "stock"
>>> def install():
...     global kernel
...     kernel = "mine"
...     return Handle()
>>> registry.register_flash_attention_impl("mine", register_fn=install, family="FA4")

Its user, who may name it or its family:

>>> registry.activate_flash_attention_impl("FA4")
>>> registry.current_flash_attention_impl(), kernel
('mine', 'mine')
>>> registry.restore_flash_attention_impl()
>>> kernel
'stock'

For a while only:

>>> with registry.use_flash_attention_impl("mine") as name:
...     print(name, "runs", kernel)
mine runs mine
>>> kernel
'stock'

A provider whose installation fails changes nothing:

>>> def broken():
...     raise OSError("libkernels.so: cannot open shared object file")
>>> registry.register_flash_attention_impl("broken", register_fn=broken)
>>> registry.activate_flash_attention_impl("mine")
>>> registry.activate_flash_attention_impl("broken")
Traceback (most recent call last):
OSError: libkernels.so: cannot open shared object file
>>> kernel
'mine'

Why something is or is not used:

>>> registry.register_flash_attention_impl(
...     "hopper-only", register_fn=install, availability=lambda: "needs a GPU of type sm_90"
... )
>>> reports = {report.name: report for report in registry.explain_flash_attention_impls()}
>>> print(registry.format_reports([reports["hopper-only"], reports["mine"]]))
hopper-only (registered by a direct call)
    not available: needs a GPU of type sm_90
mine [active] (family FA4, priority 0, registered by a direct call)
    available and recommended

An installed distribution makes its implementation known by an entry point; see
`flash_attention_registry.discovery`. What connects kernels to torch is in
`flash_attention_registry.sdpa`.
"""

from __future__ import annotations

from flash_attention_registry.cuda import before_using_cuda
from flash_attention_registry.default import (
    activate_flash_attention_impl,
    activate_requested_flash_attention_impl,
    add_transition_listener,
    current_flash_attention_impl,
    default_registry,
    explain_flash_attention_impls,
    list_flash_attention_impls,
    register_flash_attention_impl,
    restore_flash_attention_impl,
    unregister_flash_attention_impl,
    use_flash_attention_impl,
)
from flash_attention_registry.errors import (
    CallDeclinedError,
    CudaNeededError,
    EnvironmentVariableError,
    FamilyUnavailableError,
    FlashAttentionRegistryError,
    HandleError,
    ImplUnavailableError,
    NotRegisteredError,
    ReentrantTransitionError,
    RegistryWarning,
    RequestUnavailableError,
    RestoreError,
    UnknownImplError,
)
from flash_attention_registry.registry import Registry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from flash_attention_registry.handle import FlashAttentionHandle
    from flash_attention_registry.report import ImplReport, format_reports

__all__ = [
    "CallDeclinedError",
    "CudaNeededError",
    "EnvironmentVariableError",
    "FamilyUnavailableError",
    "FlashAttentionHandle",
    "FlashAttentionRegistryError",
    "HandleError",
    "ImplReport",
    "ImplUnavailableError",
    "NotRegisteredError",
    "ReentrantTransitionError",
    "Registry",
    "RegistryWarning",
    "RequestUnavailableError",
    "RestoreError",
    "UnknownImplError",
    "activate_flash_attention_impl",
    "activate_requested_flash_attention_impl",
    "add_transition_listener",
    "before_using_cuda",
    "current_flash_attention_impl",
    "default_registry",
    "explain_flash_attention_impls",
    "format_reports",
    "list_flash_attention_impls",
    "register_flash_attention_impl",
    "restore_flash_attention_impl",
    "unregister_flash_attention_impl",
    "use_flash_attention_impl",
]

# Their modules need typing or dataclasses, which cost more than all the rest of this package.
_LAZY = {"FlashAttentionHandle": "handle", "ImplReport": "report", "format_reports": "report"}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version  # slow to import, and seldom asked for

        return version("flash-attention-registry")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
