"""`FLASH_ATTENTION_IMPL_DISABLE`: what a user does not want is not used, whoever offers it."""

from __future__ import annotations

import sys

import pytest

from flash_attention_registry import EnvironmentVariableError, ImplUnavailableError

GOOD = """
from flash_attention_registry import default
def register():
    default.register_flash_attention_impl(
        "good", register_fn=lambda: None, family="FA4", priority=3)
"""

PROVIDES_GOOD = {"good": "good_provider:register"}


def report_on(registry, name):
    return {report.name: report for report in registry.explain()}[name]


@pytest.fixture
def disable(monkeypatch):
    return lambda names: monkeypatch.setenv("FLASH_ATTENTION_IMPL_DISABLE", names)


def test_a_disabled_implementation_is_listed_and_not_imported(site, installed, disable):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    disable("x,good")
    assert "good" in installed.names()
    reason = "it is disabled by FLASH_ATTENTION_IMPL_DISABLE=x,good"
    assert report_on(installed, "good").unavailable_reason == reason
    with pytest.raises(ImplUnavailableError, match=reason) as caught:
        installed.activate("good")
    assert "uninstall" not in str(caught.value)  # nothing is the matter with it
    assert "good_provider" not in sys.modules


def test_the_members_of_a_disabled_family_are_not_available(site, installed, disable):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    for other in installed.names():
        if other != "good":
            installed.discovery.forget(other)  # of the machine that runs the test
    disable("FA4")
    for name in ("good", "FA4"):
        with pytest.raises(ImplUnavailableError, match="its family FA4 is disabled by"):
            installed.activate(name)
    assert "its family FA4 is disabled" in report_on(installed, "good").unavailable_reason


def test_a_family_takes_the_next_member_if_one_is_disabled(registry, kernels, disable):
    for priority, name in enumerate("ab"):
        install = kernels.installer(name)
        registry.register(name, register_fn=install, family="letters", priority=priority)
    disable("b")
    registry.activate("letters")
    assert registry.current() == "a"


@pytest.mark.parametrize("names", ["a", "letters"])
def test_a_direct_registration_can_be_disabled(registry, kernels, disable, names):
    asked = []
    registry.register(
        "a",
        register_fn=kernels.installer("a"),
        family="letters",
        availability=lambda: asked.append(1),
    )
    disable(names)
    with pytest.raises(ImplUnavailableError, match="disabled by FLASH_ATTENTION_IMPL_DISABLE="):
        registry.activate("a")
    assert asked == []
    disable("b")
    registry.activate("a")
    assert registry.current() == "a"


def test_a_list_of_the_disabled_that_cannot_be_read_disables_nothing_silently(
    registry, kernels, disable
):
    registry.register("a", register_fn=kernels.installer("a"))
    disable("a,,b")
    with pytest.raises(EnvironmentVariableError, match="FLASH_ATTENTION_IMPL_DISABLE='a,,b'"):
        registry.activate("a")
    assert registry.current() is None


def test_what_is_no_longer_disabled_is_loaded(site, installed, disable, monkeypatch):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    disable("good")
    assert not report_on(installed, "good").available
    monkeypatch.delenv("FLASH_ATTENTION_IMPL_DISABLE")
    installed.activate("good")
    assert installed.current() == "good"


def test_disabling_what_is_active_does_not_take_it_away(site, installed, disable):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    installed.activate("good")
    disable("good")
    assert not report_on(installed, "good").available
    assert installed.current() == "good"
