"""A provider that is right passes the standard tests, whatever their numbers are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeAlias

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # packages' tests are no packages themselves

from standard_run import (
    failed_tests,
    let_correct_appear,
    let_correct_shortcut_appear,
    processes,
)

Runs: TypeAlias = "dict[tuple[str, int], Future[dict[str, str]]]"
"""What fails, by dtype and seed; the runs go on meanwhile."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NUMERICAL = "is_right or are_right or exactly or scale"
"""The tests whose outcome numbers may change."""

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_seed = pytest.mark.parametrize("seed", range(20))


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """The runs that are asked for: all tests for one seed, those of numbers for the others."""
    gpu = request.param
    with processes(gpu=gpu) as pool:
        yield {
            (dtype, seed): pool.submit(
                failed_tests,
                partial(let_correct_appear, DTYPES[dtype]),
                "--flash-attention-grid=quick",
                f"--flash-attention-seed={seed}",
                *(["-k", NUMERICAL] if seed else []),
            )
            for dtype, seed in asked_for(request, gpu)
        }


def asked_for(request: pytest.FixtureRequest, gpu: bool) -> list[tuple[str, int]]:
    """Dtypes and seeds of this module's tests on this device."""
    params = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    return [(param["dtype"], param["seed"]) for param in params if param["runs"] is gpu]


def told(failed: dict[str, str]) -> str:
    """Tests that have failed and how."""
    return "\n\n".join(f"{test}\n{text}" for test, text in failed.items())


@every_dtype
@every_seed
@pytest.mark.parametrize(
    "runs", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["cpu", "cuda"], indirect=True
)
def test_a_correct_provider_raises_no_false_alarm(runs: Runs, dtype: str, seed: int) -> None:
    failed = runs[dtype, seed].result()
    assert not failed, told(failed)


def test_a_correct_shortcut_raises_no_false_alarm() -> None:
    with processes(gpu=False) as pool:
        failed = pool.submit(
            failed_tests, let_correct_shortcut_appear, "--flash-attention-grid=quick"
        ).result()
    assert not failed, told(failed)
