from __future__ import annotations

import importlib.metadata
import sys

import pytest

from flash_attention_registry import Registry
from flash_attention_testkit import FakeEntryPoints, FakeProvider


def names_in(group: str) -> list[str]:
    return [point.name for point in importlib.metadata.entry_points(group=group)]


def test_a_distribution_appears_and_is_gone_afterwards(tmp_path) -> None:
    path = list(sys.path)
    with FakeEntryPoints(tmp_path) as fake:
        assert names_in("kit.group") == []
        modules = {"kit_fake_module": "def answer():\n    return 42\n"}
        groups = {"kit.group": {"one": "kit_fake_module:answer"}}
        fake.distribution("kit-fake", groups, version="2.5", modules=modules)

        (point,) = importlib.metadata.entry_points(group="kit.group")
        assert importlib.metadata.version("kit-fake") == "2.5"
        assert "kit_fake_module" not in sys.modules
        assert point.load()() == 42

    assert names_in("kit.group") == []
    assert "kit_fake_module" not in sys.modules
    assert sys.path == path
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kit-fake")


def test_an_offered_provider_is_listed_at_once_and_registered_when_it_is_needed(
    fake_entry_points: FakeEntryPoints,
) -> None:
    registry, provider = Registry(), FakeProvider("kit-offered")
    module = fake_entry_points.offer(provider, registry=registry, version="0.3")

    assert "kit-offered" in registry.names()
    assert registry.discovery.entries()["kit-offered"].origin() == "kit-offered-dist 0.3"
    assert module not in sys.modules
    registry.activate("kit-offered")

    assert module in sys.modules
    assert provider.runs


def test_two_distributions_can_claim_one_name(fake_entry_points: FakeEntryPoints) -> None:
    registry, provider = Registry(), FakeProvider("kit-offered")
    for distribution in ("first", "second"):
        fake_entry_points.offer(provider, registry=registry, distribution=distribution)

    conflict = registry.discovery.entries()["kit-offered"].conflict

    assert conflict is not None
    assert "first 1.0 and second 1.0 claim the name 'kit-offered'" in conflict


def test_offered_to_the_process_it_is_found_after_a_refresh(
    flash_attention_registry_reset: Registry, fake_entry_points: FakeEntryPoints
) -> None:
    flash_attention_registry_reset.names()
    fake_entry_points.offer(FakeProvider("kit-offered"))
    assert "kit-offered" not in flash_attention_registry_reset.names()

    flash_attention_registry_reset.discovery.refresh()

    flash_attention_registry_reset.activate("kit-offered")
    assert flash_attention_registry_reset.current() == "kit-offered"


def test_the_same_distribution_twice_is_refused(fake_entry_points: FakeEntryPoints) -> None:
    fake_entry_points.distribution("kit-fake", {})
    with pytest.raises(FileExistsError):
        fake_entry_points.distribution("kit-fake", {})
