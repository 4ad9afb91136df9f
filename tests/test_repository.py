"""What holds for the repository as a whole: its layout, and what its files may and may not say."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tokenize
from pathlib import Path

import pytest

import flash_attention_registry

ROOT = Path(__file__).resolve().parents[1]
TOP_FILES = {
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "RELEASING.md",
    "pyproject.toml",
    "zensical.toml",
}
TOP_FOLDERS = {"docs", "packages", "tests"}
README_COMMANDS = ["pip install hatch && hatch run demo", "pip install hatch && hatch run test"]
# A path that only one machine has. The lookbehind lets parts of addresses and of longer paths pass.
MACHINE_PATH = re.compile(r"(?<![\w.:/~}-])/(?:home|root|Users|tmp|work|mnt|scratch)/\w")
IGNORE = re.compile(r"#\s*type:\s*ignore(?P<codes>\[[\w, -]+\])?(?P<rest>.*)")
LINK = re.compile(r"\]\((?!https?://|mailto:|#)([^)#\s]+)")
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Give every file that is, or would be, committed."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the repository is git's to say")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]
    assert ROOT / "README.md" in found
    return found


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None  # an image or the like


def test_top_level_is_the_layout(files: list[Path]) -> None:
    parts = [path.relative_to(ROOT).parts for path in files]
    visible = [part for part in parts if not part[0].startswith(".")]
    assert {part[0] for part in visible if len(part) == 1} == TOP_FILES
    assert {part[0] for part in visible if len(part) > 1} == TOP_FOLDERS


def test_no_file_names_a_path_of_one_machine(files: list[Path]) -> None:
    named = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate((text_of(path) or "").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert named == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("see /" + "home/me/notes.md", True),
        ('path = "/' + 'tmp/x"', True),
        ("https://example.org/home/page", False),
        ("packages/core/tests/work/x", False),
    ],
)
def test_machine_paths_are_told_from_others(line: str, found: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) == found


def test_every_type_ignore_has_a_code_and_a_reason(files: list[Path]) -> None:
    bare = []
    for path in files:
        if path.suffix != ".py":
            continue
        with path.open("rb") as source:
            for token in tokenize.tokenize(source.readline):
                match = IGNORE.search(token.string) if token.type == tokenize.COMMENT else None
                if match and not (match["codes"] and re.match(r"\s+# \w.{7,}", match["rest"])):
                    bare.append(f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}")
    assert bare == []


def test_readme_opens_with_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line.startswith("pip ")]
    assert commands == README_COMMANDS
    assert lines.index(README_COMMANDS[1]) < lines.index("## Use")


def test_links_between_documents_lead_somewhere(files: list[Path]) -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {link}"
        for path in files
        if path.suffix == ".md"
        for link in LINK.findall(path.read_text(encoding="utf-8"))
        if not (path.parent / link).exists()
    ]
    assert broken == []


def test_python_in_documents_parses_and_names_public_functions(files: list[Path]) -> None:
    wrong = []
    for path in files:
        if path.suffix != ".md":
            continue
        for block in PYTHON_BLOCK.findall(path.read_text(encoding="utf-8")):
            for node in ast.walk(ast.parse(block, filename=str(path))):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "registry"
                    and node.attr not in flash_attention_registry.__all__
                ):
                    wrong.append(f"{path.relative_to(ROOT)}: registry.{node.attr}")
    assert wrong == []


def test_names_of_tests_are_the_same_in_every_process(request: pytest.FixtureRequest) -> None:
    # Of all that this run has collected. An object's address is another in each worker of -n.
    names = [item.nodeid for item in request.session.items]
    assert [name for name in names if re.search(r"\b0x[0-9a-f]{6}", name)] == []
