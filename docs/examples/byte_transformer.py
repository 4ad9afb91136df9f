"""A small causal transformer over bytes, as anyone would write it, and its training.

Nothing here knows of the registry: attention is `F.scaled_dot_product_attention` and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256
# At twice this, single steps jump, and for some seeds rounding moves the losses ten times as far.
LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Size:
    """How large the model is and what it is trained on.

    Attributes:
        layers: Number of blocks.
        query_heads: Heads of the queries.
        key_heads: Heads of keys and values; each is shared by `query_heads / key_heads` queries'.
        head_dim: Numbers per head; the model is `query_heads * head_dim` wide.
        batch: Pieces of text per step.
        seq_len: Bytes per piece.
    """

    layers: int
    query_heads: int
    key_heads: int
    head_dim: int
    batch: int
    seq_len: int

    @property
    def width(self) -> int:
        """Numbers per byte between the blocks."""
        return self.query_heads * self.head_dim

    def __str__(self) -> str:
        """The model in a line."""
        return (
            f"{self.layers} layers, {self.width} wide, {self.query_heads} query heads on "
            f"{self.key_heads} key heads of {self.head_dim}, bfloat16"
        )


class Attention(nn.Module):
    """Causal self-attention in which several query heads share a key head."""

    def __init__(self, size: Size) -> None:
        """Make the projections."""
        super().__init__()
        self.head_dim = size.head_dim
        self.query = nn.Linear(size.width, size.width, bias=False)
        self.key = nn.Linear(size.width, size.key_heads * size.head_dim, bias=False)
        self.value = nn.Linear(size.width, size.key_heads * size.head_dim, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix each row of `x`, `[B, S, width]`, with the rows before it."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, S, D]
            for projection in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention, then two layers for each position by itself."""

    def __init__(self, size: Size) -> None:
        """Make the layers."""
        super().__init__()
        self.attention_norm = nn.LayerNorm(size.width)
        self.attention = Attention(size)
        self.mlp = nn.Sequential(
            nn.LayerNorm(size.width),
            nn.Linear(size.width, 4 * size.width),
            nn.GELU(),
            nn.Linear(4 * size.width, size.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, width]` to `[B, S, width]`."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(x)
        return out


class ByteTransformer(nn.Module):
    """Guesses the next byte."""

    def __init__(self, size: Size) -> None:
        """Make the embeddings, the blocks and the head."""
        super().__init__()
        self.byte = nn.Embedding(BYTES, size.width)
        self.position = nn.Embedding(size.seq_len, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, BYTES, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Bytes `[B, S]` to the scores of each next byte, `[B, S, 256]`."""
        positions = torch.arange(text.shape[1], device=text.device)
        out: Tensor = self.head(self.norm(self.blocks(self.byte(text) + self.position(positions))))
        return out


def read_text(root: Path) -> tuple[Tensor, int]:
    """Read the documents of the checkout at `root`.

    Returns:
        Their bytes, one after the other, as int64; and the number of documents.
    """
    patterns = ("*.md", "docs/*.md", "packages/*/README.md")
    files = sorted(file for pattern in patterns for file in root.glob(pattern))
    text = b"\n".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), len(files)


def cut_batches(text: Tensor, size: Size, steps: int, seed: int) -> Tensor:
    """Cut pieces out of `text` at random, `[steps, batch, seq_len + 1]`: the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (steps, size.batch, 1)
    starts = torch.randint(len(text) - size.seq_len, shape, generator=generator)
    return text[starts + torch.arange(size.seq_len + 1)]


@dataclass(frozen=True, slots=True)
class Training:
    """What became of one training run.

    Attributes:
        losses: Of each step, in nats per byte.
        seconds: Of each step, from its start to the end of its last kernel.
    """

    losses: list[float]
    seconds: list[float]


def train(size: Size, batches: Iterable[Tensor], *, device: str, seed: int) -> Training:
    """Train a new model from `seed`, one step a batch.

    Args:
        size: Of the model.
        batches: Each `[batch, seq_len + 1]`; every byte but the first is to be guessed.
        device: Where to train.
        seed: Of the weights.
    """
    torch.manual_seed(seed)
    model = ByteTransformer(size).to(device, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    result = Training([], [])
    for batch in batches:
        start = time.perf_counter()
        text = batch.to(device)
        scores = model(text[:, :-1])
        loss = F.cross_entropy(scores.flatten(0, 1).float(), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.losses.append(loss.item())  # waits for the forward pass
        if device == "cuda":
            torch.cuda.synchronize()  # and this for the rest
        result.seconds.append(time.perf_counter() - start)
    return result


def largest_gap(one: Training, other: Training) -> float:
    """Return how far two loss curves are apart where they are farthest, in nats per byte."""
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))
