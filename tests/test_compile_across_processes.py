"""What one process compiled and left on disk, in a process that uses other kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parent
PROGRAM = TESTS / "programs" / "compiled.py"
RUN_AND_COUNT = TESTS / "run_and_count.py"
CACHES_ON = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}


class Run(NamedTuple):
    """A compiled layer's results, what the caches did, and the calls that were counted."""

    results: dict[str, Tensor]
    caches: dict[str, int]
    counts: dict[str, Any] | None

    @property
    def compiled_anew(self) -> bool:
        return self.caches.get("autograd_cache_miss", 0) > 0

    @property
    def found_all(self) -> bool:
        """Whether no graph was compiled here: all of them came from the disk.

        Triton's binaries are another matter, which `async_compile_cache_...` counts.
        """
        used = {
            name
            for name, count in self.caches.items()
            if count > 0 and not name.startswith("async_compile")
        }
        return "autograd_cache_hit" in used and all(name.endswith("_hit") for name in used)


@pytest.fixture(scope="module")
def compiled(
    run_python: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path, dict[str, str]], Run]:
    """Runs the program with its caches in a folder."""

    def run(folder: Path, environment: dict[str, str]) -> Run:
        results = tmp_path_factory.mktemp("results") / "results.pt"
        printed = run_python(
            *(RUN_AND_COUNT, PROGRAM, results),
            **CACHES_ON,
            **environment,
            TORCHINDUCTOR_CACHE_DIR=str(folder),
        )
        caches, counts = map(json.loads, printed.splitlines()[-2:])
        return Run(torch.load(results), caches, counts)

    return run


@pytest.fixture(scope="module")
def cache_of_stock(tmp_path_factory: pytest.TempPathFactory, where: str) -> Path:
    return tmp_path_factory.mktemp("stock")


@pytest.fixture(scope="module")
def stock_run(compiled: Callable[..., Run], cache_of_stock: Path, stock: dict[str, str]) -> Run:
    """Compiled, into a new cache, where nothing of ours is at work."""
    run = compiled(cache_of_stock, stock)
    assert run.compiled_anew
    assert run.counts is None
    return run


def test_what_a_process_without_us_compiled_is_served(
    compiled: Callable[..., Run],
    stock_run: Run,
    cache_of_stock: Path,
    asks_for_fa4_triton: dict[str, str],
) -> None:
    served = compiled(cache_of_stock, asks_for_fa4_triton)
    assert served.found_all, served.caches
    assert served.counts is not None
    assert served.counts["active"] == "fa4-triton"
    assert served.counts["declined"] == {}
    assert sorted(served.counts["served"].values()) == [1, 1]  # the forward and the backward
    assert served.results.keys() == stock_run.results.keys()
    for name, theirs in stock_run.results.items():
        mine = served.results[name]
        difference = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert difference < 2e-2, name
    assert any(
        not torch.equal(served.results[name], theirs) for name, theirs in stock_run.results.items()
    ), "bits that are all stock's were computed by stock"


def test_what_a_process_with_us_compiled_is_stocks_bit_for_bit_without_us(
    compiled: Callable[..., Run],
    stock_run: Run,
    tmp_path: Path,
    stock: dict[str, str],
    asks_for_fa4_triton: dict[str, str],
) -> None:
    served = compiled(tmp_path, asks_for_fa4_triton)
    assert served.compiled_anew
    assert served.counts is not None
    assert sorted(served.counts["served"].values()) == [1, 1]
    after = compiled(tmp_path, stock)
    assert after.found_all, after.caches
    assert after.counts is None
    for name, theirs in stock_run.results.items():
        assert torch.equal(after.results[name], theirs), name
