"""FA4 in Triton: flash attention, forward and backward, for torch's attention and by direct call.

Installed, it is one implementation of the flash-attention registry, activated by its name:

    import flash_attention_registry as registry

    registry.activate_flash_attention_impl("fa4-triton")

`flash_attn_func` and `flash_attn_varlen_func` call the kernels directly, and `warmup` compiles them
ahead. Importing this module loads neither torch nor Triton: they come with the first use.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fa4_triton.ahead import warmup
    from fa4_triton.functional import flash_attn_func, flash_attn_varlen_func

    __version__: str

__all__ = ["__version__", "flash_attn_func", "flash_attn_varlen_func", "register", "warmup"]

_FUNCTIONS = {
    "flash_attn_func": "fa4_triton.functional",
    "flash_attn_varlen_func": "fa4_triton.functional",
    "warmup": "fa4_triton.ahead",
}


def register() -> None:
    """Make `fa4-triton` known to the registry; the entry point of this distribution."""
    from fa4_triton import provider
    from flash_attention_registry import register_flash_attention_impl

    register_flash_attention_impl(
        provider.NAME,
        register_fn=provider.install_kernels,
        family="FA4",
        priority=10,
        availability=provider.why_unavailable,
        recommended=provider.why_not_recommended,
        prepare=provider.import_kernels,
    )


def __getattr__(name: str) -> object:
    value: object
    if name == "__version__":
        from importlib.metadata import version  # slow to import, and seldom asked for

        value = version("fa4-triton")
    elif name in _FUNCTIONS:
        from importlib import import_module

        value = getattr(import_module(_FUNCTIONS[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
