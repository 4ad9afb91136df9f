"""Each contract test finds the faults that it is for.

Faults are planted in the module of a provider that a distribution offers, which is there for the
test alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest

# Inner runs forget what they were the first to import, and torch's ops keep one set of routers.
import flash_attention_testkit.standalone  # noqa: F401
from flash_attention_registry import default_registry
from flash_attention_registry.discovery import ENTRY_POINT_GROUP
from flash_attention_testkit.suite._base import ProviderTestsBase
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
        claimed_by: Another distribution that declares the same name.
        named: What the tests are run by.
    """

    source: str = ""
    version: str = "1.0"
    requires: tuple[str, ...] = ("torch", "flash-attention-registry>=0.1,<0.2")
    claimed_by: str | None = None
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
        if offered.claimed_by is not None:
            names = {ENTRY_POINT_GROUP: {"kit-planted": "kit_planted:register"}}
            fake_entry_points.distribution(offered.claimed_by, names)
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
OWN = TESTS - set(dir(ProviderTestsBase))

# What the installed distribution says

HEAVY_MODULE = "import torch\n"
HEAVY_CALLABLE = """
def declaration():
    import torch
    return {"register_fn": install}
"""
EAGER = """
register()
registry.activate_flash_attention_impl("kit-planted")
"""
REGISTERS_ONCE = """
def declaration():
    assert registry.default_registry().registration("kit-planted") is None
    return {"register_fn": install}
"""
REGISTERS_ANOTHER_EACH_TIME = """
from itertools import count
numbers = count()

def declaration():
    registry.register_flash_attention_impl(f"kit-planted-{next(numbers)}", register_fn=install)
    return {"register_fn": install}
"""
INSTALLS_ONCE = """
def declaration():
    installed = []
    def install_once():
        assert not installed
        installed.append(install())
        return installed[0]
    return {"register_fn": install_once}
"""
RAISES_AT_THE_SECOND_REMOVAL = """
class Handle:
    def __init__(self, handle):
        self.handle = handle

    def remove(self):
        self.handle.remove()
        self.handle = None

def declaration():
    return {"register_fn": lambda: Handle(install())}
"""
REMOVES_WHATEVER_IS_THERE = """
class Handle:
    def remove(self):
        from flash_attention_registry.sdpa import router
        router._slots["cpu"].kernels = None

def declaration():
    return {"register_fn": lambda: install() and Handle()}
"""
CANNOT_TELL_WHETHER_IT_IS_RECOMMENDED = """
def declaration():
    return {"register_fn": install, "recommended": lambda: 1 / 0}
"""
HAS_NO_NAME = """
def kernel_set():
    from kit_kernels import PlainKernelSet
    kernel_set = PlainKernelSet()
    kernel_set.name = ""
    return kernel_set
"""
DECLARES_A_FEATURE_THAT_IS_NONE = """
def kernel_set():
    from dataclasses import replace
    from kit_kernels import PlainKernelSet
    kernel_set = PlainKernelSet()
    kernel_set.capabilities = replace(PlainKernelSet.capabilities, features={"casual"})
    return kernel_set
"""

EXACTLY = {
    "imports torch": (Distribution(HEAVY_MODULE), {"test_import_is_light"}),
    "registering imports torch": (Distribution(HEAVY_CALLABLE), {"test_registering_is_light"}),
    "activates itself": (
        Distribution(EAGER),
        {"test_import_activates_nothing", "test_import_is_light"},
    ),
    "has no version": (Distribution(version="final"), {"test_distribution_has_a_version"}),
    **{
        f"requires {requires or 'nothing'}": (
            Distribution(requires=requires),
            {"test_distribution_requires_the_registry_within_bounds"},
        )
        for requires in (
            (),
            ("flash-attention-registry>=0.1",),
            ("flash-attention-registry>=9,<10",),
            ("flash_attention_registry<0.2; extra == 'all'",),
        )
    },
    "registers once": (
        Distribution(REGISTERS_ONCE),
        {
            "test_registering_again_keeps_one_entry",
            "test_activating_after_registering_again_serves",
        },
    ),
    "registers another each time": (
        Distribution(REGISTERS_ANOTHER_EACH_TIME),
        {"test_registering_again_keeps_one_entry"},
    ),
    "installs once": (
        Distribution(INSTALLS_ONCE),
        {
            "test_activation_after_restore_serves_again",
            "test_failed_activation_of_another_keeps_it_active",
            "test_restore_gives_stocks_bits",
            "test_handle_can_be_removed_twice",
            "test_second_removal_leaves_others_alone",
        },
    ),
    "raises at the second removal": (
        Distribution(RAISES_AT_THE_SECOND_REMOVAL),
        {"test_handle_can_be_removed_twice", "test_second_removal_leaves_others_alone"},
    ),
    "removes whatever is there": (
        Distribution(REMOVES_WHATEVER_IS_THERE),
        {"test_second_removal_leaves_others_alone"},
    ),
    "cannot tell whether it is recommended": (
        Distribution(CANNOT_TELL_WHETHER_IT_IS_RECOMMENDED),
        {"test_recommendation_check_answers"},
    ),
    "has no name": (Distribution(HAS_NO_NAME), {"test_kernel_set_has_a_name"}),
    "declares a feature that is none": (
        Distribution(DECLARES_A_FEATURE_THAT_IS_NONE),
        {"test_capabilities_are_well_formed"},
    ),
}


@pytest.mark.parametrize("fault", EXACTLY)
def test_a_fault_is_found_by_the_tests_for_it(run: Run, fault: str) -> None:
    offered, tests = EXACTLY[fault]
    assert run(offered).failed == tests


# Faults that spoil nearly everything

CANNOT_TELL_WHETHER_IT_IS_AVAILABLE = """
def declaration():
    return {"register_fn": install, "availability": lambda: 1 / 0}
"""
REGISTERS_ANOTHER_NAME = """
def register():
    registry.register_flash_attention_impl("kit-other", register_fn=install)
"""
CANNOT_BE_REMOVED = """
class Handle:
    def remove(self):
        pass

def declaration():
    return {"register_fn": lambda: install() and Handle()}
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

AT_LEAST = {
    "cannot tell whether it is available": (
        Distribution(CANNOT_TELL_WHETHER_IT_IS_AVAILABLE),
        {"test_availability_check_answers"},
    ),
    "registers another name": (
        Distribution(REGISTERS_ANOTHER_NAME),
        {"test_name_is_registered", "test_entry_point_registers_its_name"},
    ),
    "shares its name": (
        Distribution(claimed_by="kit-other"),
        {"test_entry_point_is_of_this_api_and_nobody_elses"},
    ),
    "cannot be removed": (
        Distribution(CANNOT_BE_REMOVED),
        {"test_restore_leaves_no_kernels", "test_restore_gives_stocks_bits"},
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


@pytest.mark.parametrize("fault", AT_LEAST)
def test_a_fault_that_spoils_more_is_found_by_the_tests_for_it(run: Run, fault: str) -> None:
    offered, tests = AT_LEAST[fault]
    assert tests <= run(offered).failed


def test_there_is_a_fault_for_every_test() -> None:
    assert set().union(*(tests for _, tests in (EXACTLY | AT_LEAST).values())) == OWN
