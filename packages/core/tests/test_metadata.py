"""Metadata that cannot be read hides its own distribution's implementations, and is told of."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys

import pytest

from flash_attention_registry import UnknownImplError, cli, doctor
from flash_attention_registry.metadata import declared_in, unreadable

GOOD = """
from flash_attention_registry import default
def register():
    default.register_flash_attention_impl("good", register_fn=lambda: None)
"""
PROVIDES_GOOD = {"good": "good_provider:register"}
V1 = "flash_attention_registry.providers.v1"

UNDECODABLE = b"\xff\xfe[console_scripts]\n"
DAMAGE = {
    "bytes that are no UTF-8": (UNDECODABLE, "UnicodeDecodeError"),
    "UTF-16": ("[a]\nb = c\n".encode("utf-16"), "UnicodeDecodeError"),
    "a line without a value": (f"[{V1}]\nlost\n".encode(), "TypeError"),
}


@pytest.fixture
def broken(tmp_path, declare):
    """Return a function that installs a distribution with that content of entry_points.txt."""

    def install(content=UNDECODABLE, name="broken-dist"):
        declare(name, {V1: {"lost": "lost:register"}})
        file = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info" / "entry_points.txt"
        file.write_bytes(content)
        return file

    return install


@pytest.mark.parametrize(("content", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_distribution_is_skipped_and_told_of(site, installed, broken, content, reason):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    file = broken(content)
    assert "good" in installed.names()
    assert "lost" not in installed.names()
    installed.activate("good")
    assert installed.current() == "good"
    (told,) = installed.discovery.unreadable()
    assert told.startswith(f"{file} cannot be read: {reason}: ")


def test_an_unrelated_distribution_may_be_damaged_in_any_group(site, installed, broken):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    broken(b"[console_scripts]\n\x80 = x:y\n")
    with pytest.raises(UnicodeDecodeError):
        importlib.metadata.entry_points()  # which is why they are read one by one
    installed.activate("good")
    assert len(installed.discovery.unreadable()) == 1


def test_what_is_none_of_our_business_is_parsed_only_for_people(installed, broken):
    """It hides nothing of ours, but may be why torch cannot be imported."""
    file = broken(b"[torch.backends]\nlost\n")
    assert installed.discovery.unreadable() == ()
    with pytest.raises(TypeError):
        importlib.metadata.entry_points()
    (told,) = unreadable()
    assert told.startswith(f"{file} cannot be read: TypeError: ")


def test_every_damaged_distribution_is_told_of(installed, broken):
    files = {broken(name="first-dist"), broken(name="second-dist")}
    told = installed.discovery.unreadable()
    assert {text.partition(" cannot")[0] for text in told} == set(map(str, files))


def test_all_is_well_with_what_is_installed_here(installed):
    assert installed.discovery.unreadable() == ()
    assert unreadable() == []


@pytest.mark.parametrize("content", [b"", b"\n# nothing yet\n", b"[some.group]\n"])
def test_a_file_without_entry_points_is_not_damaged(installed, broken, content):
    broken(content)
    assert installed.discovery.unreadable() == ()


def test_a_file_that_importlib_takes_for_none_is_told_of(installed, broken):
    """Python reads no entry points, without a word, where it may not read the file."""
    file = broken()
    file.unlink()
    file.mkdir()  # permissions would not keep the superuser, who may run this test, from reading
    (told,) = installed.discovery.unreadable()
    assert told.startswith(f"{file} cannot be read: ")


def test_a_distribution_that_hides_another_of_its_name_hides_it_when_damaged(
    installed, declare, tmp_path
):
    """Imports come from the first on the path, whatever its metadata looks like."""
    declare("twice", {V1: {"old": "old:register"}}, folder="farther")
    declare("twice", {V1: {"new": "new:register"}}, version="2.0", folder="nearer")
    (tmp_path / "nearer" / "twice-2.0.dist-info" / "entry_points.txt").write_bytes(UNDECODABLE)
    assert {"old", "new"} & set(installed.names()) == set()
    assert len(installed.discovery.unreadable()) == 1


def test_unreadable_names_and_versions_are_told_of_and_the_folder_is_the_name(
    site, installed, tmp_path
):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    file = tmp_path / "good_provider-0.dist-info" / "METADATA"
    file.write_bytes(b"Metadata-Version: 2.1\nName: \xff\n")
    entry = installed.discovery.entries()["good"]
    assert (entry.distribution, entry.version) == ("good_provider-0.dist-info", None)
    (told,) = installed.discovery.unreadable()
    assert told.startswith(f"{file} cannot be read: UnicodeDecodeError: ")
    installed.activate("good")
    assert installed.current() == "good"


def test_the_scan_is_one_until_it_is_refreshed(installed, broken):
    assert installed.discovery.unreadable() == ()
    file = broken()
    assert installed.discovery.unreadable() == ()
    installed.discovery.refresh()
    assert len(installed.discovery.unreadable()) == 1
    before = installed.snapshot()
    file.write_text("")
    installed.discovery.refresh()
    assert installed.discovery.unreadable() == ()
    installed.reset(before)
    assert len(installed.discovery.unreadable()) == 1


def test_leaving_an_implementation_out_forgets_no_damage(site, installed, broken):
    site.install("good_provider", GOOD, provides=PROVIDES_GOOD)
    broken()
    installed.unregister("good")
    assert len(installed.discovery.unreadable()) == 1


# Distributions that an import hook offers, which need not lie in a folder


class Offered(importlib.metadata.Distribution):
    """A distribution that is in no folder."""

    def __init__(self, files):
        self.files_by_name = files

    def read_text(self, filename):
        content = self.files_by_name.get(filename)
        if isinstance(content, Exception):
            raise content
        return content

    def locate_file(self, path):
        raise NotImplementedError


@pytest.fixture
def offer(monkeypatch):
    """Return a function that makes an import hook offer distributions."""

    offers = []

    class Hook:
        @staticmethod
        def find_spec(*_names):
            return None

        @staticmethod
        def find_distributions(_context):
            for one in offers:
                if isinstance(one, Exception):
                    raise one
                yield Offered(one)

    monkeypatch.setattr(sys, "meta_path", [Hook, *sys.meta_path])
    return offers.append


POINTS = f"[{V1}]\noffered = offered:register\n"


def test_a_distribution_in_no_folder_is_read_as_any_other(installed, offer):
    offer({"entry_points.txt": POINTS, "METADATA": "Name: in-no-folder\nVersion: 3\n"})
    assert installed.discovery.entries()["offered"].origin() == "in-no-folder 3"


def test_one_without_a_name_is_read_too(installed, offer):
    offer({"entry_points.txt": POINTS, "METADATA": OSError("gone")})
    assert installed.discovery.entries()["offered"].origin() == "a distribution without a name"
    assert installed.discovery.unreadable() == (
        "METADATA of an installed distribution cannot be read: OSError: gone",
    )


def test_one_that_declares_nothing_is_none_of_our_business(installed, offer):
    offer({"METADATA": OSError("gone")})
    assert installed.discovery.unreadable() == ()


def test_one_whose_file_cannot_be_read_is_told_of(installed, offer):
    offer({"entry_points.txt": OSError("gone"), "METADATA": "Name: a\nVersion: 1\n"})
    assert installed.discovery.unreadable() == (
        "entry_points.txt of an installed distribution cannot be read: OSError: gone",
    )


def test_a_hook_that_fails_is_told_of_and_what_came_before_it_is_kept(installed, offer):
    offer({"entry_points.txt": POINTS, "METADATA": "Name: first\nVersion: 1\n"})
    offer(OSError("no connection"))
    assert "offered" in installed.names()
    assert installed.discovery.unreadable() == (
        "not every installed distribution can be listed: OSError: no connection",
    )


def test_python_still_tells_the_name_by_the_folder(declare):
    """If this fails, `metadata` reads every METADATA: slower, and no less right."""
    declare("Some.Dist", {V1: {"x": "x:register"}})
    names = [one._normalized_name for one in importlib.metadata.distributions()]
    assert "some_dist" in names


def test_where_python_tells_no_name_by_the_folder_metadata_does(declare, monkeypatch):
    declare("twice", {V1: {"old": "old:register"}}, folder="farther")
    declare("twice", {V1: {"new": "new:register"}}, version="2.0", folder="nearer")
    for one in (importlib.metadata.Distribution, importlib.metadata.PathDistribution):
        monkeypatch.setattr(one, "_normalized_name", None)
    names = [one.point.name for one in declared_in(V1)[0]]
    assert "new" in names
    assert "old" not in names


# Where it is shown


@pytest.fixture
def shown(installed, broken, monkeypatch, capsys):
    """Return a function that runs the command where a distribution is damaged."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setitem(sys.modules, "torch", None)
    told = f"{broken()} cannot be read: UnicodeDecodeError: "

    def run(*arguments):
        status = cli.main(arguments)
        printed = capsys.readouterr()
        return status, printed, told

    return run


