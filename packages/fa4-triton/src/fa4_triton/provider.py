"""What the registry is told: whether the kernels run here, whether they win, how to install them.

Importing this module loads neither torch nor Triton; its functions do, and are called on demand.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys
from typing import TYPE_CHECKING, Any

from fa4_triton.evidence import why_slower
from flash_attention_registry import before_using_cuda

if TYPE_CHECKING:
    from flash_attention_registry import FlashAttentionHandle

__all__ = [
    "NAME",
    "import_kernels",
    "install_kernels",
    "why_not_recommended",
    "why_unavailable",
]

NAME = "fa4-triton"
"""The implementation's name, which is the distribution's."""

OLDEST = {"torch": (2, 11), "triton": (3, 6)}
"""The oldest versions that these kernels are tested with."""

OLDEST_GPU = (8, 0)
"""The lowest compute capability that the kernels compile for."""


def why_unavailable() -> str | None:
    """Return why the kernels cannot run on this machine and what to do about it, or None."""
    for package in OLDEST:
        reason = _why_not_usable(package)
        if reason is not None:
            return reason
    reason = _why_unknown_kernels() or _why_modes_differ()
    if reason is not None or _interpreted():
        return reason
    return _why_no_compiler() or _why_no_gpu()


def why_not_recommended() -> str | None:
    """Return why stock is the better choice on this machine, or None; only asked if available."""
    if _interpreted():
        return (
            "Triton's interpreter is for tests and demonstrations, orders of magnitude slower than "
            f"torch's own kernels. {_by_name()}"
        )
    for capability in _served_capabilities():
        reason = why_slower(capability)
        if capability[0] == 9:
            reason = _why_portable_only() or reason
        if reason is not None:
            return f"{reason}. {_by_name()}"
    return None


def _why_portable_only() -> str | None:
    """Why a Hopper GPU gets the portable kernels, which cuDNN beats in both directions; or None."""
    import triton

    from fa4_triton.hopper import KERNELS, asked_for, why_no_gluon, why_untested

    if asked_for() == "portable":
        reason: str | None = f"{KERNELS} asks for the portable kernels"
    else:
        reason = why_untested(triton.__version__, why_no_gluon())
    if reason is None:
        return None
    return f"{reason}. The portable kernels serve instead, and cuDNN's attention is faster"


def import_kernels() -> None:
    """Import everything that `install_kernels` needs, so that it fails before anything changes."""
    importlib.import_module("fa4_triton.kernel_set")


def install_kernels() -> FlashAttentionHandle:
    """Serve torch's attention ops with these kernels: on CUDA, or interpreted on the CPU.

    Returns:
        The handle whose `remove()` puts stock back.
    """
    from fa4_triton import interpreter
    from fa4_triton.kernel_set import CAPABILITIES, TritonKernels
    from flash_attention_registry.sdpa import install

    interpreter.repair()
    (device_type,) = CAPABILITIES.device_types
    return install(TritonKernels(), device_type)


def _why_not_usable(package: str) -> str | None:
    """Why torch or Triton is missing, broken or too old."""
    oldest = _dotted(OLDEST[package])
    try:
        module: Any = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == "numpy":
            return (
                "Triton's interpreter (TRITON_INTERPRET=1) needs numpy, which is not installed; "
                "install it with: pip install 'fa4-triton[interpreter]'"
            )
        return (
            f"{package} cannot be imported ({error}); it needs {package} {oldest} or newer"
            f"{' (released for Linux)' if package == 'triton' else ''}: "
            f"pip install '{package}>={oldest}'"
        )
    except (ImportError, OSError) as error:
        return f"{package} is installed but broken ({error}); reinstall {package} {oldest} or newer"
    found = str(module.__version__)
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST[package]:
        return f"{package} {found} is too old; upgrade it: pip install '{package}>={oldest}'"
    return None


def _interpreted() -> bool:
    """Whether Triton's own functions were imported in interpreter mode, which decides for all."""
    import triton.language as tl
    from triton.runtime import JITFunction

    return not isinstance(tl.sum, JITFunction)


def _why_unknown_kernels() -> str | None:
    """Why the kernels that the environment asks for are none."""
    from fa4_triton.hopper import asked_for

    try:
        asked_for()
    except ValueError as error:
        return str(error)
    return None


def _why_modes_differ() -> str | None:
    """Why kernels defined now, or before, cannot call Triton's own functions.

    Triton reads TRITON_INTERPRET whenever a function is defined, and an interpreted function
    cannot call a compiled one, nor the other way round.
    """
    from triton import knobs

    loaded = sys.modules.get("fa4_triton.interpreter")
    ours = bool(knobs.runtime.interpret) if loaded is None else bool(loaded.INTERPRETED)
    if ours == _interpreted():
        return None
    return (
        "TRITON_INTERPRET was changed after Triton was first imported, so that half of Triton's "
        "functions are interpreted and half are compiled; set or unset it before Python starts"
    )


def _why_no_gpu() -> str | None:
    import torch

    if torch.version.hip is not None:
        return (
            f"this torch ({torch.__version__}) is built for ROCm, on which these kernels have not "
            "been tested; an NVIDIA GPU and a CUDA build of torch are needed"
        )
    found = None
    if torch.version.cuda is None:
        found = f"this torch ({torch.__version__}) is built without CUDA"
    else:
        before_using_cuda()
        if not torch.cuda.is_available():
            found = "torch finds no CUDA device"
    if found is not None:
        return (
            f"{found}; set TRITON_INTERPRET=1 before Triton is first imported to run the kernels "
            "on the CPU instead, slowly (pip install 'fa4-triton[interpreter]' for the numpy that "
            "it needs)"
        )
    if _served_capabilities():
        return None
    seen = ", ".join(sorted({_dotted(capability) for capability in _capabilities()}))
    return (
        f"no visible GPU has compute capability {_dotted(OLDEST_GPU)} (Ampere) or newer; "
        f"found {seen}"
    )


def _why_no_compiler() -> str | None:
    """Why Triton cannot build its launcher; it looks for a compiler in the same places."""
    from triton import knobs

    if knobs.build.impl is not None:  # the user's own way to compile
        return None
    named = os.environ.get("CC")
    if named is not None:
        if shutil.which(named) is not None:
            return None
        found = f"CC names {named!r}, which is not found"
    elif shutil.which("gcc") is not None or shutil.which("clang") is not None:
        return None
    else:
        found = "none is found"
    return (
        f"Triton builds its kernel launcher with a C compiler, and {found}; install gcc or clang, "
        "or name a compiler in the environment variable CC"
    )


def _capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the visible devices, in their order."""
    import torch

    before_using_cuda()

    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def _served_capabilities() -> list[tuple[int, int]]:
    return [capability for capability in _capabilities() if capability >= OLDEST_GPU]


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _by_name() -> str:
    return f'activate_flash_attention_impl("{NAME}") uses them all the same'
