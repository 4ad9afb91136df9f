"""The host's side of a launch, on Triton's own driver over a CUDA library that runs nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `launches.py` saw."""
    installed = version("triton")
    if not installed.startswith("3.6."):
        pytest.skip(f"Triton {installed} may call other functions than the stub has")
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler, which Triton needs too")
    folder = tmp_path_factory.mktemp("stub")
    library = folder / "libcuda.so.1"
    build = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*build, str(HERE / "stub_libcuda.c")], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(HERE / "launches.py"), str(folder)],
        env={**environment, "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_launcher_that_is_not_known_is_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from fa4_triton import launch

    def wrapping(launcher: Any) -> Any:
        return lambda *arguments: launcher(*arguments)

    def compiled(function: Any) -> Any:
        run = SimpleNamespace(
            launch=function,
            global_scratch_size=0,
            profile_scratch_size=0,
            launch_cooperative_grid=False,
            launch_pdl=False,
        )
        return SimpleNamespace(run=run, function=1, packed_metadata=b"")

    monkeypatch.setattr(launch, "_DIRECT_LAUNCH", True)
    known = launch.launcher_of(compiled(wrapping(print)))
    assert known is not None
    assert known.launch is print
    assert launch.launcher_of(compiled(lambda *arguments: None)) is None


def seen(launches: int, tensor_maps: int, compiled: int, programs: int) -> dict[str, int]:
    return {
        "launches": launches,
        "tensor_maps": tensor_maps,
        "compiled": compiled,
        "programs": programs,
    }


def test_what_was_warmed_up_is_not_compiled_in_the_first_call(found: dict[str, Any]) -> None:
    # At head dim 64 two tiles, and the portable kernel for what is too small; at 16 that alone.
    assert found["warmed"] == found["compiled ahead"] == 4
    assert found["first"] == seen(1, 4, 0, 132)
    assert found["portable"] == seen(1, 0, 0, 2 * 16 * 2)


def test_a_repeated_call_encodes_no_tensor_map(found: dict[str, Any]) -> None:
    assert found["again"] == seen(1, 0, 0, 132)


def test_a_batch_of_no_sequence_launches_and_compiles_nothing(found: dict[str, Any]) -> None:
    last = found["portable"]["programs"]  # of whatever was launched before
    assert found["no sequence"] == seen(0, 0, 0, last)


def test_another_address_is_another_tensor_map(found: dict[str, Any]) -> None:
    assert found["another query"] == seen(1, 1, 0, 132)
    assert found["its address is in the map"]


def test_warming_up_compiles_what_a_first_call_would(found: dict[str, Any]) -> None:
    """A call whose kernel has no launcher yet goes Triton's way, which finds them compiled."""
    for first, again in (("cold", "cold, again"), ("cold portable", "cold portable, again")):
        assert found[first]["compiled"] == found[again]["compiled"] == 0
        assert found[first]["launches"] == found[again]["launches"] == 1
        assert found[again]["tensor_maps"] <= found[first]["tensor_maps"]