@pytest.mark.parametrize("command", ["list", "explain"])
def test_the_command_shows_it(shown, command):
    status, printed, told = shown(command)
    assert (status, printed.out.count(told)) == (0, 1)
    assert printed.out.splitlines()[-1].startswith(told)
    status, printed, told = shown(command, "--json")
    (text,) = json.loads(printed.out)["unreadable"]
    assert (status, text.startswith(told)) == (0, True)


def test_a_sound_installation_is_not_talked_about(installed, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for command in ("list", "explain"):
        cli.main([command])
        assert "cannot be read" not in capsys.readouterr().out
        cli.main([command, "--json"])
        assert json.loads(capsys.readouterr().out)["unreadable"] == []


def test_an_unknown_name_may_be_in_what_cannot_be_read(shown, installed):
    status, printed, told = shown("explain", "lost")
    assert status == 1
    assert told in printed.err
    with pytest.raises(UnknownImplError) as caught:
        installed.activate("lost")
    assert told in "\n".join(caught.value.__notes__)


def test_for_the_doctor_it_is_a_trap(shown):
    status, printed, told = shown("doctor", "--json")
    traps = json.loads(printed.out)["traps"]
    (trap,) = [one for one in traps if one["found"].startswith(told)]
    assert status == 0
    assert "Install that distribution again, or uninstall it" in trap["remedy"]
    assert f"{os.linesep}" not in trap["found"]


def test_the_doctor_says_which_file_keeps_torch_from_being_imported(
    installed, broken, monkeypatch, failing
):
    """Torch reads all entry points at the end of its import, and raises what Python raises."""
    told = f"{broken()} cannot be read: UnicodeDecodeError: "
    error = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    monkeypatch.setattr(doctor, "import_module", lambda name: failing(error)())
    monkeypatch.setitem(sys.modules, "torch", None)  # the machine's, which a check may import
    diagnosis = doctor.diagnose()
    assert "torch cannot be imported: UnicodeDecodeError" in diagnosis.torch_problem
    (trap,) = diagnosis.traps
    assert trap.found.startswith(told)
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in trap.remedy
