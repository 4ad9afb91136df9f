"""Who is tested, what is known to fail, what cannot be replaced, and the run without a file."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

# Inner runs forget what they were the first to import, and torch's ops keep one set of routers.
import flash_attention_testkit.standalone  # noqa: F401
from flash_attention_registry import default_registry, register_flash_attention_impl, sdpa
from flash_attention_testkit import case_grid

pytest_plugins = ["pytester"]

HEAD = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
import pytest
import torch
from flash_attention_registry import (
    current_flash_attention_impl, register_flash_attention_impl, sdpa
)
from flash_attention_testkit import ProviderTests
from plain_kernel_set import PlainKernelSet

def offer(kernel_set=PlainKernelSet, **checks):
    install = lambda: sdpa.install(kernel_set(), "cpu")
    register_flash_attention_impl("kit-plain", register_fn=install, **checks)
    return "kit-plain"

class TestStandard(ProviderTests):
"""

NAMED = """
    @pytest.fixture
    def provider(self):
        return offer()
"""

Run: TypeAlias = Callable[..., pytest.RunResult]


@pytest.fixture(autouse=True)
def _nothing_leaves_the_inner_runs() -> Iterator[None]:
    """Inner pytest runs share this process's registry."""
    registry = default_registry()
    before = registry.snapshot()
    yield
    registry.reset(before)


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """Runs those of a class's tests that a keyword expression names, given the class's body."""

    def run_class(body: str, keyword: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(HEAD + body)
        return pytester.runpytest("-p", "no:cacheprovider", "-rA", "-k", keyword, *arguments)

    return run_class


@pytest.fixture
def outcomes(run: Run) -> Callable[..., dict[str, int]]:
    """The outcomes of such a run, but for what the keyword expression leaves out."""

    def outcomes_of(body: str, keyword: str, *arguments: str) -> dict[str, int]:
        found = run(body, keyword, *arguments).parseoutcomes()
        found.pop("deselected", None)
        return found

    return outcomes_of


# Who is tested


def test_the_subject_is_active_and_known_by_its_kernel_set(outcomes) -> None:
    body = """
    def test_more(self, subject):
        assert subject.name == current_flash_attention_impl() == "kit-plain"
        assert subject.kernel_set is sdpa.installed_kernel_sets()["cpu"]
        assert subject.capabilities is PlainKernelSet.capabilities
        assert subject.device == torch.device("cpu")
        assert (sdpa.dispatch_counts().served, sdpa.dispatch_counts().declined) == (0, 0)

    def test_more_afterwards(self):
        assert current_flash_attention_impl() is None
    """
    assert outcomes(NAMED + body, "test_more") == {"passed": 2}


def test_the_users_environment_does_not_matter(outcomes, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
    def test_more(self, subject):
        import os
        assert not [name for name in os.environ if name.startswith("FLASH_ATTENTION_IMPL")]
    """
    monkeypatch.setenv("FLASH_ATTENTION_IMPL", "elsewhere")
    monkeypatch.setenv("FLASH_ATTENTION_IMPL_STRICT", "1")
    monkeypatch.setenv("FLASH_ATTENTION_IMPL_DISABLE", "kit-plain")
    assert outcomes(NAMED + body, "test_more or kernel_set_has_a_name") == {"passed": 2}


@pytest.mark.parametrize("where", ["module", "conftest"])
def test_the_name_may_come_from_outside_the_class(
    pytester: pytest.Pytester, outcomes, where: str
) -> None:
    fixture = "\n@pytest.fixture\ndef provider():\n    return offer()\n"
    body = "    pass\n"
    if where == "module":
        body += fixture
    else:
        pytester.makeconftest(HEAD.partition("class TestStandard")[0] + fixture)
    assert outcomes(body, "test_kernel_set_has_a_name") == {"passed": 1}


def test_a_missing_fixture_says_what_to_do(run: Run) -> None:
    result = run("    pass\n", "test_kernel_set_has_a_name")
    assert result.parseoutcomes()["errors"] == 1
    result.stdout.fnmatch_lines(["*need a fixture `provider` that returns the implementation's*"])


UNAVAILABLE = """
    @pytest.fixture
    def provider(self):
        return offer(availability=lambda: "needs a GPU of tomorrow")
"""


def test_what_is_unavailable_is_skipped_with_its_reason(run: Run) -> None:
    result = run(UNAVAILABLE, "test_kernel_set_has_a_name")
    assert result.parseoutcomes()["skipped"] == 1
    result.stdout.fnmatch_lines(["*SKIPPED*needs a GPU of tomorrow*"])


def test_what_is_unavailable_is_an_error_if_it_was_asked_for(run: Run) -> None:
    result = run(UNAVAILABLE, "test_kernel_set_has_a_name", "--flash-attention-impl", "kit-plain")
    assert result.parseoutcomes()["errors"] == 1
    result.stdout.fnmatch_lines(["*needs a GPU of tomorrow*"])


def test_a_provider_that_cannot_be_loaded_is_an_error(run: Run) -> None:
    body = """
    @pytest.fixture
    def provider(self, fake_entry_points):
        from flash_attention_registry import default_registry
        group = "flash_attention_registry.providers.v1"
        fake_entry_points.distribution("kit-dist", {group: {"kit-plain": "kit_none:register"}})
        default_registry().discovery.refresh()
        return "kit-plain"
    """
    result = run(body, "test_kernel_set_has_a_name")
    assert result.parseoutcomes()["errors"] == 1
    result.stdout.fnmatch_lines(["*No module named 'kit_none'*"])


def test_an_implementation_without_a_kernel_set_is_an_error(run: Run) -> None:
    body = """
    @pytest.fixture
    def provider(self):
        from flash_attention_testkit import FakeProvider
        FakeProvider("kit-fake").register()
        return "kit-fake"
    """
    result = run(body, "test_kernel_set_has_a_name")
    assert result.parseoutcomes()["errors"] == 1
    result.stdout.fnmatch_lines(["*kit-fake is active but has installed no kernel set*"])


def test_a_kernel_set_for_cuda_alone_is_skipped_without_a_gpu(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    body = """
    @pytest.fixture
    def provider(self):
        install = lambda: sdpa.install(PlainKernelSet(), "cuda")
        register_flash_attention_impl("kit-plain", register_fn=install)
        return "kit-plain"
    """
    result = run(body, "test_kernel_set_has_a_name")
    assert result.parseoutcomes()["skipped"] == 1
    result.stdout.fnmatch_lines(["*kit-plain serves cuda only, and torch finds no such device*"])


# What cannot be replaced


@pytest.mark.parametrize(
    "replaced", ["def test_kernel_set_has_a_name(self): pass", "test_kernel_set_has_a_name = None"]
)
def test_a_replaced_test_fails_the_guard(run: Run, replaced: str) -> None:
    result = run(f"{NAMED}\n    {replaced}\n", "overridden")
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(["*TestStandard overrides test_kernel_set_has_a_name;*xfails*"])


def test_a_replaced_fixture_fails_the_guard(run: Run) -> None:
    result = run(f"{NAMED}\n    @pytest.fixture\n    def subject(self): pass\n", "overridden")
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(["*TestStandard overrides subject;*"])


def test_a_mixin_before_the_standard_tests_fails_the_guard(
    pytester: pytest.Pytester,
) -> None:
    mixin = "class Mixin:\n    def test_kernel_set_has_a_name(self): pass\n"
    source = HEAD.replace("class TestStandard(", f"{mixin}\nclass TestStandard(Mixin, ")
    pytester.makepyfile(source + NAMED)
    result = pytester.runpytest("-p", "no:cacheprovider", "-k", "overridden")
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(["*overrides test_kernel_set_has_a_name;*"])


def test_the_guard_itself_cannot_be_replaced(run: Run) -> None:
    result = run("    def test_standard_tests_are_not_overridden(self): pass\n", "overridden")
    assert result.parseoutcomes()["errors"] == 1
    result.stdout.fnmatch_lines(
        ["*TypeError: TestStandard must not override test_standard_tests_are_not_overridden*"]
    )


def test_tests_may_be_added(outcomes) -> None:
    body = "\n    xfails = {}\n\n    def test_more(self, subject): pass\n"
    assert outcomes(NAMED + body, "test_more or overridden") == {"passed": 2}


# What is known to fail

NAMELESS = """
    @pytest.fixture
    def provider(self):
        class Nameless(PlainKernelSet):
            name = ""
        return offer(Nameless)
"""


def test_a_known_failure_is_expected_and_nothing_else_is(outcomes) -> None:
    body = "\n    xfails = {'set_has_a_name': 'has none yet'}\n"
    expected = {"xfailed": 1, "passed": 1}
    assert outcomes(NAMELESS + body, "has_a_name or well_formed") == expected


def test_a_known_failure_that_passes_fails(run: Run) -> None:
    result = run(NAMED + "\n    xfails = {'set_has_a_name': 'has none yet'}\n", "has_a_name")
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(["*XPASS(strict)*has none yet*"])


def test_a_known_failure_is_named_with_its_parameters(outcomes) -> None:
    body = "\n    xfails = {'as_declared[36]': 'none'}\n"
    found = outcomes(NAMED + body, "test_head_dims_are_served_as_declared")
    assert (found["failed"], found["passed"]) == (1, 10)


def test_a_pattern_that_names_no_test_is_an_error(run: Run) -> None:
    body = "\n    xfails = {'test_of_nothing': 'x', 'set_has_a_name': 'y'}\n"
    result = run(NAMELESS + body, "has_a_name")
    assert result.parseoutcomes()["errors"] == 1
    result.stdout.fnmatch_lines(["*TestStandard.xfails: no test*contains 'test_of_nothing';*"])


def test_a_pattern_for_a_case_of_another_grid_is_no_error(outcomes) -> None:
    only = set(case_grid("standard", None)) - set(case_grid("quick", None))
    body = f"\n    xfails = {{'out_is_right[{min(map(str, only))}]': 'x'}}\n"
    assert outcomes(NAMED + body, "set_has_a_name") == {"passed": 1}


def test_patterns_are_not_missed_where_one_test_is_asked_for(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(HEAD + NAMED + "\n    xfails = {'as_declared[36]': 'none'}\n")
    (file,) = pytester.path.glob("test_*.py")
    result = pytester.runpytest(
        "-p", "no:cacheprovider", f"{file.name}::TestStandard::test_kernel_set_has_a_name"
    )
    result.assert_outcomes(passed=1)


# Which cases


@pytest.mark.parametrize(
    ("no_gpu", "asked", "grid"),
    [
        ("none", None, "quick"),
        (None, None, "standard"),
        ("none", "standard", "standard"),
        (None, "quick", "quick"),
    ],
)
def test_the_grid_depends_on_the_device_unless_asked_for(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    no_gpu: str | None,
    asked: str | None,
    grid: str,
) -> None:
    monkeypatch.setattr(
        "flash_attention_testkit.suite._base.why_no_gpu", lambda: no_gpu, raising=True
    )
    pytester.makepyfile(
        f"""
        import pytest
        from flash_attention_testkit import ProviderTests

        CASES = set()

        class TestFew(ProviderTests):
            def test_more(self, case):
                CASES.add(case)

        def test_more_were_all():
            assert len(CASES) == {len(case_grid(grid, None))}
        """
    )
    option = [] if asked is None else ["--flash-attention-grid", asked]
    result = pytester.runpytest("-p", "no:cacheprovider", "-q", "-k", "test_more", *option)
    assert result.ret == 0


# Without a file


@pytest.fixture
def standalone(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """Runs a single standard test, or some, of an implementation that the command line names."""

    def run_standalone(
        *arguments: str, keyword: str = "test_kernel_set_has_a_name"
    ) -> pytest.RunResult:
        module = "flash_attention_testkit.standalone"
        few = ("-k", keyword, "-p", "no:cacheprovider", "-rA")
        return pytester.runpytest("--pyargs", module, *few, *arguments)

    return run_standalone


def offer_plain_kernels(**checks: Callable[[], str]) -> None:
    sys.path.append(str(Path(__file__).parent))
    try:
        from plain_kernel_set import PlainKernelSet
    finally:
        sys.path.pop()
    register_flash_attention_impl(
        "kit-plain", register_fn=lambda: sdpa.install(PlainKernelSet(), "cpu"), **checks
    )


def test_an_implementation_is_tested_without_a_file(standalone) -> None:
    offer_plain_kernels()
    result = standalone("--flash-attention-impl", "kit-plain")
    assert result.parseoutcomes()["passed"] == 1


def test_what_cannot_run_here_fails_the_run_that_asks_for_it(standalone) -> None:
    offer_plain_kernels(availability=lambda: "needs a GPU of tomorrow")
    result = standalone("--flash-attention-impl", "kit-plain")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*needs a GPU of tomorrow*"])


def test_an_unknown_name_is_told_with_those_that_are_known(standalone) -> None:
    offer_plain_kernels()
    result = standalone("--flash-attention-impl", "kit-plane")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*Unknown flash attention impl 'kit-plane'*kit-plain*"])


@pytest.mark.parametrize(
    ("arguments", "in_full", "briefly"),
    [
        (
            ["--flash-attention-impl", "kit-plane"],
            "E  *UnknownImplError: Unknown flash attention impl 'kit-plane'*",
            "kit-plane could not be activated here either (UnknownImplError); the first error *",
        ),
        ([], "E  *need a fixture `provider`*", "no implementation is named; see the first error"),
    ],
    ids=["unknown", "none"],
)
def test_what_ails_every_test_is_told_once_in_full(
    standalone, arguments: list[str], in_full: str, briefly: str
) -> None:
    result = standalone(*arguments, keyword="test_head_dims_are_served_as_declared")
    errors = result.parseoutcomes()["errors"]
    assert errors > 5
    lines = result.outlines
    assert len(fnmatch.filter(lines, in_full)) == 1
    assert len(fnmatch.filter(lines, briefly)) == errors - 1
    assert not fnmatch.filter(lines, "*another exception*")


def test_without_a_name_the_run_says_how_to_give_one(standalone) -> None:
    result = standalone()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*--flash-attention-impl NAME*"])


def test_the_plugin_alone_imports_no_torch() -> None:
    script = "import sys, flash_attention_testkit.plugin; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
