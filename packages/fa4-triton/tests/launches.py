"""Forwards and a warm-up on Triton's own CUDA driver over `stub_libcuda.c`; prints what was seen.

Run by test_launch.py with the folder of the stub: as a process of its own, since it must not be in
interpreter mode and replaces Triton's driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver


def use_stub(folder: Path) -> ctypes.CDLL:
    """Make the stub Triton's driver, of a Hopper GPU."""
    stub = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    stub.stub_first_argument.restype = ctypes.c_uint64
    knobs.nvidia.libcuda_path = str(folder)
    knobs.cache.dir = str(folder / "cache")
    from triton.backends.nvidia.driver import CudaDriver

    active: Any = CudaDriver()
    active.get_current_device = lambda: 0
    active.get_device_capability = lambda index=0: (9, 0)
    active.get_current_stream = lambda index: 0
    driver.set_active(active)
    torch.cuda.device = lambda index: contextlib.nullcontext()
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: False
    return stub


def main() -> None:
    """Print a JSON object."""
    stub = use_stub(Path(sys.argv[1]))

    from fa4_triton import ahead, hopper_launch, kernel_set, provider
    from fa4_triton.plan import Device
    from flash_attention_registry.sdpa import AttentionCall

    kernel_set._device = lambda index: Device("hopper", 50 << 20, 132)
    provider.why_unavailable = lambda: None
    ahead._index_of = lambda device: -1  # tensors here are on the CPU, whose index that is
    compiled: list[Any] = []
    knobs.compilation.listener = lambda *, src, **_: compiled.append(src)
    counter = torch.zeros(1, dtype=torch.int32)
    hopper_launch._standing_counters[-1, 0] = counter
    query = torch.zeros(2, 4096, 16, 64, dtype=torch.bfloat16)
    call = AttentionCall(query, query, query, 0.125, True, out=torch.zeros_like(query))
    # A head dim that the Hopper forward does not serve.
    narrow = torch.zeros(2, 100, 16, 16, dtype=torch.bfloat16)
    portable = AttentionCall(narrow, narrow, narrow, 0.125, True)
    kernels = kernel_set.TritonKernels()

    def forward(one: AttentionCall, backward: bool = False) -> dict[str, int]:
        before = (stub.stub_launches(), stub.stub_tensor_maps(), len(compiled))
        out, lse = kernels.forward(one)
        if backward:
            kernels.backward(one, out, out, lse)
        return {
            "launches": stub.stub_launches() - before[0],
            "tensor_maps": stub.stub_tensor_maps() - before[1],
            "compiled": len(compiled) - before[2],
            "programs": stub.stub_grid_x(),
        }

    warmed = ahead.warmup(head_dims=(16, 64), masks=("causal",), directions=("forward",))
    found: dict[str, Any] = {"warmed": warmed}
    found["compiled ahead"] = len(compiled)
    found["first"] = forward(call)
    found["again"] = forward(call)
    other = call._replace(query=torch.zeros_like(query))
    found["another query"] = forward(other)
    found["its address is in the map"] = stub.stub_first_argument() == other.query.data_ptr()
    found["portable"] = forward(portable)
    rows, offsets = torch.zeros(5, 16, 64, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32)
    no_sequence = AttentionCall(rows, rows, rows, 0.125, True, None, None, offsets, offsets, 5, 5)
    found["no sequence"] = forward(no_sequence, backward=True)
    kernel_set._variant.cache_clear()
    kernel_set._hopper_variant.cache_clear()
    kernel_set._forward_of.cache_clear()
    kernel_set._launch_of.cache_clear()
    # As if nothing had been warmed up: Triton's own way to a launch finds the same kernels.
    found["cold"] = forward(call)
    found["cold, again"] = forward(call)
    found["cold portable"] = forward(portable)
    found["cold portable, again"] = forward(portable)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
