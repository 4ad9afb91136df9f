"""Each broken provider fails the standard tests that are named for what it breaks, and no other."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeAlias

import pytest

sys.path.append(str(Path(__file__).parent))  # packages' tests are no packages themselves

from broken import BROKEN, let_appear, unexpected, unmatched
from standard_run import Appear, failed_tests, processes

Runs: TypeAlias = Mapping[str, "Future[dict[str, str]]"]
"""What fails of the standard tests, by the name of the provider; the runs go on meanwhile."""

NAMES = [
    pytest.param(name, marks=pytest.mark.gpu if broken.gpu else ())
    for name, broken in BROKEN.items()
]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """The standard tests on the providers that are asked for, all on their way."""
    wanted = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and not item.get_closest_marker("skip")
    ]
    with ExitStack() as stack:
        pools: dict[bool, Executor] = {}
        for gpu in {BROKEN[name].gpu for name in wanted}:
            pools[gpu] = stack.enter_context(ThreadPoolExecutor(1) if gpu else processes(gpu=False))
        yield {
            name: pools[BROKEN[name].gpu].submit(
                _failed_alone if BROKEN[name].gpu else failed_tests,
                partial(let_appear, name),
                "--flash-attention-grid=quick",
            )
            for name in wanted
        }


def _failed_alone(appear: Appear, *arguments: str) -> dict[str, str]:
    """What fails, in a new process: of a capture that failed torch's allocator keeps all memory."""
    with processes(gpu=True) as pool:
        return pool.submit(failed_tests, appear, *arguments).result()


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_provider_fails_the_tests_of_its_promise(runs: Runs, name: str) -> None:
    failed, broken = runs[name].result(), BROKEN[name]
    assert not unmatched(broken.expected, failed), "these should have failed"
    texts = [f"{test}\n{failed[test]}" for test in unexpected(failed, broken.allowed)]
    assert not texts, "\n\n".join(["these should have passed:", *texts])
