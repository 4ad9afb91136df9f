"""What an installed distribution says of its implementation, and what importing it does."""

from __future__ import annotations

from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from flash_attention_registry import Registry
from flash_attention_registry.discovery import ENTRY_POINT_GROUP, ProviderEntry
from flash_attention_testkit.suite._base import ProviderTestsBase
from flash_attention_testkit.suite._subject import Subject, assert_serves
from flash_attention_testkit.suite.contract_process import Findings, in_a_fresh_process

_REGISTRY = "flash-attention-registry"


class DistributionTests(ProviderTestsBase):
    """Entry point, imports and versions; skipped if no installed distribution offers the name."""

    @pytest.fixture
    def entry(self, registry: Registry, provider: str) -> ProviderEntry:
        """The entry point by which a distribution offers the implementation."""
        found = registry.discovery.entries().get(provider)
        if found is None:
            pytest.skip(f"no installed distribution offers {provider}")
        return found

    @pytest.fixture
    def own_process(self, entry: ProviderEntry) -> Findings:
        """What a process of its own sees of the provider."""
        return in_a_fresh_process(entry.value)

    def test_entry_point_is_of_this_api_and_nobody_elses(self, entry: ProviderEntry) -> None:
        """It is declared once for this provider API, and no other distribution claims the name."""
        assert entry.conflict is None, f"{entry.conflict} (the group is {ENTRY_POINT_GROUP})"

    def test_entry_point_registers_its_name(self, registry: Registry, entry: ProviderEntry) -> None:
        """Its callable registers the implementation that it is named for."""
        registry.unregister(entry.name)
        entry.register()
        assert registry.registration(entry.name) is not None

    def test_registering_again_keeps_one_entry(
        self, subject: Subject, registry: Registry, entry: ProviderEntry
    ) -> None:
        """The entry point's callable may be called again; the implementation stays active."""
        names = registry.names()
        entry.register()
        assert registry.names() == names
        assert registry.current() == subject.name

    def test_activating_after_registering_again_serves(
        self, subject: Subject, registry: Registry, entry: ProviderEntry
    ) -> None:
        """An implementation that was registered again while active is replaced by itself."""
        entry.register()
        registry.activate(subject.name)
        assert_serves(subject)

    def test_import_is_light(self, own_process: Findings) -> None:
        """The entry point's module imports neither torch nor Triton."""
        assert own_process.imported_by_module == ()

    def test_registering_is_light(self, own_process: Findings) -> None:
        """Nor does its callable, which is called to list what there is."""
        assert set(own_process.imported_by_registering) <= set(own_process.imported_by_module)

    def test_import_activates_nothing(self, own_process: Findings) -> None:
        """Importing, registering and ``import torch`` leave torch's own kernels where they are."""
        assert own_process.active == ()

    def test_distribution_has_a_version(self, entry: ProviderEntry) -> None:
        """It follows PEP 440; reports name it."""
        try:
            Version(entry.version or "")
        except InvalidVersion as error:
            pytest.fail(f"{entry.distribution}: {error}")

    def test_distribution_requires_the_registry_within_bounds(self, entry: ProviderEntry) -> None:
        """It allows the installed registry, and not every later one."""
        wanted = [
            requirement.specifier
            for requirement in map(Requirement, requires(entry.distribution or "") or ())
            if canonicalize_name(requirement.name) == _REGISTRY
            and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
        ]
        assert wanted, f"{entry.origin()} does not require {_REGISTRY}, which it needs"
        for specifier in wanted:
            assert specifier.contains(version(_REGISTRY), prereleases=True)
        assert any(
            clause.operator in ("<", "<=", "~=", "==", "===")
            for specifier in wanted
            for clause in specifier
        ), f"{entry.origin()} allows every later {_REGISTRY}; add an upper bound, such as <0.2"
