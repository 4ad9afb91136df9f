"""The packages as their users get them: what wheels hold, and whether they fit one another."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from configparser import ConfigParser
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
CORE = ROOT / "packages/core"
PROVIDER_GROUP = "flash_attention_registry.providers.v1"
HOOK_GROUP = "torch.backends"  # whose entry points `import torch` calls at its end
LICENCES = {"fa4-cuda": "BSD-3-Clause AND LicenseRef-NVIDIA-Proprietary"}  # the CUDA runtime in it
PROVIDERS = [folder for folder in FOLDERS if folder.name.startswith("fa4-")]

each_package = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
each_provider = pytest.mark.parametrize("folder", PROVIDERS, ids=lambda folder: folder.name)
Build = Callable[[Path], Path]


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def import_name(folder: Path) -> str:
    return project(folder)["name"].replace("-", "_")


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def dist_info(wheel: Path, file: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(f".dist-info/{file}"))
        return archive.read(name).decode()


def metadata(wheel: Path) -> Message:
    return Parser().parsestr(dist_info(wheel, "METADATA"))


def entry_points(wheel: Path) -> dict[str, dict[str, str]]:
    parser = ConfigParser(delimiters=("=",))
    parser.optionxform = str  # keeps the case of names
    parser.read_string(dist_info(wheel, "entry_points.txt"))
    return {group: dict(parser[group]) for group in parser.sections()}


def run_python(*options: str, wheels: list[Path], code: str) -> str:
    """Run `code` in a new interpreter that imports from `wheels` before anything else."""
    prelude = f"import sys; sys.path[:0] = {[str(wheel) for wheel in wheels]!r}\n"
    done = subprocess.run(
        [sys.executable, *options, "-c", prelude + code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_packages_are_those_of_the_layout() -> None:
    assert {folder.name for folder in FOLDERS} == {"core", "fa4-cuda", "fa4-triton", "testkit"}


@each_package
@pytest.mark.parametrize("room", ["README.md", "CHANGELOG.md", "LICENSE", "src", "tests"])
def test_every_package_has_the_same_rooms(folder: Path, room: str) -> None:
    assert (folder / room).exists()


@each_package
def test_wheel_holds_one_typed_package_a_providers_hook_and_the_licence(
    folder: Path, build: Build
) -> None:
    names = names_in(build(folder))
    package = import_name(folder)
    assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    beside = {f"{package}_autoload.py"} if folder in PROVIDERS else set()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {package} | beside
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@each_package
def test_wheel_holds_every_file_of_its_source(folder: Path, build: Build) -> None:
    source = folder / "src"
    files = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        # Of what is compiled the wheel holds the result.
        if path.is_file() and not {"__pycache__", "csrc"} & set(path.parts)
    }
    assert files <= names_in(build(folder))


@each_package
def test_wheel_states_licence_python_and_readme(folder: Path, build: Build) -> None:
    found = metadata(build(folder))
    assert found["License-Expression"] == LICENCES.get(folder.name, "BSD-3-Clause")
    assert found["Requires-Python"] == ">=3.10"
    assert found.get_payload() == (folder / "README.md").read_text(encoding="utf-8")


@each_package
def test_licence_is_the_same_everywhere(folder: Path) -> None:
    assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@each_package
def test_version_is_the_top_entry_of_the_changelog(folder: Path) -> None:
    entries = re.findall(
        r"^## \[?([^\s\]]+)", (folder / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert entries[:1] == [project(folder)["version"]]


@each_package
def test_siblings_accept_one_another(folder: Path) -> None:
    versions = {
        canonicalize_name(project(each)["name"]): project(each)["version"] for each in FOLDERS
    }
    own = project(folder)
    lines = [*own.get("dependencies", [])]
    for extra in own.get("optional-dependencies", {}).values():
        lines += extra
    siblings = [
        each for each in map(Requirement, lines) if canonicalize_name(each.name) in versions
    ]
    assert bool(siblings) == (folder != CORE), "all but the core build on the core"
    for requirement in siblings:
        version = versions[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, (
            f"{own['name']} asks for {requirement}, {version} is here"
        )
        assert "<" in str(requirement.specifier), f"{requirement} would take a breaking release"


def test_core_wheel_has_no_dependencies(build: Build) -> None:
    assert metadata(build(CORE)).get_all("Requires-Dist", []) == []


def test_core_wheel_carries_the_notice_for_what_follows_torch(build: Build) -> None:
    notice = dist_info(build(CORE), "licenses/NOTICE")
    assert "torch.nn.attention" in notice
    assert "Copyright" in notice


def test_core_wheel_alone_imports_and_loads_no_torch(build: Build) -> None:
    wheel = build(CORE)
    # -S: no site-packages at all, so nothing but the standard library and the wheel.
    out = run_python(
        "-I",
        "-S",
        wheels=[wheel],
        code="import flash_attention_registry as registry\n"
        "print(registry.__file__, registry.list_flash_attention_impls(), 'torch' in sys.modules)",
    )
    assert out.strip() == f"{wheel / 'flash_attention_registry/__init__.py'} [] False"


@each_provider
def test_provider_wheel_declares_its_implementation(folder: Path, build: Build) -> None:
    declared = entry_points(build(folder))[PROVIDER_GROUP]
    assert declared == {project(folder)["name"]: f"{import_name(folder)}:register"}


@each_provider
def test_provider_wheel_declares_its_hook_in_a_module_beside_the_package(
    folder: Path, build: Build
) -> None:
    declared = entry_points(build(folder))[HOOK_GROUP]
    assert declared == {project(folder)["name"]: f"{import_name(folder)}_autoload:autoload"}


@each_provider
def test_a_providers_hook_is_loaded_with_nothing_else_of_its_wheel(
    folder: Path, build: Build
) -> None:
    out = run_python(
        "-I",
        "-S",
        wheels=[build(folder)],
        code=f"before = set(sys.modules); import {import_name(folder)}_autoload as hook\n"
        "hook.autoload()\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(tops - sys.stdlib_module_names))",
    )
    assert out.strip() == f"['{import_name(folder)}_autoload']"


def test_core_wheel_has_no_hook_but_a_command(build: Build) -> None:
    declared = entry_points(build(CORE))
    assert declared == {"console_scripts": {"flash-attention": "flash_attention_registry.cli:main"}}


@each_provider
def test_provider_registers_without_loading_torch(folder: Path, build: Build) -> None:
    name = project(folder)["name"]
    out = run_python(
        "-I",
        "-S",
        wheels=[build(CORE), build(folder)],
        code=f"import flash_attention_registry as registry, {import_name(folder)} as provider\n"
        "provider.register()\n"
        "print(registry.list_flash_attention_impls(), {'torch', 'triton'} & set(sys.modules))",
    )
    assert out.strip() == f"['{name}'] set()"


def test_pytest_plugin_of_the_testkit_loads_no_torch(build: Build) -> None:
    testkit = ROOT / "packages/testkit"
    declared = entry_points(build(testkit))["pytest11"]
    assert declared == {"flash_attention_testkit": "flash_attention_testkit.plugin"}
    out = run_python(
        "-I",
        wheels=[build(CORE), build(testkit)],
        code="import flash_attention_testkit.plugin as plugin\n"
        "print(plugin.__file__, {'torch', 'triton', 'numpy'} & set(sys.modules))",
    )
    assert out.strip() == f"{build(testkit) / 'flash_attention_testkit/plugin.py'} set()"
