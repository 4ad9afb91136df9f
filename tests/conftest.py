"""Programs in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What decides which kernels run, and what a test says anew for every program.
CHOICES = ("CUDA_VISIBLE_DEVICES", "TORCH_DEVICE_BACKEND_AUTOLOAD", "TRITON_INTERPRET")
CHOICE_PREFIXES = ("FLASH_ATTENTION_", "TORCHINDUCTOR_")

RunPython = Callable[..., str]


def attempt(
    *arguments: object, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, however it ends.

    Args:
        *arguments: Of the interpreter.
        timeout: In seconds.
        **environment: Variables, beside those of this process that choose no kernels.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in CHOICES and not name.startswith(CHOICE_PREFIXES)
    }
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", *map(str, arguments)],
        cwd=ROOT,
        # One thread: matrices this small wait more than they work, and sums keep their order.
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def run(*arguments: object, timeout: float = 300, **environment: str) -> str:
    """As `attempt`, but give what it prints, or fail with what it says."""
    __tracebackhide__ = True
    done = attempt(*arguments, timeout=timeout, **environment)
    if done.returncode != 0:
        pytest.fail(f"exit status {done.returncode} (a negative one is a signal)\n{done.stderr}")
    return done.stdout


@pytest.fixture(scope="session")
def try_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`attempt`."""
    return attempt


@pytest.fixture(scope="session")
def run_python() -> RunPython:
    """`run`."""
    return run


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], scope="session")
def where(request: pytest.FixtureRequest) -> str:
    """Where programs run: on the CPU, in Triton's interpreter, or on a GPU."""
    place: str = request.param
    return place


HIDDEN_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def stock(where: str) -> dict[str, str]:
    """The environment in which torch knows nothing of the registry."""
    hidden = HIDDEN_GPU if where == "cpu" else {}
    return {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **hidden}


@pytest.fixture(scope="session")
def asks_for_nothing(where: str) -> dict[str, str]:
    """The environment in which implementations are installed and none is asked for."""
    return HIDDEN_GPU if where == "cpu" else {}


@pytest.fixture(scope="session")
def asks_for_fa4_triton(where: str) -> dict[str, str]:
    """The environment of a user who wants these kernels."""
    interpreted = {"TRITON_INTERPRET": "1", **HIDDEN_GPU} if where == "cpu" else {}
    return {"FLASH_ATTENTION_IMPL": "fa4-triton", **interpreted}


@cache
def cuda_kernels_are_compiled(folder: Path) -> bool:
    """Whether a wheel of fa4-cuda is made at once."""
    script = "import build_kernels; print(build_kernels.is_current())"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip() == "True"


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Give a function from a package's folder to its wheel, each built once."""
    built: dict[Path, Path] = {}

    def wheel(folder: Path) -> Path:
        if folder.name == "fa4-cuda" and not cuda_kernels_are_compiled(folder):
            pytest.skip("the wheel of fa4-cuda compiles for minutes: first hatch run build-cuda")
        if folder not in built:
            out = tmp_path_factory.mktemp(folder.name)
            command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            (built[folder],) = out.glob("*.whl")
        return built[folder]

    return wheel
