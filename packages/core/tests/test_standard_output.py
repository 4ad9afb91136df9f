"""On the command's standard output there is its answer and nothing else, whoever prints how."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flash_attention_registry
from flash_attention_registry import cli, default

SOURCE = str(Path(flash_attention_registry.__file__).parents[1])

# Every way to standard output that a provider has while it is loaded, asked, and afterwards.
TALKATIVE = """
import atexit, os, subprocess, sys, threading
def talk(when):
    print("NOISE printed", when)
    print("NOISE on the first stream", when, file=sys.__stdout__)
    os.write(1, f"NOISE on the descriptor {when}\\n".encode())
    os.system(f"echo NOISE of a shell {when}")
    subprocess.run([sys.executable, "-c", f"print('NOISE of a child {when}')"])
talk("while loaded")
atexit.register(talk, "in the end")
def availability():
    talk("while asked")
def register():
    from flash_attention_registry import register_flash_attention_impl
    register_flash_attention_impl(
        "talkative", register_fn=lambda: None, family="FA4", availability=availability)
"""
SCRIPT = "import sys; from flash_attention_registry.cli import main; sys.exit(main())"


@pytest.fixture
def run(site):
    """Run the command, in a process of its own, where a talkative provider is installed."""
    site.install("talkative", TALKATIVE, provides={"talkative": "talkative:register"})
    path = os.pathsep.join([str(site.folder), SOURCE])
    hide_torch = "import sys; sys.modules['torch'] = None; "

    def run(*arguments, code=SCRIPT, **options):
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FLASH_ATTENTION_")}
        return subprocess.run(
            [sys.executable, "-S", "-c", hide_torch + code, *arguments],
            env={**inherited, "PYTHONPATH": path},
            timeout=120,
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
        )

    return run


@pytest.mark.parametrize("command", ["explain", "doctor"])
def test_the_json_document_stands_alone(run, command):
    done = run(command, "--json")
    document = json.loads(done.stdout)
    assert [one["name"] for one in document["implementations"]] == ["talkative"]
    for when in ("while loaded", "while asked", "in the end"):
        for how in ("printed", "on the first stream", "on the descriptor", "of a shell"):
            assert f"NOISE {how} {when}" in done.stderr
        assert f"NOISE of a child {when}" in done.stderr


def test_so_does_the_text(run):
    done = run("explain", "FA4")
    assert "NOISE" not in done.stdout
    assert done.stdout.startswith("talkative (family FA4")
    assert (done.returncode, done.stderr.count("NOISE")) == (0, 15)


def test_an_error_as_json_stands_alone_too(run):
    done = run("explain", "nobody", "--json")
    assert (done.returncode, list(json.loads(done.stdout))) == (1, ["error"])
    assert "NOISE" in done.stderr


def test_running_the_package_is_the_same(run):
    code = "import runpy; runpy.run_module('flash_attention_registry', run_name='__main__')"
    done = run("explain", "--json", code=code)
    assert json.loads(done.stdout)["implementations"]


def test_help_is_an_answer(run):
    assert run("--help").stdout.startswith("usage: flash-attention")


def test_a_reader_that_has_gone_is_no_error(run):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as closed:
        done = run("explain", stdout=closed)
    assert done.returncode == 0
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("closed", [1, 2])
def test_a_stream_that_is_closed_from_the_start_is_no_error(run, closed):
    again = f"import sys; sys.modules['torch'] = None; {SCRIPT}"
    code = (
        f"import os, sys; os.close({closed}); "
        f"os.execv(sys.executable, [sys.executable, '-S', '-c', {again!r}, *sys.argv[1:]])"
    )
    done = run("explain", "--json", code=code)
    assert done.returncode == 0
    if closed == 1:
        assert done.stdout == ""
    else:
        assert json.loads(done.stdout)["implementations"]


def test_a_program_that_calls_it_keeps_its_standard_output(run):
    code = (
        "from flash_attention_registry.cli import main\n"
        "main(['explain', '--json'])\n"
        "print('and more')\n"
    )
    assert "\nand more\n" in run(code=code).stdout


ANSWER = "No flash attention implementation is installed.\n"


@pytest.fixture
def in_files(tmp_path, monkeypatch, registry):
    """A context in which the standard streams of this process are files: `out` and `err`.

    It is entered in the test itself, since pytest puts streams of its own there after the set-up,
    and gives the file `out` and a monkeypatch that ends with it: one that outlives it would put the
    closed `err` back.
    """
    monkeypatch.setattr(default, "_registry", registry)
    monkeypatch.setattr(sys, "argv", ["flash-attention", "list"])

    @contextlib.contextmanager
    def in_files():
        with (
            (tmp_path / "out").open("w") as out,
            (tmp_path / "err").open("w") as err,
            monkeypatch.context() as patch,
        ):
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "__stdout__", out)
            patch.setattr(sys, "__stderr__", err)
            yield out, patch

    return in_files


@pytest.mark.parametrize("there_is_an_error_stream", [True, False])
def test_the_descriptor_stands_for_the_error_stream_afterwards(
    in_files, tmp_path, there_is_an_error_stream
):
    with in_files() as (out, patch):
        if not there_is_an_error_stream:
            patch.setattr(sys, "__stderr__", None)
        print("before", file=out)
        assert cli.main() == 0
        print("NOISE", file=out, flush=True)
        os.write(out.fileno(), b"NOISE too\n")
    assert (tmp_path / "out").read_text() == f"before\n{ANSWER}"
    noise = "NOISE\nNOISE too\n" if there_is_an_error_stream else ""
    assert (tmp_path / "err").read_text() == noise


def test_a_stream_that_somebody_has_put_there_is_left_alone(in_files, tmp_path):
    with in_files() as (out, _), contextlib.redirect_stdout(io.StringIO()) as given:
        assert cli.main() == 0
        os.write(out.fileno(), b"of the program")
    assert given.getvalue() == ANSWER
    assert (tmp_path / "out").read_text() == "of the program"
