"""Compiling ahead: what is refused, and why. What is compiled is seen in test_launch.py."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import fa4_triton


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"head_dims": [64, 60]}, r"head_dim 60; served are 8, 16, .*, 256$"),
        ({"head_dims": [264]}, "head_dim 264"),
        (
            {"head_dims": [64], "dtypes": [torch.float32]},
            r"dtype torch.float32; served are torch.bfloat16, torch.float16$",
        ),
        ({"head_dims": [64], "masks": ["full"]}, "mask 'full'; served are none, causal, window$"),
        ({"head_dims": [64], "directions": ["both"]}, "served are forward, backward$"),
    ],
)
def test_what_is_not_served_is_an_error_that_says_what_is(asked: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fa4_triton.warmup(**asked)


def in_a_process(interpret: str) -> str:
    code = (
        "import fa4_triton\n"
        "try: fa4_triton.warmup(head_dims=[64])\n"
        "except RuntimeError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_the_interpreter_compiles_nothing() -> None:
    said = in_a_process("1")
    assert "TRITON_INTERPRET is set: Triton interprets them and compiles nothing" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_the_provider_s() -> None:
    said = in_a_process("0")
    assert said.startswith("warmup() cannot compile kernels here: ")
    assert "CUDA" in said
