"""Reports: what is said about each implementation."""

from __future__ import annotations

import dataclasses

import pytest

from flash_attention_registry import ImplReport, format_reports
from flash_attention_registry.doctor.usable import of_unknown_family


@pytest.fixture
def reports(registry, kernels, failing):
    """Reports on one implementation of each kind, by name."""
    registry.register("plain", register_fn=kernels.installer("plain"))
    registry.register("absent", register_fn=len, availability=lambda: "needs sm_90", family="FA4")
    registry.register("odd", register_fn=len, availability=failing(OSError("no driver")))
    registry.register(
        "slow", register_fn=len, recommended=lambda: "cuDNN is faster", family="FA4", priority=7
    )
    registry.activate("plain")
    return {report.name: report for report in registry.explain()}


def test_reports_are_sorted_by_name(reports):
    assert list(reports) == ["absent", "odd", "plain", "slow"]


def test_what_is_usable_has_no_reasons(reports):
    report = reports["plain"]
    assert (report.available, report.recommended, report.active) == (True, True, True)
    assert (report.unavailable_reason, report.not_recommended_reason) == (None, None)


def test_what_is_unavailable_is_not_recommended_either(reports):
    report = reports["absent"]
    assert (report.available, report.unavailable_reason) == (False, "needs sm_90")
    assert (report.recommended, report.not_recommended_reason) == (False, "it is not available")
    assert (report.family, report.active) == ("FA4", False)


def test_a_check_that_raises_is_a_reason(reports):
    assert reports["odd"].unavailable_reason == "availability check raised OSError: no driver"


def test_what_is_available_may_be_not_recommended(reports):
    report = reports["slow"]
    assert (report.available, report.recommended) == (True, False)
    assert (report.not_recommended_reason, report.priority) == ("cuDNN is faster", 7)


def test_the_text_says_all_of_it(reports):
    assert format_reports(reports.values()) == (
        "absent (family FA4, priority 0, registered by a direct call)\n"
        "    not available: needs sm_90\n"
        "odd (registered by a direct call)\n"
        "    not available: availability check raised OSError: no driver\n"
        "plain [active] (registered by a direct call)\n"
        "    available and recommended\n"
        "slow (family FA4, priority 7, registered by a direct call)\n"
        "    available, but not recommended here: cuDNN is faster"
    )


def test_the_text_names_distribution_and_version(reports):
    report = dataclasses.replace(reports["plain"], distribution="some-dist", version="1.2")
    assert str(report).startswith("plain [active] (from some-dist 1.2)\n")


def test_no_reports_are_a_sentence():
    assert format_reports([]).startswith("No flash attention implementation is registered")


def test_reports_cannot_be_changed(reports):
    with pytest.raises(dataclasses.FrozenInstanceError):
        reports["plain"].active = False
    assert isinstance(reports["plain"], ImplReport)


def test_of_unknown_family_is_what_could_not_be_loaded_but_not_torchs_own():
    def unavailable(name):
        facts = {"distribution": "some", "version": "1", "family": None, "priority": 0}
        verdict = {"available": False, "unavailable_reason": "lost", "recommended": False}
        rest = {"not_recommended_reason": None, "active": False}
        return ImplReport(name=name, **facts, **verdict, **rest)

    told = of_unknown_family([unavailable("broken"), unavailable("torch:FA3")])
    assert told == ["No family is known of what cannot be used (broken: not available: lost)"]
    assert of_unknown_family([unavailable("torch:FA3")]) == []
