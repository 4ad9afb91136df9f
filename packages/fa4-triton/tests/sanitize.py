"""Every kernel on small shapes, to be run under compute-sanitizer on a CUDA device.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        python packages/fa4-triton/tests/sanitize.py

Also with `--tool synccheck`, and with `--tool racecheck`, whose reports on the Hopper kernels
`sanitizer/board.py` is about.
With `FA4_TRITON_KERNELS=hopper` the Hopper kernels run where the portable ones would be faster;
`--forward` leaves the backward out. Without torch's caching allocator every tensor is an allocation
of its own, so that one row too far is an access out of bounds. Lengths are chosen to leave part of
every block empty, the non-finite values to send each repair path once.
"""

from __future__ import annotations

import argparse

import torch

from fa4_triton.kernel_set import TritonKernels
from flash_attention_registry.sdpa import AttentionCall, dispatch_counts

HEAD_DIMS = (64, 80, 128, 192, 256)
LENGTHS = ((97, 97), (33, 130), (130, 33), (1, 70), (300, 500))
PACKED = ([70, 0, 33, 200], [20, 40, 0, 200])


def randn(*shape: int) -> torch.Tensor:
    """Normal bf16 on the device."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def run(call: AttentionCall, backward: bool) -> None:
    """Forward and perhaps backward of one call, causal, without a mask and with a window."""
    kernels = TritonKernels()
    for one in (
        call,
        call._replace(causal=False),
        call._replace(causal=False, window_left=20, window_right=9),
    ):
        out, lse = kernels.forward(one)
        if backward:
            kernels.backward(one, torch.randn_like(out), out, lse)


def offsets(lengths: list[int]) -> torch.Tensor:
    """cu_seqlens of packed sequences."""
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)


def main() -> None:
    """Run the cases, dense and packed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forward", action="store_true", help="no backward")
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    given = parser.parse_args()
    backward = not given.forward
    torch.manual_seed(0)
    for head_dim in given.head_dims:
        for rows, keys in LENGTHS:
            q = randn(1, rows, 2, head_dim)
            k, v = randn(1, keys, 1, head_dim), randn(1, keys, 1, head_dim)
            call = AttentionCall(q, k, v, head_dim**-0.5, causal=True)
            run(call, backward)
            v[:, -1, :, 3] = torch.inf
            k[:, -2] = torch.nan
            run(call, backward)
        rows, keys = map(sum, PACKED)
        q, k, v = randn(rows, 2, head_dim), randn(keys, 2, head_dim), randn(keys, 2, head_dim)
        packed = AttentionCall(
            q,
            k,
            v,
            head_dim**-0.5,
            causal=True,
            cu_seqlens_query=offsets(PACKED[0]),
            cu_seqlens_key=offsets(PACKED[1]),
            max_seqlen_query=max(PACKED[0]),
            max_seqlen_key=max(PACKED[1]),
        )
        run(packed, backward)
        v[30, :, 3] = torch.inf
        run(packed, backward)
    torch.cuda.synchronize()
    print(f"no error so far; launched were\n{dispatch_counts()}")


if __name__ == "__main__":
    main()
