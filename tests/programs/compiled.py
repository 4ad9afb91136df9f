"""Compiles a layer that calls attention and runs it once, forward and backward.

    python compiled.py RESULTS

Saves the output and the gradients to the file RESULTS, and prints one line of JSON: how often the
compiler found its work in the caches on disk, and how often not. An ordinary program: it uses torch
and nothing that chooses kernels.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

HEADS = 4
HEAD_DIM = 64
WIDTH = HEADS * HEAD_DIM
# One block of keys: more of them would let a GPU sum gradients in any order.
LENGTH = 64


class Layer(nn.Module):
    """Causal self-attention between two projections."""

    def __init__(self) -> None:
        """Make the projections."""
        super().__init__()
        self.into = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, WIDTH]` to `[B, S, WIDTH]`."""
        query, key, value = self.into(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.out(F.gelu(mixed.transpose(1, 2).flatten(2)))
        return result


def main() -> None:
    """Run the layer, save what it gives, print what the caches did."""
    parser = argparse.ArgumentParser(description="Run a compiled layer forward and backward.")
    parser.add_argument("results")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    layer = Layer().to(device, torch.bfloat16)
    x = torch.randn(2, LENGTH, WIDTH).to(device, torch.bfloat16).requires_grad_()
    out = torch.compile(layer, fullgraph=True)(x)
    out.float().square().mean().backward()
    results = {"out": out.detach(), "x": x.grad}
    results |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    torch.save({name: tensor.cpu() for name, tensor in results.items()}, options.results)
    found = {
        name: count
        for group in ("aot_autograd", "inductor")
        for name, count in counters[group].items()
        if name.endswith(("cache_hit", "cache_miss", "cache_bypass"))
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
