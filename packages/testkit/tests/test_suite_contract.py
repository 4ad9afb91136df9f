"""Contract tests on a distribution that is right, and on faults beside those in `broken`.

Faults are planted in the module of a provider that a distribution offers, which is there for the
test alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest

sys.path.append(str(Path(__file__).parent))  # packages' tests are no packages themselves

from broken import BROKEN

# Inner runs forget what they were the first to import, and torch's ops keep one set of routers.
import flash_attention_testkit.standalone  # noqa: F401
from flash_attention_registry import default_registry
from flash_attention_registry.discovery import ENTRY_POINT_GROUP
from flash_attention_testkit.suite.contract import ContractTests

pytest_plugins = ["pytester"]

KERNELS = Path(__file__).with_name("plain_kernel_set.py").read_text(encoding="utf-8")

PROVIDER = """
import flash_attention_registry as registry

def kernel_set():
    from kit_kernels import PlainKernelSet
    return PlainKernelSet()

def install():
    from flash_attention_registry.sdpa import install
    return install(kernel_set(), "cpu")

def declaration():
    return {"register_fn": install}

def register():
    registry.register_flash_attention_impl("kit-planted", **declaration())
"""


@dataclass(frozen=True)
class Distribution:
    """What a distribution has that is not as it should be.

    Attributes:
        source: Appended to the provider's module.
        version: The distribution's.
        requires: What it requires.
        named: What the tests are run by.
    """

    source: str = ""
    version: str = "1.0"
    requires: tuple[str, ...] = ("torch", "flash-attention-registry>=0.1,<0.2")
    named: str = "kit-planted"


@dataclass
class Only:
    """A pytest plugin: only the standard tests of the contract, and what became of them."""

    passed: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if hasattr(ContractTests, item.originalname)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("::")[2]
        if report.failed:
            self.failed.add(name)
        elif report.when == "call" and report.passed:
            self.passed.add(name)


Run: TypeAlias = Callable[[Distribution], Only]


@pytest.fixture
def run(pytester: pytest.Pytester, fake_entry_points: Any) -> Iterator[Run]:
    """Runs the contract tests on what a distribution offers."""
    registry = default_registry()
    before = registry.snapshot()

    def run_on(offered: Distribution) -> Only:
        fake_entry_points.distribution(
            "kit-dist",
            {ENTRY_POINT_GROUP: {"kit-planted": "kit_planted:register"}},
            version=offered.version,
            requires=offered.requires,
            modules={"kit_planted": PROVIDER + offered.source, "kit_kernels": KERNELS},
        )
        registry.discovery.refresh()
        seen = Only()
        command = ["--pyargs", "flash_attention_testkit.standalone", "-p", "no:cacheprovider", "-q"]
        named = ["--flash-attention-impl", offered.named]
        ignored = ["-W", "ignore::RuntimeWarning"]
        pytester.inline_run(*command, *named, *ignored, plugins=[seen])
        return seen

    yield run_on
    registry.reset(before)


def test_who_is_right_passes(run: Run) -> None:
    seen = run(Distribution())
    assert not seen.failed
    assert seen.passed == TESTS


TESTS = {name for name in dir(ContractTests) if name.startswith("test_")}


@pytest.mark.parametrize(
    "requires", ["flash-attention-registry>=9,<10", "flash_attention_registry<0.2; extra == 'all'"]
)
def test_a_range_without_the_installed_registry_is_found(run: Run, requires: str) -> None:
    seen = run(Distribution(requires=(requires,)))
    assert seen.failed == {"test_distribution_requires_the_registry_within_bounds"}


# Faults that spoil nearly everything

CANNOT_TELL_WHETHER_IT_IS_AVAILABLE = """
def declaration():
    return {"register_fn": install, "availability": lambda: 1 / 0}
"""
REGISTERS_ANOTHER_NAME = """
def register():
    registry.register_flash_attention_impl("kit-other", register_fn=install)
"""
SERVES_NOTHING = """
def kernel_set():
    from kit_kernels import PlainKernelSet
    kernel_set = PlainKernelSet()
    kernel_set.supports = lambda call: "there are no kernels yet"
    return kernel_set
"""
OF_A_FAMILY = """
def declaration():
    return {"register_fn": install, "family": "KIT"}
"""

FAULTS = {
    "cannot tell whether it is available": (
        Distribution(CANNOT_TELL_WHETHER_IT_IS_AVAILABLE),
        {"test_availability_check_answers"},
    ),
    "registers another name": (
        Distribution(REGISTERS_ANOTHER_NAME),
        {"test_name_is_registered", "test_entry_point_registers_its_name"},
    ),
    "serves nothing": (
        Distribution(SERVES_NOTHING),
        {"test_activation_serves_torchs_attention"},
    ),
    "is named by its family": (
        Distribution(OF_A_FAMILY, named="KIT"),
        {"test_activation_makes_it_current", "test_name_is_registered"},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_the_tests_for_it(run: Run, fault: str) -> None:
    offered, tests = FAULTS[fault]
    assert tests <= run(offered).failed


def test_there_is_a_fault_for_every_test() -> None:
    found = {test.partition("[")[0] for fault in BROKEN.values() for test in fault.expected}
    found |= set().union(*(tests for _, tests in FAULTS.values()))
    assert TESTS - found == {"test_standard_tests_are_not_overridden"}  # see test_suite_base.py
