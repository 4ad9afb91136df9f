"""What all groups of standard tests stand on: who is tested, and what is known to fail."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import ClassVar, cast, get_args

import pytest
import torch

from flash_attention_registry import ImplUnavailableError, Registry, RestoreError
from flash_attention_registry.environment import DISABLE, IMPL, STRICT
from flash_attention_registry.sdpa import install, installed_kernel_sets, reset_dispatch_counts
from flash_attention_testkit.grids import GridName, case_grid
from flash_attention_testkit.plugin import is_first, why_no_gpu
from flash_attention_testkit.suite._subject import Subject

_GUARD = "test_standard_tests_are_not_overridden"


class ProviderTestsBase:
    """Fixtures and rules of the standard tests.

    Tests that take ``case`` run once for each case of the grid ``--flash-attention-grid``.

    Attributes:
        xfails: Known failures: what a test's name with its parameters contains, and why it fails.
            A test of them that passes fails; a pattern that no test matches is an error.
    """

    xfails: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls) -> None:
        """Keep the guard itself."""
        super().__init_subclass__()
        if _GUARD in vars(cls) and not _is_ours(cls):
            raise TypeError(f"{cls.__name__} must not override {_GUARD}")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test that takes ``case`` once for each case of the grid."""
        if "case" in metafunc.fixturenames:
            cases = case_grid(grid_name(metafunc.config), None)
            metafunc.parametrize("case", cases, ids=str)

    @pytest.fixture
    def registry(
        self, flash_attention_registry_reset: Registry, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Registry]:
        """The process's registry on stock, as if the user's environment asked for nothing.

        Kernels that a handle should have removed are gone after a test too: that they stayed is to
        be found by the tests that are about it, and not by all.
        """
        for variable in (IMPL, STRICT, DISABLE):
            monkeypatch.delenv(variable, raising=False)
        flash_attention_registry_reset.restore_if_active()
        reset_dispatch_counts()
        before = installed_kernel_sets()
        yield flash_attention_registry_reset
        with suppress(RestoreError):
            flash_attention_registry_reset.restore_if_active()
        for device_type, kernel_set in installed_kernel_sets().items():
            if kernel_set is not before.get(device_type):
                install(kernel_set, device_type).remove()
        reset_dispatch_counts()

    @pytest.fixture
    def subject(self, registry: Registry, provider: str, pytestconfig: pytest.Config) -> Subject:
        """The implementation under test, active, with dispatch counts of zero."""
        asked_for = provider == pytestconfig.getoption("flash_attention_impl")
        try:
            registry.activate(provider)
        except Exception as error:
            # Whose provider could not even be loaded is broken, not unavailable.
            loaded = registry.registration(provider) is not None
            if isinstance(error, ImplUnavailableError) and loaded and not asked_for:
                pytest.skip(str(error))
            if is_first(pytestconfig, f"{provider}: {error}"):
                raise
            raise pytest.fail.Exception(
                f"{provider} could not be activated here either ({type(error).__name__}); the "
                "first error says why",
                pytrace=False,
            ) from None
        serving = installed_kernel_sets()
        if not serving:
            pytest.fail(
                f"{provider} is active but has installed no kernel set; its register_fn must call "
                "flash_attention_registry.sdpa.install and return the handle",
                pytrace=False,
            )
        for device_type in ("cuda", "cpu"):
            if device_type in serving and (device_type == "cpu" or torch.cuda.is_available()):
                device = torch.device(device_type)
                seed = pytestconfig.getoption("flash_attention_seed")
                return Subject(provider, serving[device_type], device, seed)
        reason = f"{provider} serves {', '.join(serving)} only, and torch finds no such device"
        if asked_for:
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)

    def test_standard_tests_are_not_overridden(self) -> None:
        """A subclass adds tests and replaces none; what fails is listed in ``xfails``."""
        names = overridden_names(type(self))
        assert not names, (
            f"{type(self).__name__} overrides {', '.join(names)}; if a standard test fails for a "
            "known reason, leave it as it is and list it in xfails with that reason"
        )


def overridden_names(cls: type[ProviderTestsBase]) -> list[str]:
    """What of the standard tests, their fixtures included, a class has replaced."""
    names = {
        name
        for ancestor in cls.__mro__
        if _is_ours(ancestor)
        for name in vars(ancestor)
        if not name.startswith("__") and name != "xfails"
    }
    return sorted(name for name in names if not _is_ours(_definer(cls, name)))


def expect_failures(cls: type, report: pytest.CollectReport) -> None:
    """Mark the tests that a class knows to fail; a pattern that matches none fails the report.

    Args:
        cls: The collected class; nothing happens unless it is one of standard tests.
        report: Of its collection, with all its tests, whichever of them are to be run.
    """
    if not issubclass(cls, ProviderTestsBase):
        return
    tests = [test for test in report.result or () if isinstance(test, pytest.Function)]
    unmatched = []
    for pattern, reason in cls.xfails.items():
        matched = [test for test in tests if pattern in test.name]
        for test in matched:
            test.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        if not matched and not _matches_another_grid(pattern, tests):
            unmatched.append(pattern)
    if unmatched:
        report.outcome = "failed"
        report.longrepr = (
            f"{cls.__name__}.xfails: no test, in whatever grid of cases, has a name that contains "
            f"{' or '.join(map(repr, unmatched))}; repair the pattern or take it out"
        )


def _matches_another_grid(pattern: str, tests: list[pytest.Function]) -> bool:
    """Whether a pattern is for a case that this run's grid does not have."""
    of_cases = {test.originalname for test in tests if "case" in test.fixturenames}
    return any(
        pattern in f"{test}[{case}]"
        for grid in get_args(GridName)
        for case in case_grid(grid, None)
        for test in of_cases
    )


def grid_name(config: pytest.Config) -> GridName:
    """The grid of cases that was asked for; standard by default where there is a GPU to test."""
    name = config.getoption("flash_attention_grid")
    if name is None:
        name = "quick" if why_no_gpu() else "standard"
    return cast(GridName, name)


def _definer(cls: type, name: str) -> type:
    return next(ancestor for ancestor in cls.__mro__ if name in vars(ancestor))


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("flash_attention_testkit.suite")
