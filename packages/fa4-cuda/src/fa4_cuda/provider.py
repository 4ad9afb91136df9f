"""What the registry is told: whether the kernels run here, whether they win, how to install them.

Importing this module loads neither torch nor the kernels; its functions do, on demand.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
from typing import TYPE_CHECKING

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

NAME = "fa4-cuda"
"""The implementation's name, which is the distribution's."""

OLDEST_TORCH = (2, 11)
"""The oldest version whose C interface the kernels are connected through."""

GPU = (9, 0)
"""The one compute capability that they are compiled for."""


def why_unavailable() -> str | None:
    """Return why the kernels cannot run on this machine and what to do about it, or None."""
    return _why_no_torch() or _why_no_library() or _why_no_gpu()


def why_not_recommended() -> str | None:
    """Return why stock is the better choice on this machine, or None; only asked if available.

    Where these kernels are available they are the choice: they exist for one architecture, and were
    made to be faster there than what torch would run.
    """
    return None


def import_kernels() -> None:
    """Load everything that `install_kernels` needs, so that it fails before anything changes."""
    importlib.import_module("fa4_cuda.kernel_set")
    importlib.import_module("fa4_cuda.native")


def install_kernels() -> FlashAttentionHandle:
    """Serve torch's attention ops on CUDA with these kernels.

    Returns:
        The handle whose `remove()` puts stock back.
    """
    from fa4_cuda.kernel_set import CudaKernels
    from fa4_cuda.native import NATIVE
    from flash_attention_registry.sdpa import install

    return install(CudaKernels(), native=NATIVE)


def _why_no_torch() -> str | None:
    oldest = _dotted(OLDEST_TORCH)
    try:
        import torch
    except ModuleNotFoundError as error:
        return f"torch cannot be imported ({error}): pip install 'torch>={oldest}'"
    except (ImportError, OSError) as error:
        return f"torch is installed but broken ({error}); reinstall torch {oldest} or newer"
    found = str(torch.__version__)
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        return f"torch {found} is too old; upgrade it: pip install 'torch>={oldest}'"
    if torch.version.hip is not None:
        return f"this torch ({found}) is built for ROCm; a CUDA build of torch is needed"
    if torch.version.cuda is None:
        return f"this torch ({found}) is built without CUDA; install a CUDA build of torch"
    return None


def _why_no_library() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"the kernels are compiled for Linux, not for {sys.platform}"
    from fa4_cuda.library import LibraryError, load

    try:
        missing: bytes | None = load().fa4_torch_find()
    except LibraryError as error:
        return str(error)
    if missing is None:
        return None
    import torch

    return (
        f"this torch ({torch.__version__}) lacks {missing.decode()}, which the kernels are "
        f"connected through; install another release of torch, {_dotted(OLDEST_TORCH)} or newer"
    )


def _why_no_gpu() -> str | None:
    import torch

    before_using_cuda()
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    if GPU not in found:
        seen = ", ".join(sorted(_dotted(capability) for capability in found))
        return (
            f"needs compute capability {_dotted(GPU)}, found {seen}; on such GPUs the family FA4 "
            "goes on to fa4-triton"
        )
    return _why_no_driver()


def _why_no_driver() -> str | None:
    """Why the driver cannot run what the toolkit of this build compiled."""
    from fa4_cuda.library import load

    driver, runtime = ctypes.c_int(), ctypes.c_int()
    status = load().fa4_driver_version(ctypes.byref(driver), ctypes.byref(runtime))
    # A driver runs every release of the major version of CUDA that it knows.
    needed, there = runtime.value // 1000, driver.value // 1000
    if status or there >= needed:
        return None
    return (
        f"the NVIDIA driver is made for CUDA {there}, and the kernels are built with CUDA "
        f"{needed}; upgrade the driver, or build fa4-cuda with a toolkit of CUDA {there}: "
        "pip install --no-binary fa4-cuda fa4-cuda"
    )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
