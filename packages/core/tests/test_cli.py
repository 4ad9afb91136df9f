"""The command `flash-attention`: what it prints, and the status that it ends with."""

from __future__ import annotations

import json
import runpy
import sys
from types import ModuleType

import pytest

from flash_attention_registry import (
    ImplUnavailableError,
    RequestUnavailableError,
    cli,
    default,
    doctor,
)

PROVIDER = """
from flash_attention_registry import default
print("a provider that prints")
def register():
    default.register_flash_attention_impl("offered", register_fn=lambda: None, family="FA4")
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No torch, nothing asked for, and lines of a known length."""
    for name in ("", "_STRICT", "_DISABLE"):
        monkeypatch.delenv(f"FLASH_ATTENTION_IMPL{name}", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture
def here(registry, monkeypatch):
    """The registry of the process, in which only a test's own implementations are."""
    monkeypatch.setattr(default, "_registry", registry)
    return registry


@pytest.fixture
def with_offer(site, installed):
    """The registry of the process, to which one installed distribution offers `offered`."""
    site.install("offering", PROVIDER, provides={"offered": "offering:register"})
    for other in installed.names():
        if other != "offered":
            installed.discovery.forget(other)  # of the machine that runs the test
    return installed


@pytest.fixture
def family(here, kernels):
    """A family whose best member is out of order, and one whose only member is not recommended."""
    for name, options in {
        "best": {"family": "FA4", "priority": 2, "availability": lambda: "broken"},
        "good": {"family": "FA4", "priority": 1},
        "slow": {"family": "slow ones", "recommended": lambda: "it is slow"},
    }.items():
        here.register(name, register_fn=kernels.installer(name), **options)
    return here


def documents(capsys):
    """What was printed, which must be one JSON document."""
    return json.loads(capsys.readouterr().out)


# list


def test_list_prints_one_line_for_each_implementation(with_offer, kernels, capsys):
    with_offer.register("mine", register_fn=kernels.installer("mine"), family="ours")
    with_offer.activate("mine")
    assert cli.main(["list"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["NAME", "FAMILY", "DISTRIBUTION", "VERSION", "ACTIVE", "PROBLEM"],
        ["mine", "ours", "-", "-", "yes", "-"],
        ["offered", "-", "some-dist", "1.2.3", "no", "-"],
    ]


def test_list_imports_no_provider(with_offer):
    cli.main(["list"])
    assert "offering" not in sys.modules


def test_list_as_json_has_stable_keys(with_offer, capsys):
    assert cli.main(["list", "--json"]) == 0
    assert documents(capsys) == {
        "implementations": [
            {
                "name": "offered",
                "family": None,
                "distribution": "some-dist",
                "version": "1.2.3",
                "active": False,
                "problem": None,
            }
        ],
        "unreadable": [],
    }


def test_list_says_what_is_disabled(with_offer, capsys, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_IMPL_DISABLE", "offered")
    cli.main(["list"])
    assert "it is disabled by FLASH_ATTENTION_IMPL_DISABLE=offered" in capsys.readouterr().out


def test_list_says_so_if_there_is_nothing(here, capsys):
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out == "No flash attention implementation is installed.\n"


# explain


def test_explain_prints_every_report(family, capsys):
    assert cli.main(["explain"]) == 0
    assert capsys.readouterr().out == (
        "best (family FA4, priority 2, registered by a direct call)\n"
        "    not available: broken\n"
        "good (family FA4, priority 1, registered by a direct call)\n"
        "    available and recommended\n"
        "slow (family slow ones, priority 0, registered by a direct call)\n"
        "    available, but not recommended here: it is slow\n"
        "\n"
        "No kernels can be used: torch is not installed.\n"
    )


def test_explain_says_nothing_of_a_torch_that_is_there(family, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))
    cli.main(["explain"])
    assert "torch" not in capsys.readouterr().out
    cli.main(["explain", "--json"])
    assert documents(capsys)["torch_problem"] is None


@pytest.mark.parametrize(
    ("name", "status", "verdict"),
    [
        pytest.param("good", 0, "Activating good would take good here.", id="usable"),
        pytest.param("slow", 0, "Activating slow would take slow here.", id="an exact name"),
        pytest.param("best", 1, "Activating best would fail here.", id="not available"),
        pytest.param("FA4", 0, "Activating FA4 would take good here.", id="a family"),
        pytest.param("slow ones", 1, "Activating slow ones would fail here.", id="none wins"),
    ],
)
def test_explain_ends_with_1_if_the_name_is_not_usable(family, capsys, name, status, verdict):
    assert cli.main(["explain", name]) == status
    assert capsys.readouterr().out.splitlines()[-1] == verdict


@pytest.mark.parametrize("name", ["best", "good", "slow", "FA4", "slow ones"])
def test_explain_foretells_what_activation_does(family, capsys, name):
    status = cli.main(["explain", name, "--json"])
    foretold = documents(capsys)["would_take"]
    if status == 0:
        family.activate(name)
    else:
        with pytest.raises(ImplUnavailableError):
            family.activate(name)
    assert family.current() == foretold


def test_a_family_keeps_its_active_member(family, kernels, capsys):
    family.register("worse", register_fn=kernels.installer("worse"), family="FA4")
    family.activate("worse")
    cli.main(["explain", "FA4", "--json"])
    foretold = documents(capsys)["would_take"]
    family.activate("FA4")
    assert family.current() == foretold == "worse"


def test_explain_shows_only_what_the_name_means(family, capsys):
    cli.main(["explain", "FA4"])
    printed = capsys.readouterr().out
    assert "best" in printed
    assert "good" in printed
    assert "slow" not in printed


def test_explain_gives_the_reason_of_every_member(here, capsys):
    here.register("old", register_fn=len, family="FA4", priority=1, availability=lambda: "broken")
    here.register("slow", register_fn=len, family="FA4", recommended=lambda: "it is slow")
    assert cli.main(["explain", "FA4", "--json"]) == 1
    assert documents(capsys)["reason"] == (
        "no member of this family would be taken here "
        "(old: not available: broken; slow: not recommended here: it is slow)"
    )


def test_explain_a_family_tells_which_providers_could_not_be_loaded(with_offer, site, capsys):
    site.install("broken_provider", "1 / 0", provides={"broken": "broken_provider:register"})
    with_offer.discovery.refresh()
    with_offer.register("slow", register_fn=len, family="letters", recommended=lambda: "it is slow")
    told = "broken: not available: broken_provider:register of some-dist 1.2.3 raised"
    for arguments in (["letters"], ["letters", "--json"], ["nope"]):
        assert cli.main(["explain", *arguments]) == 1
        printed = capsys.readouterr()
        assert told in " ".join(f"{printed.out}{printed.err}".split())
    assert cli.main(["explain", "slow"]) == 0
    assert "broken" not in capsys.readouterr().out


def test_explain_an_unknown_name_lists_what_there_is(family, capsys):
    assert cli.main(["explain", "nope"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "flash-attention: there is no implementation and no family 'nope'. Implementations: best, "
        "good, slow.\n  Families: FA4, slow ones.\n"
    )


def test_explain_as_json_has_stable_keys(family, capsys):
    assert cli.main(["explain", "slow ones", "--json"]) == 1
    assert documents(capsys) == {
        "name": "slow ones",
        "usable": False,
        "would_take": None,
        "reason": "no member of this family would be taken here "
        "(slow: not recommended here: it is slow)",
        "implementations": [
            {
                "name": "slow",
                "distribution": None,
                "version": None,
                "family": "slow ones",
                "priority": 0,
                "available": True,
                "unavailable_reason": None,
                "recommended": False,
                "not_recommended_reason": "it is slow",
                "active": False,
            }
        ],
        "unreadable": [],
        "torch_problem": "torch is not installed",
    }


def test_explain_all_as_json_asks_for_no_verdict(here, capsys):
    assert cli.main(["explain", "--json"]) == 0
    assert documents(capsys) == {
        "name": None,
        "usable": None,
        "would_take": None,
        "reason": None,
        "implementations": [],
        "unreadable": [],
        "torch_problem": "torch is not installed",
    }


def test_explain_asks_nobody_if_a_strict_environment_ended_the_import_of_torch(
    family, capsys, failing, monkeypatch
):
    family.register("asked", register_fn=len, availability=pytest.fail)
    ended = RuntimeError("a hook failed")
    ended.__cause__ = RequestUnavailableError("FLASH_ATTENTION_IMPL=best: broken")
    monkeypatch.setattr(doctor, "import_module", lambda name: failing(ended)())
    assert cli.main(["explain"]) == 1
    assert capsys.readouterr().err == "flash-attention: FLASH_ATTENTION_IMPL=best: broken\n"


def test_explain_asks_nobody_after_an_import_of_torch_that_failed_late(
    family, capsys, failing, monkeypatch
):
    family.register("asked", register_fn=len, availability=pytest.fail)
    monkeypatch.setattr(doctor, "import_module", lambda name: failing(OSError("a hook"))())
    monkeypatch.setitem(sys.modules, "torch._C", ModuleType("torch._C"))
    assert cli.main(["explain", "--json"]) == 1
    assert documents(capsys)["error"].startswith("torch cannot be imported: OSError: a hook. torch")


# doctor


def test_doctor_prints_the_diagnosis(here, capsys):
    assert cli.main(["doctor"]) == 0
    assert "torch is not installed" in capsys.readouterr().out


def test_doctor_ends_with_1_if_what_was_asked_for_is_not_usable(here, capsys, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_IMPL", "absent")
    assert cli.main(["doctor"]) == 1
    assert "FLASH_ATTENTION_IMPL=absent asks for what is not active" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "run"),
    [([], False), (["--run"], True), (["--run", "mine"], "mine"), (["--run=FA4"], "FA4")],
)
def test_doctor_makes_a_call_as_it_is_told(here, monkeypatch, arguments, run):
    told = []
    diagnose = doctor.diagnose
    monkeypatch.setattr(doctor, "diagnose", lambda run: told.append(run) or diagnose(run))
    cli.main(["doctor", *arguments])
    assert told == [run]


def test_doctor_as_json_is_the_diagnosis(here, capsys):
    assert cli.main(["doctor", "--json", "--run"]) == 1
    document = documents(capsys)
    expected = json.loads(json.dumps(doctor.diagnose(run=True).as_dict()))
    assert document == expected


# All of them


@pytest.mark.parametrize("command", ["list", "explain"])
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("FLASH_ATTENTION_IMPL", "native,a", "what follows 'native' would never be used"),
        ("FLASH_ATTENTION_IMPL_STRICT", "maybe", "is neither yes nor no"),
        ("FLASH_ATTENTION_IMPL_DISABLE", "a,,b", "has an empty place"),
    ],
)
def test_a_variable_that_cannot_be_understood_is_told_and_ends_with_1(
    with_offer, capsys, monkeypatch, command, variable, value, reason
):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv(variable, value)
    assert cli.main([command]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"flash-attention: {variable}={value!r}")
    assert reason in printed.err
    assert cli.main([command, "--json"]) == 1
    (key,) = documents(capsys)
    assert key == "error"
    assert cli.main(["doctor", "--json"]) == 1
    (problem,) = documents(capsys)["problems"]
    assert problem.startswith(f"{variable}={value!r}")


