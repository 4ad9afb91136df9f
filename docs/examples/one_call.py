"""One attention call of fixed inputs: its results, how right they are, how long it takes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attention_testkit import ParityReport, SdpaResult, measure_sdpa_parity

# The forward ops that `scaled_dot_product_attention` may choose, and what each takes after query,
# key and value for causal attention that returns lse.
CAUSAL_ARGUMENTS: dict[str, tuple[object, ...]] = {
    "_scaled_dot_product_flash_attention_for_cpu": (0.0, True),
    "_scaled_dot_product_flash_attention": (0.0, True, False),
    "_scaled_dot_product_cudnn_attention": (None, True, 0.0, True, False),
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is attended to, in bfloat16.

    Attributes:
        query: `[B, S, Hq, D]`.
        key: `[B, S, Hkv, D]`.
        value: `[B, S, Hkv, D]`.
        grad_out: `[B, S, Hq, D]`, what the output is differentiated with.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What gradients are computed for."""
        return self.query, self.key, self.value


def make_inputs(
    batch: int, seq_len: int, heads: tuple[int, int], head_dim: int, *, device: str, seed: int
) -> Inputs:
    """Draw normally distributed inputs; `heads` are those of the queries and of the keys."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value, grad_out = (
        torch.randn(batch, seq_len, number, head_dim, generator=generator).to(
            device, torch.bfloat16
        )
        for number in (heads[0], heads[1], heads[1], heads[0])
    )
    for leaf in (query, key, value):
        leaf.requires_grad_()
    return Inputs(query, key, value, grad_out)


def attend(inputs: Inputs) -> Tensor:
    """Run forward and backward of `scaled_dot_product_attention`; return the output."""
    query, key, value, grad_out = (
        tensor.transpose(1, 2) for tensor in (*inputs.leaves, inputs.grad_out)
    )
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.autograd.grad(out, inputs.leaves, grad_out)
    return out.detach()


def two_backends(inputs: Inputs) -> tuple[SDPBackend, SDPBackend]:
    """Return the first two of torch's backends that can run `inputs`; MATH always can."""
    able = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what is missing before it raises
            try:
                attend(inputs)
            except RuntimeError:
                continue
        able.append(backend)
    return able[0], able[1]


def measure_parity(op: str, inputs: Inputs) -> ParityReport:
    """Compare one call of `op` and its gradients with float64.

    `scaled_dot_product_attention` keeps lse to itself, so its op is called directly.

    Args:
        op: Name of a forward op in `CAUSAL_ARGUMENTS`.
        inputs: What to call it with.
    """
    query, key, value, grad_out = (
        tensor.transpose(1, 2) for tensor in (*inputs.leaves, inputs.grad_out)
    )
    out, lse, *_ = getattr(torch.ops.aten, op)(query, key, value, *CAUSAL_ARGUMENTS[op])
    grads = torch.autograd.grad(out, inputs.leaves, grad_out)
    result = SdpaResult(out.detach().transpose(1, 2), lse.reshape(lse.shape[:3]), *grads)
    tensors = [tensor.detach() for tensor in inputs.leaves]
    return measure_sdpa_parity(op, result, *tensors, grad_out=inputs.grad_out, causal=True)


def milliseconds(inputs: Inputs, repeats: int = 50) -> float:
    """Median time of `attend` on the GPU, by the GPU's clock, after some calls to warm up."""
    times: list[float] = []
    for repeat in range(repeats + 10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        attend(inputs)
        end.record()
        end.synchronize()
        if repeat >= 10:
            times.append(start.elapsed_time(end))
    return median(times)
