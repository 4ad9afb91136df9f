"""A name that two distributions claim, or a provider for another API: said, and not imported."""

from __future__ import annotations

import sys

import pytest

from flash_attention_registry import ImplUnavailableError
from flash_attention_registry.discovery import GROUP_PREFIX, PROVIDER_API

GOOD = """
from flash_attention_registry import default
def register():
    default.register_flash_attention_impl(
        "good", register_fn=lambda: None, family="FA4", priority=3)
"""

PROVIDES_GOOD = {"good": "good_provider:register"}


def report_on(registry, name):
    return {report.name: report for report in registry.explain()}[name]


def api(number):
    return f"{GROUP_PREFIX}{number}"


def refusal(registry, name):
    """The reason that both an explanation and an activation give."""
    reason = report_on(registry, name).unavailable_reason
    with pytest.raises(ImplUnavailableError) as caught:
        registry.activate(name)
    assert reason in str(caught.value)
    assert "Repair or uninstall" in str(caught.value)
    return reason


def test_a_name_that_two_distributions_claim_is_an_error_that_names_both(site, installed, declare):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    declare("other-dist", {api(1): PROVIDES_GOOD}, version="4.5", folder="nearer")
    assert installed.names().count("good") == 1
    reason = refusal(installed, "good")
    assert "other-dist 4.5 and some-dist 1.2.3 claim the name 'good'" in reason
    assert "uninstall all but one" in reason
    assert "good_provider" not in sys.modules


def test_the_same_holds_if_one_of_them_is_made_for_another_provider_api(site, installed, declare):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    declare("other-dist", {api(2): PROVIDES_GOOD})
    assert "other-dist 1.0 and some-dist 1.2.3 claim" in refusal(installed, "good")
    assert "good_provider" not in sys.modules


def test_a_conflict_leaves_other_names_of_those_distributions_alone(site, installed, declare):
    both = {"good": "good_provider:register", "other": "other_provider:register"}
    site.install("good_provider", GOOD, provides=both)
    declare("other-dist", {api(1): {"other": "another_provider:register"}})
    installed.activate("good")
    assert installed.current() == "good"
    assert "claim the name 'other'" in refusal(installed, "other")


def test_a_direct_registration_settles_a_conflict(site, installed, declare):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    declare("other-dist", {api(1): PROVIDES_GOOD})
    installed.register("good", register_fn=lambda: None)
    installed.activate("good")
    assert installed.current() == "good"
    assert "good_provider" not in sys.modules


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_one_distribution_found_twice_is_no_conflict_and_the_first_on_the_path_counts(
    site, installed, declare, version
):
    site.install("good_provider", GOOD, provides={})
    declare("twice", {api(1): {"good": "farther:register"}}, folder="farther")
    declare("twice", {api(1): PROVIDES_GOOD}, version=version, folder="nearer")
    assert installed.discovery.entries()["good"].origin() == f"twice {version}"
    installed.activate("good")
    assert installed.current() == "good"


def test_what_pip_could_not_delete_of_an_older_version_is_no_conflict(site, installed, declare):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    declare("some-dist", {api(1): PROVIDES_GOOD | {"gone": "gone:register"}}, version="1.2.2")
    (site.folder / "some_dist-1.2.2.dist-info").rename(site.folder / "~ome_dist-1.2.2.dist-info")
    assert "gone" not in installed.names()
    assert report_on(installed, "good").version == "1.2.3"
    installed.activate("good")


def test_a_name_that_a_distribution_declares_twice_is_an_error(site, installed, declare):
    declare("twice", {api(1): {"x": "one:register", " x": "other:register"}})
    reason = refusal(installed, "x")
    assert reason == "twice 1.0 declares the name twice, as one:register and other:register"


def test_what_a_distribution_declares_twice_alike_is_no_conflict(site, installed, declare):
    site.install("good_provider", GOOD, provides={})
    declare("twice", {api(1): PROVIDES_GOOD | {" good": PROVIDES_GOOD["good"]}})
    installed.activate("good")
    assert installed.current() == "good"


@pytest.mark.parametrize("number", [0, 2, 10])
def test_a_provider_for_another_provider_api_is_reported_and_not_imported(
    site, installed, declare, number
):
    site.install("good_provider", GOOD, provides={})
    declare("other-dist", {api(number): PROVIDES_GOOD}, version="4.5")
    assert "good" in installed.names()
    reason = refusal(installed, "good")
    assert f"other-dist 4.5 is made for provider API {number}" in reason
    assert f"has provider API {PROVIDER_API}; install versions of both that fit" in reason
    report = report_on(installed, "good")
    assert (report.distribution, report.version) == ("other-dist", "4.5")
    assert "good_provider" not in sys.modules


def test_all_the_provider_apis_that_do_not_fit_are_named(site, installed, declare):
    declare("other-dist", {api(3): {"x": "x:new"}, api(2): {"x": "x:old"}})
    assert "made for provider API 2 and 3" in refusal(installed, "x")


def test_a_provider_for_several_provider_apis_is_loaded_by_the_one_that_fits(
    site, installed, declare
):
    site.install("good_provider", GOOD, provides={})
    other = {"good": "no_such_module:register"}
    declare("newer", {api(0): other, api(1): PROVIDES_GOOD, api(2): other})
    installed.activate("good")
    assert installed.current() == "good"


@pytest.mark.parametrize("suffix", ["", "x", "1beta", "1.5", "-1", " 1"])
def test_a_group_whose_suffix_is_no_number_is_somebody_elses(site, installed, declare, suffix):
    declare("other-dist", {f"{GROUP_PREFIX}{suffix}": {"odd": "odd:register"}})
    assert "odd" not in installed.names()


@pytest.mark.parametrize("name", ["native", "torch:FA4", "a,b"])
def test_an_entry_point_with_a_name_that_could_not_be_asked_for_is_reported(
    site, installed, declare, name
):
    source = GOOD.replace('"good"', repr(name))
    site.install("good_provider", source, provides={})
    declare("other-dist", {api(1): {name: "good_provider:register"}})
    assert f"declares {name!r}: 'native' stands for" in refusal(installed, name)


def test_a_provider_that_ends_the_program_is_isolated(site, installed):
    source = "import sys\ndef register():\n    sys.exit(0)\n"
    site.install("rude_provider", source, provides={"rude": "rude_provider:register"})
    with pytest.raises(ImplUnavailableError, match="SystemExit"):
        installed.activate("rude")
