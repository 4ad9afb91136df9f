"""Providers that fail, or whose distribution is damaged: isolated and reported."""

from __future__ import annotations

import sys

import pytest

from flash_attention_registry import (
    FamilyUnavailableError,
    ImplUnavailableError,
    RequestUnavailableError,
    UnknownImplError,
)

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


@pytest.mark.parametrize("value", ["broken provider", ":register", "broken_provider:a-b", ""])
def test_an_entry_point_that_names_no_function_is_reported(site, installed, value):
    site.install("broken_provider", "", provides={"broken": value})
    reason = report_on(installed, "broken").unavailable_reason
    assert f"its entry point reads {value!r}, not 'package.module:function'" in reason


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


def test_a_family_that_cannot_be_had_tells_which_providers_could_not_be_loaded(
    site, installed, asked
):
    source = GOOD.replace("priority=3", "recommended=lambda: 'slow here'").replace("FA4", "letters")
    site.install("good_provider", source, provides=PROVIDES_GOOD)
    site.install("broken_provider", "1 / 0", provides={"broken": "broken_provider:register"})
    with pytest.raises(FamilyUnavailableError) as caught:
        installed.activate("letters")
    assert "good: not recommended here: slow here\nOf these it is not known" in str(caught.value)
    assert "broken: broken_provider:register of some-dist 1.2.3 raised" in str(caught.value)
    assert set(caught.value.reasons) == {"good"}
    asked("letters")
    with pytest.raises(RequestUnavailableError, match=r"broken: broken_provider:register of some"):
        installed.request.activate()


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
def test_a_distribution_without_metadata_is_called_by_its_folder(site, installed):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD, distribution=None)
    entry = installed.discovery.entries()["good"]
    assert (entry.distribution, entry.version) == ("good_provider-0.dist-info", None)
    assert report_on(installed, "good").available


# Code of a provider that ends the program


CHECKS = {"availability": "availability", "recommended": "recommendation"}


@pytest.mark.parametrize("ending", [SystemExit(3), SystemExit("no licence")])
@pytest.mark.parametrize("check", CHECKS)
def test_a_check_that_ends_the_program_is_a_reason(registry, failing, check, ending):
    registry.register("rude", register_fn=lambda: None, family="FA4", **{check: failing(ending)})
    registry.register("kind", register_fn=lambda: None, family="FA4", priority=-1)
    report = report_on(registry, "rude")
    reason = f"{CHECKS[check]} check raised SystemExit: {ending}"
    assert reason in (report.unavailable_reason, report.not_recommended_reason)
    registry.activate("FA4")
    assert registry.current() == "kind"


def test_an_exact_name_whose_check_ends_the_program_is_not_available(registry, failing):
    registry.register("rude", register_fn=len, availability=failing(SystemExit(3)))
    with pytest.raises(ImplUnavailableError, match="availability check raised SystemExit: 3"):
        registry.activate("rude")


@pytest.mark.parametrize("part", ["register_fn", "prepare"])
def test_a_member_that_ends_the_program_is_passed_over(registry, failing, part):
    options = {"register_fn": lambda: None, part: failing(SystemExit(3))}
    registry.register("rude", family="FA4", priority=1, **options)
    registry.register("kind", register_fn=lambda: None, family="FA4")
    with pytest.warns(UserWarning, match="Passed over 'rude' .*raised SystemExit: 3"):
        registry.activate("FA4")
    assert registry.current() == "kind"


@pytest.mark.parametrize("part", ["register_fn", "prepare", "availability"])
def test_what_the_environment_asks_for_does_not_end_the_program(registry, failing, asked, part):
    options = {"register_fn": lambda: None, part: failing(SystemExit(3))}
    registry.register("rude", **options)
    asked("rude")
    with pytest.warns(UserWarning, match="rude: .*SystemExit: 3"):
        registry.request.honour(lambda *_: None)
    assert registry.current() is None
    asked("rude", strict="1")
    with pytest.raises(RequestUnavailableError, match="SystemExit: 3"):
        registry.request.honour(lambda *_: None)


@pytest.mark.parametrize("check", CHECKS)
def test_an_interrupt_goes_through_every_check(registry, failing, check):
    options = {check: failing(KeyboardInterrupt())}
    registry.register("asked", register_fn=lambda: None, family="FA4", **options)
    with pytest.raises(KeyboardInterrupt):
        registry.explain()
    with pytest.raises(KeyboardInterrupt):
        registry.activate("FA4")
