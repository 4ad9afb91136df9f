"""Compiling ahead: what is refused, and why. What is compiled is seen in test_launch.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import fa4_triton


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"head_dims": [64, 60]}, r"60 among its head_dims; served are 8, 16, .*, 256$"),
        ({"head_dims": [264]}, "264 among its head_dims"),
        ({"head_dims": [64.0]}, "64.0 among its head_dims; served are 8"),
        (
            {"head_dims": [64], "dtypes": [torch.float32]},
            r"torch.float32 among its dtypes; served are torch.bfloat16, torch.float16$",
        ),
        ({"head_dims": [64], "masks": ["full"]}, "'full' among its masks; served are none"),
        ({"head_dims": [64], "directions": ["both"]}, "served are forward, backward$"),
        ({"head_dims": [64], "packed": [1]}, "1 among its packed; served are False, True$"),
        ({"head_dims": [64], "grouped": ["no"]}, "'no' among its grouped; served are False, True$"),
    ],
)
def test_what_is_not_served_is_an_error_that_says_what_is(asked: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fa4_triton.warmup(**asked)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("head_dims", 64),
        ("dtypes", torch.bfloat16),
        ("masks", "causal"),
        ("directions", "forward"),
        ("packed", True),
        ("grouped", False),
    ],
)
def test_one_thing_in_place_of_several_is_an_error_that_says_how_to_give_it(
    name: str, given: Any
) -> None:
    asked: dict[str, Any] = {"head_dims": [64], name: given}
    with pytest.raises(TypeError, match=re.escape(f"give {name}=[{given!r}]")):
        fa4_triton.warmup(**asked)


@pytest.fixture
def compiled_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretends that there are a Turing and a Hopper GPU; which is compiled for."""
    from fa4_triton import ahead

    chosen: list[int] = []
    capabilities = [(7, 5), (9, 0)]
    monkeypatch.setattr(ahead.interpreter, "INTERPRETED", False)
    monkeypatch.setattr(ahead.provider, "why_unavailable", lambda: None)
    monkeypatch.setattr(ahead, "variants_of", lambda *_: [])
    monkeypatch.setattr(ahead, "_compile", lambda variants, index, workers: chosen.append(index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    return chosen


@pytest.mark.parametrize("device", [None, 1, "cuda", "cuda:1", torch.device("cuda:1")])
def test_a_device_is_named_in_any_way_of_torch(compiled_for: list[int], device: Any) -> None:
    fa4_triton.warmup(head_dims=[64], device=device)
    assert compiled_for == [1]


@pytest.mark.parametrize(
    ("device", "error", "text"),
    [
        (-1, ValueError, "CUDA device -1, and 2 are visible to torch; give an index from 0 to 1"),
        (99, ValueError, "CUDA device 99, and 2 are visible"),
        ("cuda:2", ValueError, "CUDA device 2, and 2 are visible"),
        ("cpu", ValueError, "a CUDA device, and was given cpu; give 'cuda'"),
        (True, TypeError, "was given True; give device=0"),
        (0, ValueError, r"capability 8\.0 or newer, and CUDA device 0 has 7\.5; give the index"),
    ],
)
def test_a_device_that_nothing_can_be_compiled_for_is_an_error(
    compiled_for: list[int], device: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        fa4_triton.warmup(head_dims=[64], device=device)
    assert compiled_for == []


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
