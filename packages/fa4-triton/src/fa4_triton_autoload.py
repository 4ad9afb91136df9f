"""What `import torch` calls where fa4-triton is installed; a module of its own, beside the package.

Torch ends with an error if it cannot load the hook of an installed distribution. This file needs
neither the package `fa4_triton` nor the registry, so that a half-removed installation does not keep
torch from being imported.
"""


def autoload() -> None:
    """List what is installed in torch's registry, and honour `FLASH_ATTENTION_IMPL`."""
    try:
        from flash_attention_registry.autoload import autoload as hook
    except ImportError:  # removed, while fa4-triton's metadata is still there
        return
    hook()
