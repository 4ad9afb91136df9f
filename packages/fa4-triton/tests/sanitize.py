"""Every kernel on small shapes, to be run under compute-sanitizer on a CUDA device.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        python packages/fa4-triton/tests/sanitize.py

Also with `--tool racecheck` and `--tool synccheck`. Without torch's caching allocator every tensor
is an allocation of its own, so that one row too far is an access out of bounds. Lengths are chosen
to leave part of every block empty, the non-finite values to send each repair path once.
"""

from __future__ import annotations

import torch

from fa4_triton.kernel_set import TritonKernels
from flash_attention_registry.sdpa import AttentionCall

HEAD_DIMS = (64, 80, 128, 192, 256)
LENGTHS = ((97, 97), (33, 130), (130, 33), (1, 70), (300, 500))


def randn(*shape: int) -> torch.Tensor:
    """Normal bf16 on the device."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def run(call: AttentionCall) -> None:
    """Forward and backward of one call."""
    kernels = TritonKernels()
    out, lse = kernels.forward(call)
    kernels.backward(call, torch.randn_like(out), out, lse)


def offsets(*lengths: int) -> torch.Tensor:
    """cu_seqlens of packed sequences."""
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)


def main() -> None:
    """Run the cases, dense and packed."""
    torch.manual_seed(0)
    calls = 0
    for head_dim in HEAD_DIMS:
        for seq_len_q, seq_len_k in LENGTHS:
            q = randn(1, seq_len_q, 2, head_dim)
            k, v = randn(1, seq_len_k, 1, head_dim), randn(1, seq_len_k, 1, head_dim)
            call = AttentionCall(q, k, v, head_dim**-0.5, causal=True)
            run(call)
            run(call._replace(causal=False))
            run(call._replace(causal=False, window_left=20, window_right=9))
            v[:, -1, :, 3] = torch.inf
            k[:, -2] = torch.nan
            run(call)
            calls += 4
        q, k, v = randn(103, 2, head_dim), randn(60, 2, head_dim), randn(60, 2, head_dim)
        packed = AttentionCall(
            q,
            k,
            v,
            head_dim**-0.5,
            causal=True,
            cu_seqlens_query=offsets(70, 0, 33),
            cu_seqlens_key=offsets(20, 40, 0),
            max_seqlen_query=70,
            max_seqlen_key=40,
        )
        run(packed)
        calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls ran")


if __name__ == "__main__":
    main()
