"""Runs of the standard tests in processes of their own: several at once, and no fault survives."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from plain_kernel_set import PlainHeadsFirst, PlainKernelSet

from flash_attention_registry import default_registry, register_flash_attention_impl
from flash_attention_registry.sdpa import KernelSet, install
from flash_attention_testkit import FakeEntryPoints, grids

NAME = "kit-tried"
"""The implementation that is tested."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What a provider may use to appear; all of it is taken away after its run.

    Attributes:
        entry_points: Where it may seem installed.
        patch: Changes code that is not the provider's own.
    """

    entry_points: FakeEntryPoints
    patch: pytest.MonkeyPatch


Appear = Callable[[Stage], None]
"""Makes an implementation known as ``NAME``."""


def device_type() -> str:
    """Where implementations are installed."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def offer(kernel_set: Callable[[], KernelSet], **checks: Any) -> None:
    """Register an implementation that installs a kernel set."""
    register_flash_attention_impl(
        NAME, register_fn=lambda: install(kernel_set(), device_type()), **checks
    )


def let_correct_appear(dtype: torch.dtype, stage: Stage) -> None:
    """Offer the plain kernel set with one dtype alone, and have all cases of the grids in it."""

    class OfOneDtype(PlainKernelSet):
        capabilities = replace(PlainKernelSet.capabilities, dtypes=frozenset({dtype}))

    usual = replace(grids.USUAL_CAPABILITIES, dtypes=frozenset({dtype}))
    stage.patch.setattr(grids, "USUAL_CAPABILITIES", usual)
    offer(OfOneDtype)


def let_correct_shortcut_appear(stage: Stage) -> None:
    """Offer the plain kernel set with the shortcut for SDPA's layout."""
    offer(PlainHeadsFirst)


@contextmanager
def processes(*, gpu: bool) -> Iterator[ProcessPoolExecutor]:
    """Processes that can call ``failed_tests``: one with a CUDA device, or some without."""
    workers = 1 if gpu else min(os.cpu_count() or 1, 4)
    with ProcessPoolExecutor(workers, get_context("spawn"), _prepare, (gpu,)) as pool:
        yield pool
        pool.shutdown(cancel_futures=True)


def _prepare(gpu: bool) -> None:
    """Once in each process."""
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)  # what is computed is small, and the other cores have work
    from hypothesis import Phase, settings

    # Which cases fail is not of interest here, so none is made smaller.
    settings.register_profile("unshrunk", phases=(Phase.explicit, Phase.generate))
    settings.load_profile("unshrunk")


class _Failures:
    """A pytest plugin: which tests have failed, by name and parameters."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.texts[report.nodeid.rpartition("::")[2]] = report.longreprtext
        elif report.when == "call" and report.passed:
            self.passed += 1


PLUGINS = ("cacheprovider", "logging", "terminal", "threadexception", "unraisableexception")
"""What costs time in each of the many tests and reports nothing that is looked at."""


def failed_tests(appear: Appear, *arguments: str) -> dict[str, str]:
    """Run all standard tests, and say which have failed and how, by name and parameters.

    Args:
        appear: Is called in this process first.
        *arguments: More of pytest's command line.
    """
    seen, registry = _Failures(), default_registry()
    before = registry.snapshot()
    command = ["--pyargs", "flash_attention_testkit.standalone", "--flash-attention-impl", NAME]
    command += [f"-pno:{plugin}" for plugin in PLUGINS]
    with (
        TemporaryDirectory() as folder,
        FakeEntryPoints(Path(folder)) as entry_points,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.chdir(folder)
        registry.discovery.refresh()
        appear(Stage(entry_points, patch))
        pytest.main([*command, "-Wignore", f"--rootdir={folder}", *arguments], [seen])
        registry.reset(before)
    assert seen.passed, "no test has run"
    return seen.texts
