"""Trains `torch.nn.TransformerEncoder` to guess the next byte of a text.

    python encoder.py FILE [--size gpu] [--steps 16]

Prints one line of JSON: the loss of every step, in nats per byte, and how many calls of attention
one step makes. An ordinary program: it uses torch and nothing that chooses kernels.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


@dataclass(frozen=True)
class Size:
    """Of the model, and of what one step sees."""

    layers: int
    heads: int
    head_dim: int
    batch: int
    seq_len: int

    @property
    def width(self) -> int:
        """Numbers per byte between the layers."""
        return self.heads * self.head_dim


SIZES = {
    "cpu": Size(layers=2, heads=4, head_dim=32, batch=1, seq_len=64),
    "gpu": Size(layers=6, heads=8, head_dim=64, batch=16, seq_len=1024),
}


class Model(nn.Module):
    """A stack of encoder layers that look at earlier bytes only."""

    def __init__(self, size: Size) -> None:
        """Make the layers; without dropout, since dropout is not what is measured."""
        super().__init__()
        self.byte = nn.Embedding(BYTES, size.width)
        self.position = nn.Embedding(size.seq_len, size.width)
        layer = nn.TransformerEncoderLayer(
            size.width, size.heads, 4 * size.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, size.layers, norm=nn.LayerNorm(size.width), enable_nested_tensor=False
        )
        self.head = nn.Linear(size.width, BYTES, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Bytes `[B, S]` to the scores of each next byte, `[B, S, 256]`."""
        length = text.shape[1]
        x = self.byte(text) + self.position(torch.arange(length, device=text.device))
        # `is_causal` says what the mask is, so that torch may leave the mask itself out.
        mask = nn.Transformer.generate_square_subsequent_mask(length, x.device, x.dtype)
        scores: Tensor = self.head(self.encoder(x, mask=mask, is_causal=True))
        return scores


def main() -> None:
    """Train, and print the losses."""
    parser = argparse.ArgumentParser(description="Train an encoder on the bytes of a text.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    size = SIZES[options.size]
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(options.seed)
    model = Model(size).to(device, torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    text = torch.frombuffer(bytearray(options.file.read_bytes()), dtype=torch.uint8).long()
    losses = []
    for _ in range(options.steps):
        starts = torch.randint(len(text) - size.seq_len, (size.batch, 1))
        batch = text[starts + torch.arange(size.seq_len + 1)].to(device)
        scores = model(batch[:, :-1])
        loss = F.cross_entropy(scores.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(json.dumps({"losses": losses, "attention_calls_per_step": size.layers}))


if __name__ == "__main__":
    main()
