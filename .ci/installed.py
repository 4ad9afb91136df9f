"""A user's first minute with the installed wheels, in an environment with nothing else of ours.

    TRITON_INTERPRET=1 python -I .ci/installed.py CHECKOUT

Run by `.ci/run`. CHECKOUT is the folder that nothing may be imported from. Ends with an error
unless one call of `scaled_dot_product_attention` on the CPU was served by fa4-triton, with the
right result, and torch's own kernel is back after restoring.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F

import fa4_triton
import flash_attention_registry as registry
from flash_attention_registry.sdpa import dispatch_counts

OP = "_scaled_dot_product_flash_attention_for_cpu"


def check(holds: bool, what: str) -> None:
    """Print a line that says whether `what` holds, and end the program if it does not."""
    print(f"{'ok  ' if holds else 'FAIL'} {what}")
    if not holds:
        sys.exit(1)


def main() -> None:
    """Look where the packages are, activate, call, restore."""
    checkout = Path(sys.argv[1]).resolve()
    site_packages = Path(sysconfig.get_path("purelib")).resolve()
    for module in (registry, fa4_triton):
        place = Path(str(module.__file__)).resolve()
        check(
            place.is_relative_to(site_packages), f"{module.__name__} is imported from site-packages"
        )
        check(
            not place.is_relative_to(checkout),
            f"{module.__name__} is not imported from the checkout",
        )
    ours = {
        name.lower().replace("_", "-")
        for dist in metadata.distributions()
        if (name := dist.metadata["Name"]).lower().startswith(("fa4", "flash"))
    }
    check(ours == {"flash-attention-registry", "fa4-triton"}, f"installed of ours: {sorted(ours)}")
    check(
        "fa4-triton" in registry.list_flash_attention_impls(),
        "fa4-triton is found by its entry point",
    )

    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 2, 65, 64, generator=generator).to(torch.bfloat16) for _ in range(3)
    )
    stock = F.scaled_dot_product_attention(query, key, value, is_causal=True)

    registry.activate_flash_attention_impl("fa4-triton")
    check(registry.current_flash_attention_impl() == "fa4-triton", "fa4-triton is active")
    served = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    counts = dispatch_counts()[OP]
    check(counts.served == 1, f"one call of {OP} was served: {counts}")
    exact = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True
    )
    error, bound = ((out.double() - exact).abs().max().item() for out in (served, stock))
    check(error <= 2 * bound + 2**-8, f"its largest error is {error:.2e}, torch's own {bound:.2e}")

    registry.restore_flash_attention_impl()
    check(registry.current_flash_attention_impl() is None, "nothing is active after restoring")
    restored = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    check(torch.equal(restored, stock), "and results are torch's own, bit for bit")


if __name__ == "__main__":
    main()
