"""The pytest plugin: loaded by pytest wherever the testkit is installed, and light for that.

It imports neither torch nor the registry: a fixture imports the registry when a test asks for it,
and torch is imported when a test is marked ``gpu``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flash_attention_registry import Registry
    from flash_attention_testkit.fake_entry_points import FakeEntryPoints

pytest.register_assert_rewrite("flash_attention_testkit.parity", "flash_attention_testkit.suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the command line name an implementation to test, and how thoroughly."""
    group = parser.getgroup("flash-attention", "flash-attention implementations")
    group.addoption(
        "--flash-attention-impl",
        metavar="NAME",
        help="the implementation that flash_attention_testkit.standalone tests",
    )
    group.addoption(
        "--flash-attention-grid",
        choices=("quick", "standard", "exhaustive"),
        help="the cases of ProviderTests (default: quick on a CPU, standard on a GPU)",
    )
    group.addoption(
        "--flash-attention-seed",
        metavar="N",
        type=int,
        default=0,
        help="whence the random numbers of ProviderTests come; 0 by default",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker ``gpu`` known, so that ``--strict-markers`` accepts it."""
    config.addinivalue_line(
        "markers", "gpu: needs a CUDA device; skipped, with the reason, where there is none"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where they cannot run, and say why."""
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    reason = why_no_gpu() if marked else None
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Expect the tests of a ``ProviderTests`` class to fail that its ``xfails`` names."""
    report = yield
    base = sys.modules.get("flash_attention_testkit.suite._base")  # its users have imported it
    if base is not None and isinstance(collector, pytest.Class) and report.passed:
        base.expect_failures(collector.obj, report)
    return report


def why_no_gpu() -> str | None:
    """Why tests marked ``gpu`` cannot run in this process, or None if they can."""
    try:
        import torch
    except ModuleNotFoundError:
        return "needs torch, which is not installed"
    if not torch.cuda.is_available():
        return f"needs a CUDA device, and torch {torch.__version__} finds none"
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y"):
        return "Triton interprets in this process; GPU tests run in their own: pytest -m gpu"
    return None


_TOLD = pytest.StashKey[set[str]]()


def is_first(config: pytest.Config, failure: str) -> bool:
    """Whether a failure that all tests of a run meet is met for the first time, to be told once."""
    told = config.stash.setdefault(_TOLD, set())
    first = failure not in told
    told.add(failure)
    return first


@pytest.fixture
def provider(request: pytest.FixtureRequest) -> str:
    """The name of the implementation that ``ProviderTests`` test; to be given by its author.

    Without a fixture of that name beside the class, it is what ``--flash-attention-impl`` says.
    """
    name = request.config.getoption("flash_attention_impl")
    if name is None:
        if not is_first(request.config, "no name"):
            pytest.fail("no implementation is named; see the first error", pytrace=False)
        raise pytest.UsageError(
            "ProviderTests need a fixture `provider` that returns the implementation's name, in "
            "the class, its module or a conftest.py; or name one on the command line: "
            "--flash-attention-impl NAME"
        )
    return str(name)


@pytest.fixture
def flash_attention_registry_reset() -> Iterator[Registry]:
    """The process's registry, put back afterwards to what it was before the test.

    The test may register, activate and leave active what it likes, here or in torch's own registry.
    Afterwards its implementation is removed through its handle, and registrations, listeners, the
    scan of installed providers, what torch's registry lists and what of ``FLASH_ATTENTION_IMPL``
    was pending are as they were, as is the implementation that was active. The test errs if an
    implementation of it cannot be removed, if kernels it installed still serve torch's operators,
    or if another kernel that was registered from Python stands at one of them.
    """
    from flash_attention_testkit._put_back import put_back

    with put_back() as registry:
        yield registry


@pytest.fixture
def fresh_flash_attention_registry() -> Registry:
    """A registry of the test's own, in which nothing is registered and nothing installed is seen.

    It is not the one on which ``activate_flash_attention_impl`` and its like act.
    """
    from flash_attention_registry import Registry
    from flash_attention_registry.discovery import Discovery

    return Registry(Discovery(prefix="no entry-point group has this name"))


@pytest.fixture
def fake_entry_points(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeEntryPoints]:
    """Lets distributions with entry points appear without installing any; gone after the test."""
    from flash_attention_testkit.fake_entry_points import FakeEntryPoints

    with FakeEntryPoints(tmp_path_factory.mktemp("fake-entry-points")) as entry_points:
        yield entry_points


@pytest.fixture
def no_torch() -> Iterator[None]:
    """In the test ``import torch`` raises ``ModuleNotFoundError``; later all is as it was.

    Modules that have imported torch before the test keep it. That a module is imported without
    torch is therefore best shown in a process of its own.
    """
    from flash_attention_testkit._without_torch import without_torch

    with without_torch():
        yield
