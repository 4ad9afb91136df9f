"""The installed wheel of fa4-cuda, beside a torch without CUDA and without a compiler.

    python -I .ci/installed_cuda.py CHECKOUT

Run by `.ci/run`. CHECKOUT is the folder that nothing may be imported from. Ends with an error
unless the package says why it cannot be used here, its library loads, and its native kernels go
into torch's dispatcher and out again.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import torch

import fa4_cuda
import flash_attention_registry as registry
from fa4_cuda.kernel_set import CudaKernels
from fa4_cuda.library import load
from fa4_cuda.native import NATIVE
from flash_attention_registry.sdpa import dispatch_counts, install, uninstall

OP = "_scaled_dot_product_flash_attention"


def check(holds: bool, what: str) -> None:
    """Print a line that says whether `what` holds, and end the program if it does not."""
    print(f"{'ok  ' if holds else 'FAIL'} {what}")
    if not holds:
        sys.exit(1)


def main() -> None:
    """Look where it is, ask why it is unavailable, put its native kernels in, take them out."""
    checkout = Path(sys.argv[1]).resolve()
    place = Path(str(fa4_cuda.__file__)).resolve()
    site_packages = Path(sysconfig.get_path("purelib")).resolve()
    check(place.is_relative_to(site_packages), "fa4_cuda is imported from site-packages")
    check(not place.is_relative_to(checkout), "and not from the checkout")
    check(not any(place.parent.rglob("*.cu")), "it has no sources")

    (report,) = (
        each for each in registry.explain_flash_attention_impls() if each.name == "fa4-cuda"
    )
    reason = report.unavailable_reason or "nothing"
    check("built without CUDA" in reason, f"it says: {reason}")
    check(load().fa4_torch_find() is None, "the library loads and finds torch")

    handle = install(CudaKernels(), native=NATIVE)
    there = repr(torch.library.get_kernel(f"aten::{OP}", "CUDA"))
    check("fa4_cuda" in there, f"the native kernel is in: {there}")
    tensor = torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16)
    keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    try:
        torch.library.get_kernel(f"aten::{OP}", "CUDA").call_boxed(
            keyset, tensor, tensor, tensor, 0.0, False, False, scale=None
        )
    except RuntimeError as error:
        check("no kernel set served it" in str(error), "a call of no GPU's tensors is declined")
    check(dispatch_counts()[OP].total_declined == 1, f"and counted: {dispatch_counts()}")
    handle.remove()
    uninstall("cuda")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    check(not has_kernel(f"aten::{OP}", "CUDA"), "nothing of it is left in the dispatcher")


if __name__ == "__main__":
    main()
