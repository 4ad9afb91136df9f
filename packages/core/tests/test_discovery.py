"""Installed providers: seen without being imported, and loaded when they are needed."""

from __future__ import annotations

import sys
import threading

import pytest

from flash_attention_registry import UnknownImplError
from flash_attention_registry.discovery import ENTRY_POINT_GROUP, PROVIDER_API, Discovery

GOOD = """
from flash_attention_registry import default
def register():
    default.register_flash_attention_impl(
        "good", register_fn=lambda: None, family="FA4", priority=3)
"""

PROVIDES_GOOD = {"good": "good_provider:register"}


def report_on(registry, name):
    return {report.name: report for report in registry.explain()}[name]


def test_the_group_carries_the_number_of_the_provider_api():
    assert f"flash_attention_registry.providers.v{PROVIDER_API}" == ENTRY_POINT_GROUP


def test_an_installed_implementation_is_listed_without_being_imported(site, installed):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    assert "good" in installed.names()
    assert installed.current() is None
    entry = installed.discovery.entries()["good"]
    assert (entry.value, entry.origin()) == ("good_provider:register", "some-dist 1.2.3")
    assert "good_provider" not in sys.modules


@pytest.mark.parametrize("name", ["good", "FA4"])
def test_it_is_imported_when_it_or_its_family_is_activated(site, installed, name):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    for other in installed.names():
        if other != "good":
            installed.discovery.forget(other)  # of the machine that runs the test
    installed.activate(name)
    assert installed.current() == "good"
    assert "good_provider" in sys.modules


def test_activating_one_implementation_imports_no_other(site, installed):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    site.install("other_provider", "1 / 0", provides={"other": "other_provider:register"})
    installed.activate("good")
    assert "good_provider" in sys.modules
    assert installed.discovery.failure("other") is None


def test_activating_what_was_registered_directly_imports_nothing(site, installed):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    installed.register("mine", register_fn=lambda: None)
    installed.activate("mine")
    assert "good_provider" not in sys.modules


def test_an_explanation_names_distribution_and_version(site, installed):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    report = report_on(installed, "good")
    assert (report.distribution, report.version, report.family) == ("some-dist", "1.2.3", "FA4")
    assert (report.priority, report.available, report.recommended) == (3, True, True)


def test_a_direct_registration_wins_over_an_entry_point_that_is_not_loaded(site, installed):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    installed.register("good", register_fn=lambda: None, family="mine")
    installed.activate("good")
    report = report_on(installed, "good")
    assert (report.family, report.distribution) == ("mine", None)
    assert "good_provider" not in sys.modules


def test_a_direct_registration_wins_while_the_entry_point_is_being_loaded(site, installed):
    source = """
import threading
from flash_attention_registry import default
def register():
    direct = threading.Thread(
        target=lambda: default.register_flash_attention_impl(
            "good", register_fn=len, family="direct"))
    direct.start()
    direct.join()
    default.register_flash_attention_impl("good", register_fn=len, family="from the entry point")
"""
    site.install("good_provider", source, provides=PROVIDES_GOOD)
    report = report_on(installed, "good")
    assert (report.family, report.distribution) == ("direct", None)


def test_a_direct_registration_replaces_a_loaded_one(site, installed):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    assert report_on(installed, "good").distribution == "some-dist"
    installed.register("good", register_fn=lambda: None)
    assert report_on(installed, "good").distribution is None


def test_a_provider_is_loaded_once(site, installed):
    site.install(
        "good_provider", GOOD + "    loads.append(1)\nloads = []\n", provides=PROVIDES_GOOD
    )
    installed.activate("good")
    installed.explain()
    installed.activate("good")
    assert sys.modules["good_provider"].loads == [1]


def test_unregistering_an_installed_implementation_leaves_it_out(site, installed):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    installed.unregister("good")
    assert "good" not in installed.names()
    with pytest.raises(UnknownImplError):
        installed.activate("good")
    assert "good_provider" not in sys.modules
    installed.discovery.refresh()
    assert "good" in installed.names()


def test_unregistering_a_loaded_implementation_does_not_load_it_again(site, installed):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    installed.activate("good")
    with pytest.warns(UserWarning, match="no handle"):
        installed.unregister("good")
    assert "good" not in {report.name for report in installed.explain()}


def test_refresh_sees_what_was_installed_since_and_tries_again_what_failed(site, installed):
    site.install("good_provider", "1 / 0", provides=PROVIDES_GOOD)
    assert not report_on(installed, "good").available
    (site.folder / "good_provider.py").write_text(GOOD + "# repaired\n")
    site.install("late_provider", "", provides={"late": "late_provider:register"})
    assert "late" not in installed.names()
    installed.discovery.refresh()
    assert "late" in installed.names()
    assert report_on(installed, "good").available


def test_loading_a_name_that_is_not_offered_does_nothing():
    discovery = Discovery(prefix="nothing.is.declared.in.such.a.group")
    discovery.load("x", lambda name: False)
    assert discovery.failure("x") is None
    assert discovery.being_loaded("x") is None


def test_loading_and_unregistering_at_once_do_not_wait_for_each_other(site, installed):
    source = """
import threading
from flash_attention_registry import default
inside, go_on = threading.Event(), threading.Event()
def register():
    inside.set()
    assert go_on.wait(20)
    default.register_flash_attention_impl("good", register_fn=lambda: None)
"""
    site.install("good_provider", source, provides=PROVIDES_GOOD)
    import good_provider

    loading = threading.Thread(target=lambda: installed.activate("good"), daemon=True)
    loading.start()
    assert good_provider.inside.wait(20)
    installed.register("mine", register_fn=lambda: None)

    class Handle:
        def remove(self):
            good_provider.go_on.set()  # the loading thread now waits for this transition
            loading.join(0.2)
            installed.discovery.refresh()

    installed.register("mine", register_fn=Handle)
    installed.activate("mine")
    unregistering = threading.Thread(target=lambda: installed.unregister("mine"), daemon=True)
    unregistering.start()
    unregistering.join(20)
    loading.join(20)
    assert not unregistering.is_alive()
    assert not loading.is_alive()
    assert installed.current() == "good"
