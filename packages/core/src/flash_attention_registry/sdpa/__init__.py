"""One way from torch's attention ops to a provider's kernels, and back to stock.

A provider gives a `KernelSet` and gets every op that `F.scaled_dot_product_attention`, nested
tensors and `torch.nn.attention.varlen` may choose: arguments arrive as one `AttentionCall`, each
op's conventions for results are kept here, and whatever the kernel set declines runs on torch's
own kernel, counted with its reason.

    handle = install(my_kernel_set, device_type="cuda")
    ...  # F.scaled_dot_product_attention runs on it, compiled graphs included
    print(dispatch_counts())
    handle.remove()

This package imports torch; `flash_attention_registry` itself never imports it.
"""

from flash_attention_registry.default import default_registry

from .call import AttentionCall
from .capabilities import Capabilities, Determinism, Feature, HeadsFirst, KernelSet
from .counters import (
    DispatchCounts,
    OpCounts,
    count_kernel,
    dispatch_counts,
    reset_dispatch_counts,
)
from .native import NativeKernels
from .router import InstalledKernels, install, installed_kernel_sets, uninstall

__all__ = [
    "AttentionCall",
    "Capabilities",
    "Determinism",
    "DispatchCounts",
    "Feature",
    "HeadsFirst",
    "InstalledKernels",
    "KernelSet",
    "NativeKernels",
    "OpCounts",
    "count_kernel",
    "dispatch_counts",
    "install",
    "installed_kernel_sets",
    "reset_dispatch_counts",
    "uninstall",
]

# If this is what has imported torch, the environment's request has waited for it.
default_registry().request.resume()
