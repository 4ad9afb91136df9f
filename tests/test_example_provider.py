"""The example of the author's guide, installed and put through the standard tests."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "docs/examples/plain-attention"


def test_the_example_provider_passes_the_standard_tests(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=EXAMPLE, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"  # what an installer does with a wheel without scripts
    zipfile.ZipFile(wheel).extractall(installed)
    # One thread: matrices this small wait more than they work.
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    options = ["-q", "-rs", "-p", "no:cacheprovider", "--flash-attention-grid", "quick"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-c", "pyproject.toml", "tests"],
        cwd=EXAMPLE,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "no installed distribution offers plain" not in done.stdout


def test_the_example_provider_is_short() -> None:
    sources = EXAMPLE.glob("src/**/*.py")
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources) < 60
