"""Runs a program as it is, and says at its end which attention calls were served.

    python run_and_count.py [--backend MATH] PROGRAM [ARGUMENT...]

The program is run as `python PROGRAM ARGUMENT...` would run it; nothing is imported before it, but
torch where a backend of its own is asked for. The last line on stdout is JSON: the implementation
that is active at the end, and the calls served and declined by op; null if the program has not even
loaded the part of the registry that knows torch.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the program, then print the counts."""
    arguments = sys.argv[1:]
    backend: Any = contextlib.nullcontext()
    if arguments[0] == "--backend":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = sdpa_kernel(SDPBackend.__members__[arguments[1]])
        arguments = arguments[2:]
    sys.argv = arguments
    # Python itself puts the program's folder in this place, where it has put ours.
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    with backend:
        runpy.run_path(arguments[0], run_name="__main__")
    print(json.dumps(served_calls()))


def served_calls() -> dict[str, Any] | None:
    """What the registry has counted in this process, without loading it for the purpose."""
    if "flash_attention_registry.sdpa" not in sys.modules:
        return None
    from flash_attention_registry import current_flash_attention_impl
    from flash_attention_registry.sdpa import dispatch_counts

    counts = dispatch_counts()
    return {
        "active": current_flash_attention_impl(),
        "served": {op: counts[op].served for op in counts if counts[op].served},
        "declined": {op: dict(counts[op].declined) for op in counts if counts[op].declined},
    }


if __name__ == "__main__":
    main()
