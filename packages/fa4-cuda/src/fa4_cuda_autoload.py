"""What `import torch` calls where fa4-cuda is installed; a module of its own, beside the package.

Torch ends with an error if it cannot load the hook of an installed distribution. This file needs
neither the package `fa4_cuda` nor the registry, so that a half-removed installation does not keep
torch from being imported, unless the environment is strict about what it asks for.
"""

import os
import sys


def autoload() -> None:
    """List what is installed in torch's registry, and honour `FLASH_ATTENTION_IMPL`.

    Raises:
        RuntimeError: The registry cannot be imported, while the environment asks for something and
            is strict. What the registry's own hook raises, in a strict environment too.
    """
    try:
        from flash_attention_registry.autoload import autoload as hook
    except Exception as error:  # removed or damaged, while fa4-cuda's metadata is still there
        _go_on_without_registry(error)
    else:
        hook()


def _go_on_without_registry(error: Exception) -> None:
    """Say what is asked for in vain; the registry, which reads the variables, is not there."""
    asked = os.environ.get("FLASH_ATTENTION_IMPL", "").strip()
    if not asked or asked.split(",")[-1].strip() == "native":
        return  # torch's own kernels run, and will do
    text = (
        f"FLASH_ATTENTION_IMPL={asked} is not honoured: flash-attention-registry, which fa4-cuda "
        f"needs, cannot be imported ({type(error).__name__}: {error}). Install it again, or "
        f"uninstall fa4-cuda."
    )
    strict = os.environ.get("FLASH_ATTENTION_IMPL_STRICT", "").strip().lower()
    if strict in ("1", "true", "yes", "on"):
        raise RuntimeError(text) from error
    # No warning, which a filter would make an error of `import torch`.
    print(f"Warning: {text} Torch's own attention kernels run.", file=sys.stderr)