def test_every_variable_that_cannot_be_understood_is_told(with_offer, capsys, monkeypatch):
    monkeypatch.setenv("FLASH_ATTENTION_IMPL_STRICT", "maybe")
    monkeypatch.setenv("FLASH_ATTENTION_IMPL_DISABLE", ",")
    assert cli.main(["list"]) == 1
    told = capsys.readouterr().err
    assert "FLASH_ATTENTION_IMPL_STRICT='maybe'" in told
    assert "FLASH_ATTENTION_IMPL_DISABLE=','" in told


@pytest.mark.parametrize("command", ["explain", "doctor"])
def test_what_a_provider_prints_is_kept_out_of_the_answer(with_offer, capsys, command):
    cli.main([command, "--json"])
    printed = capsys.readouterr()
    assert "offered" in printed.out
    json.loads(printed.out)
    assert "a provider that prints" in printed.err


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["explain", "a", "b"], ["list", "--run"], ["doctor", "--run", "a", "b"]],
)
def test_a_command_line_that_cannot_be_understood_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: flash-attention")


@pytest.mark.parametrize("width", [50, 120])
def test_text_is_as_wide_as_the_terminal(here, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    here.register("x", register_fn=len, availability=lambda: "word " * 60)
    cli.main(["explain"])
    longest = max(map(len, capsys.readouterr().out.splitlines()))
    assert width - 6 < longest <= width


def test_text_is_ascii_whatever_a_provider_says(here, capsys):
    here.register("x", register_fn=len, availability=lambda: "trop lent, désolé")
    cli.main(["explain"])
    assert "trop lent, d\\xe9sol\\xe9" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_error(here, monkeypatch, tmp_path):
    class Closed:
        def __init__(self):
            self.file = (tmp_path / "pipe").open("w")

        def write(self, _text):
            raise BrokenPipeError

        def fileno(self):
            return self.file.fileno()

    closed = Closed()
    with closed.file:
        monkeypatch.setattr(sys, "stdout", closed)
        assert cli.main(["list"]) == 0
        closed.file.write("flushed when Python ends")
    assert (tmp_path / "pipe").read_text() == ""


def test_running_the_package_is_the_command(here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "list"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("flash_attention_registry", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == "No flash attention implementation is installed.\n"
