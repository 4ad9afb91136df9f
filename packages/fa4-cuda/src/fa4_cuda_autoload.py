"""What `import torch` calls where fa4-cuda is installed; a module of its own, beside the package.

Torch ends with an error if it cannot load the hook of an installed distribution. This file needs
neither the package `fa4_cuda` nor the registry, so that a half-removed installation does not keep
torch from being imported.
"""

import os
import sys


def autoload() -> None:
    """List what is installed in torch's registry, and honour `FLASH_ATTENTION_IMPL`."""
    try:
        from flash_attention_registry.autoload import autoload as hook
    except Exception as error:  # removed or damaged, while fa4-cuda's metadata is still there
        asked = os.environ.get("FLASH_ATTENTION_IMPL", "").strip()
        if asked:
            print(  # no warning, which a filter would make an error of `import torch`
                f"Warning: FLASH_ATTENTION_IMPL={asked} is not honoured: flash-attention-registry, "
                f"which fa4-cuda needs, cannot be imported ({error}). Install it again, or "
                f"uninstall fa4-cuda. Torch's own attention kernels run.",
                file=sys.stderr,
            )
        return
    hook()
