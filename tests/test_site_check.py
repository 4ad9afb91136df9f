"""The check that `hatch run docs` ends with: a site that needs another host is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[1] / ".ci/check_site.py"
WHOLE = '<link rel="stylesheet" href="a/style.css"><a href="https://example.org">elsewhere</a>'


def run_check(site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CHECK, site], capture_output=True, text=True)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Give a site of five pages that is whole."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/style.css").write_text("p { background: url(dot.svg) }")
    (tmp_path / "a/dot.svg").write_text("<svg/>")
    for number in range(5):
        (tmp_path / f"{number}.html").write_text(WHOLE)
    return tmp_path


def test_a_whole_site_passes(site: Path) -> None:
    done = run_check(site)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "element",
    [
        '<script src="https://cdn.example.org/x.js"></script>',
        '<script src="//cdn.example.org/x.js"></script>',
        '<link rel="stylesheet" href="https://fonts.example.org/css">',
        '<link rel="preconnect" href="https://fonts.example.org">',
        '<img src="https://example.org/badge.svg">',
        "<style>@import 'https://fonts.example.org/css';</style>",
        '<p style="background: url(https://example.org/x.png)">',
        '<img src="missing.png">',
        '<img src="../../outside.png">',
    ],
)
def test_a_page_that_loads_from_elsewhere_is_named(site: Path, element: str) -> None:
    (site / "3.html").write_text(WHOLE + element)
    done = run_check(site)
    assert done.returncode == 1
    assert done.stderr.startswith("3.html: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_style_sheet_that_loads_from_elsewhere_is_named(site: Path) -> None:
    (site / "a/style.css").write_text("@font-face { src: url('https://example.org/f.woff2') }")
    done = run_check(site)
    assert done.returncode == 1
    assert done.stderr.startswith("a/style.css: https://example.org/f.woff2")


def test_an_empty_folder_is_no_site(tmp_path: Path) -> None:
    assert run_check(tmp_path).returncode == 1
