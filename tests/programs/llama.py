"""Trains a small Llama of Hugging Face `transformers` to guess the next byte of a text.

    python llama.py FILE [--size gpu] [--steps 16]

The model is built from a configuration, with random weights: nothing is downloaded. Prints one
line of JSON: the loss of every step, in nats per byte, and how many calls of attention one step
makes. An ordinary program: it uses transformers and nothing that chooses kernels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BYTES = 256
# Two query heads share a key head. A batch is so many sequences of so many bytes.
SIZES = {
    "cpu": {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 32, "batch": 1, "seq_len": 64},
    "gpu": {"layers": 6, "heads": 16, "kv_heads": 8, "head_dim": 64, "batch": 8, "seq_len": 2048},
}


def make_model(size: dict[str, int]) -> LlamaForCausalLM:
    """A Llama with random weights, in bfloat16, whose attention is torch's SDPA."""
    width = size["heads"] * size["head_dim"]
    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        max_position_embeddings=size["seq_len"],
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def main() -> None:
    """Train, and print the losses."""
    parser = argparse.ArgumentParser(description="Train a Llama on the bytes of a text.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    size = SIZES[options.size]
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(options.seed)
    model = make_model(size).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    text = torch.frombuffer(bytearray(options.file.read_bytes()), dtype=torch.uint8).long()
    losses = []
    for _ in range(options.steps):
        starts = torch.randint(len(text) - size["seq_len"] + 1, (size["batch"], 1))
        batch = text[starts + torch.arange(size["seq_len"])].to(device)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(json.dumps({"losses": losses, "attention_calls_per_step": size["layers"]}))


if __name__ == "__main__":
    main()
