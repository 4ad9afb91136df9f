"""Every kernel on small shapes, to be run under compute-sanitizer on a Hopper GPU.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        python packages/fa4-cuda/tests/sanitize.py [HEAD_DIM ...]

Also with `--tool racecheck` and `--tool synccheck`. Without torch's caching allocator every tensor
is an allocation of its own, so that one row too far is an access out of bounds. Lengths are chosen
to leave part of every block empty, the non-finite values to send each repair path once.
"""

from __future__ import annotations

import sys

import torch

from fa4_cuda.kernel_set import CudaKernels
from flash_attention_registry.sdpa import AttentionCall

HEAD_DIMS = (64, 80, 128, 192, 256)
LENGTHS = ((197, 197), (33, 130), (330, 133), (1, 70))


def randn(*shape: int) -> torch.Tensor:
    """Normal bf16 on the device."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def run(call: AttentionCall, *, poison: bool = False) -> int:
    """Forward and backward of one call, in both ways of adding; their number."""
    kernels = CudaKernels()
    out, lse = kernels.forward(call)
    grad_out = randn(*out.shape)
    if poison:
        grad_out[..., -1, :, 0] = torch.nan
    for deterministic in (False, True):
        kernels.backward(call, grad_out, out, lse, deterministic=deterministic)
    return 3


def offsets(*lengths: int) -> torch.Tensor:
    """cu_seqlens of packed sequences."""
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)


def main() -> None:
    """Run the cases, dense and packed."""
    torch.manual_seed(0)
    calls = 0
    for head_dim in [int(word) for word in sys.argv[1:]] or HEAD_DIMS:
        for seq_len_q, seq_len_k in LENGTHS:
            q = randn(1, seq_len_q, 2, head_dim)
            k, v = randn(1, seq_len_k, 1, head_dim), randn(1, seq_len_k, 1, head_dim)
            call = AttentionCall(q, k, v, head_dim**-0.5, causal=True)
            calls += run(call)
            calls += run(call._replace(causal=False, window_left=20, window_right=9))
            v[:, -1, :, 3] = torch.inf
            k[:, -2] = torch.nan
            calls += run(call, poison=True)
        # More tiles than thread blocks.
        q = randn(80, 130, 4, head_dim)
        k, v = randn(80, 130, 2, head_dim), randn(80, 130, 2, head_dim)
        calls += run(AttentionCall(q, k, v, head_dim**-0.5, causal=True))
        q, k, v = randn(203, 2, head_dim), randn(160, 2, head_dim), randn(160, 2, head_dim)
        packed = AttentionCall(
            q,
            k,
            v,
            head_dim**-0.5,
            causal=True,
            cu_seqlens_query=offsets(170, 0, 33),
            cu_seqlens_key=offsets(20, 140, 0),
            max_seqlen_query=170,
            max_seqlen_key=140,
        )
        calls += run(packed)
        k[10] = torch.nan
        calls += run(packed, poison=True)
    torch.cuda.synchronize()
    print(f"{calls} calls ran")


if __name__ == "__main__":
    main()
