"""Providers that fail, or whose distribution is damaged: isolated and reported."""

from __future__ import annotations

import sys

import pytest

from flash_attention_registry import ImplUnavailableError, UnknownImplError
from flash_attention_registry.discovery import ProviderEntry

GOOD = """
from flash_attention_registry import default
def register():
    default.register_flash_attention_impl(
        "good", register_fn=lambda: None, family="FA4", priority=3)
"""

PROVIDES_GOOD = {"good": "good_provider:register"}


def report_on(registry, name):
    return {report.name: report for report in registry.explain()}[name]


BROKEN = {
    "the module cannot be imported": (
        "import no_such_module_anywhere",
        "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    ),
    "the callable is missing": ("", "AttributeError"),
    "the callable raises": ("def register(): raise OSError('no kernels')", "OSError: no kernels"),
    "the callable takes arguments": ("def register(x): pass", "TypeError"),
    "the callable registers nothing": (
        "def register(): pass",
        "ran without registering 'broken'",
    ),
    "the callable registers another name": (
        GOOD,
        "ran without registering 'broken'",
    ),
    "the callable registers and then raises": (
        GOOD.replace('"good"', '"broken"') + "    1 / 0\n",
        "ZeroDivisionError",
    ),
}


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_provider_is_isolated_and_reported(site, installed, source, reason):
    site.install(
        "broken_provider", source, provides={"broken": "broken_provider:register"}, version="9.9"
    )
    installed.register("mine", register_fn=lambda: None)
    report = report_on(installed, "broken")
    assert not report.available
    assert not report.recommended
    assert reason in report.unavailable_reason
    assert "broken_provider:register of some-dist 9.9" in report.unavailable_reason
    assert (report.distribution, report.version, report.family) == ("some-dist", "9.9", None)
    with pytest.raises(ImplUnavailableError) as caught:
        installed.activate("broken")
    assert reason in str(caught.value)
    assert "Repair or uninstall" in str(caught.value)
    installed.activate("mine")
    assert installed.current() == "mine"


def test_what_a_provider_activated_before_it_failed_is_taken_back(site, installed):
    source = GOOD + "    default.activate_flash_attention_impl('good')\n    1 / 0\n"
    site.install("good_provider", source, provides=PROVIDES_GOOD)
    with (
        pytest.warns(UserWarning, match="no handle"),
        pytest.raises(ImplUnavailableError, match="ZeroDivisionError"),
    ):
        installed.activate("good")
    assert installed.current() is None


def test_an_unknown_name_tells_which_providers_could_not_be_loaded(site, installed):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    site.install("broken_provider", "1 / 0", provides={"broken": "broken_provider:register"})
    with pytest.raises(UnknownImplError) as caught:
        installed.activate("no such family")
    notes = "\n".join(caught.value.__notes__)
    assert "'broken' could not be loaded: broken_provider:register of some-dist 1.2.3" in notes
    assert "ZeroDivisionError" in notes
    assert "'good'" not in notes


def test_an_interrupt_during_loading_goes_through_and_is_no_verdict(site, installed):
    source = """
from flash_attention_registry import default
calls = []
def register():
    calls.append(1)
    if len(calls) == 1:
        raise KeyboardInterrupt
    default.register_flash_attention_impl("good", register_fn=lambda: None)
"""
    site.install("good_provider", source, provides=PROVIDES_GOOD)
    with pytest.raises(KeyboardInterrupt):
        installed.activate("good")
    installed.activate("good")
    assert installed.current() == "good"


def test_a_provider_that_activates_itself_before_it_has_registered_gets_a_clear_error(
    site, installed
):
    source = GOOD.replace(
        "def register():", "def register():\n    default.activate_flash_attention_impl('good')"
    )
    site.install("good_provider", source, provides=PROVIDES_GOOD)
    with pytest.raises(ImplUnavailableError, match="has not registered it yet"):
        installed.activate("good")


def test_a_provider_that_failed_is_not_tried_again_and_again(site, installed):
    source = "def register():\n    calls.append(1)\n    1 / 0\ncalls = []\n"
    site.install("broken_provider", source, provides={"broken": "broken_provider:register"})
    for _ in range(2):
        assert not report_on(installed, "broken").available
    assert sys.modules["broken_provider"].calls == [1]


@pytest.mark.filterwarnings("ignore:Implicit None:DeprecationWarning")  # Python's own, from 3.12
def test_a_distribution_without_metadata_is_reported_as_such(site, installed):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD, distribution=None)
    entry = installed.discovery.entries()["good"]
    assert entry.origin() == "a distribution without a name"
    assert report_on(installed, "good").available


class Point:
    """An entry point whose distribution cannot be read."""

    name, value = "x", "x:register"

    @property
    def dist(self):
        return self

    @property
    def version(self):
        raise OSError("unreadable")


class PointOfNobody(Point):
    dist = None


@pytest.mark.parametrize("point", [Point(), PointOfNobody()])
def test_an_entry_point_of_an_unknown_distribution_can_be_listed(point):
    entry = ProviderEntry(point)
    assert (entry.name, entry.distribution, entry.version) == ("x", None, None)
