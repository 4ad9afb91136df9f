"""Implementations are switched while other threads call attention: nothing wrong, no crash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STRESS = Path(__file__).resolve().parent / "stress.py"
SECONDS = 20
HIDDEN_GPU = {"CUDA_VISIBLE_DEVICES": ""}


# The forward ran before a switch to the kernel set, and cuDNN's own backward must follow it.
FOLLOWS_CUDNN = "_scaled_dot_product_cudnn_attention_backward: forward was run by cuDNN"


def unharmed(printed: str, *fair_declines: str) -> dict[str, Any]:
    """What the program says it did, once it says that nothing went wrong.

    Args:
        printed: Its output.
        *fair_declines: Why a call may have gone to stock although a kernel set was active.
    """
    __tracebackhide__ = True
    outcome: dict[str, Any] = json.loads(printed)
    assert outcome["failed"] == 0, "\n".join(outcome["errors"])
    assert outcome["wrong"] == 0, f"of {outcome['calls']} calls"
    assert set(outcome["declined"]) <= set(fair_declines)  # one that raises is counted there
    assert outcome["restored"]
    return outcome


def test_eight_threads_and_two_kernel_sets(run_python: Callable[..., str]) -> None:
    outcome = unharmed(run_python(STRESS, SECONDS, "stock", "plain-1", "plain-2", **HIDDEN_GPU))
    assert outcome["calls"] > 2000
    assert outcome["backwards"] > 500
    assert min(outcome["switches"][name] for name in ("stock", "plain-1", "plain-2")) > 200
    assert min(outcome["served_by"][name] for name in ("plain-1", "plain-2")) > 200
    assert sum(outcome["served_by"].values()) == outcome["served"]
    assert outcome["served"] < outcome["calls"] + outcome["backwards"]  # stock had its share


def test_eight_threads_and_triton_in_its_interpreter(run_python: Callable[..., str]) -> None:
    environment = {"TRITON_INTERPRET": "1", **HIDDEN_GPU}
    outcome = unharmed(run_python(STRESS, 10, "stock", "fa4-triton", **environment))
    # On two slow cores the interpreter makes four calls a second.
    assert outcome["calls"] > 12
    assert outcome["switches"]["fa4-triton"] > 100
    assert 4 < outcome["served"] < outcome["calls"] + outcome["backwards"]


@pytest.mark.gpu
def test_eight_threads_and_triton_on_a_gpu(run_python: Callable[..., str]) -> None:
    printed = run_python(STRESS, SECONDS, "stock", "fa4-triton", "--device", "cuda")
    outcome = unharmed(printed, FOLLOWS_CUDNN)
    assert outcome["calls"] > 2000
    assert outcome["backwards"] > 500
    assert outcome["switches"]["fa4-triton"] > 200
    assert 500 < outcome["served"] < outcome["calls"] + outcome["backwards"]


def test_wrong_results_are_noticed(run_python: Callable[..., str]) -> None:
    outcome = json.loads(run_python(STRESS, 2, "stock", "plain-1", "plain-wrong", **HIDDEN_GPU))
    assert 0 < outcome["wrong"] < outcome["calls"]
