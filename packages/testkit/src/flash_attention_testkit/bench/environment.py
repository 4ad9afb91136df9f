"""What figures depend on: the GPU, the versions, the commit, the day."""

from __future__ import annotations

import datetime
from collections.abc import Iterable

import torch

__all__ = ["environment"]


def environment(device: str, commit: str, implementations: Iterable[str] = ()) -> dict[str, str]:
    """Describe this machine and this process, for a record.

    Args:
        device: `"cuda"` for the current GPU, or `"cpu"` for Triton's interpreter.
        commit: Git commit of the measured code.
        implementations: Names, with versions where they are known.
    """
    try:
        import triton
    except ModuleNotFoundError:
        triton_version = "none"
    else:
        triton_version = str(triton.__version__)
    on_gpu = device == "cuda"
    found = {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none (CPU, Triton's interpreter)",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()) if on_gpu else "none",
        "triton": triton_version,
        "implementations": ", ".join(implementations),
        "git_commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
    if not on_gpu:
        found["times"] = (
            "of Triton's interpreter and of torch's CPU kernels: they say nothing about a GPU"
        )
    return found
