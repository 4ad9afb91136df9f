"""The wheel and the source distribution, as their users get them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = Path(__file__).parents[1]


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module


def hatchling(
    *arguments: str, folder: Path = PACKAGE, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hatchling", "build", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def wheel(kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    done = hatchling("-t", "wheel", "-d", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    done = hatchling("-t", "sdist", "-d", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("*.tar.gz")
    return found


def test_one_wheel_is_for_every_python(wheel: Path) -> None:
    assert wheel.name.startswith("fa4_cuda-0.1.0-py3-none-linux_")


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 40 * 2**20


def test_wheel_holds_the_library_and_none_of_its_sources(wheel: Path, kernels: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read("fa4_cuda/lib/libfa4_cuda.so") == kernels.read_bytes()
    assert not [name for name in names if "csrc" in name or name.endswith((".cu", ".cpp", ".h"))]


def test_wheel_holds_nvidias_notice_and_terms(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (notice,) = (name for name in archive.namelist() if name.endswith("licenses/NOTICE"))
        (terms,) = (name for name in archive.namelist() if name.endswith("Toolkit-EULA.txt"))
        assert "libcudart_static" in archive.read(notice).decode()
        assert "libcudart_static.a" in archive.read(terms).decode()


def test_library_needs_no_torch_and_no_cuda(kernels: Path) -> None:
    listed = subprocess.run(["ldd", kernels], capture_output=True, text=True, check=True).stdout
    assert "libc.so.6" in listed
    assert not [
        line for line in listed.splitlines() if "torch" in line or "cuda" in line.split()[0]
    ]


def test_library_loads_without_torch(kernels: Path) -> None:
    program = (
        "import sys; from fa4_cuda.library import error_text, load; "
        "print(load().fa4_torch_find().decode(), error_text(5), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("aoti_torch_device_type_cuda unsupported device")
    assert done.stdout.endswith("False\n")


def test_source_distribution_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        *("build_kernels.py", "hatch_build.py", "NOTICE", "LICENSE"),
        *("src/fa4_cuda/csrc/api.cpp", "src/fa4_cuda/csrc/glue/dispatch.cpp"),
        "licenses/NVIDIA-CUDA-Toolkit-EULA.txt",
    }
    assert needed <= names
    assert not [name for name in names if name.endswith((".so", ".o"))]


def test_without_a_compiler_one_error_names_the_ways_out(tmp_path: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    # A compiler that is named is obeyed, so the machine's is not looked for.
    done = hatchling("-t", "wheel", folder=folder, CUDACXX=str(tmp_path / "none"))
    assert done.returncode != 0
    assert f"fa4-cuda cannot be built: {tmp_path / 'none'} cannot be run" in done.stderr


def test_where_no_compiler_is_found_the_error_names_the_ways_out(
    build_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_kernels, "find_nvcc", lambda: None)
    with pytest.raises(build_kernels.BuildError) as caught:
        build_kernels.build()
    for way in ("CUDA_HOME", "pip install --only-binary fa4-cuda", "pip install nvidia-cuda-nvcc"):
        assert way in str(caught.value)


@pytest.mark.parametrize(
    ("from_sdist", "has_nvcc", "asks"),
    [(True, False, True), (True, True, False), (False, False, False)],
    ids=["sdist without nvcc", "sdist with nvcc", "checkout"],
)
def test_nvidias_compiler_is_asked_for_where_there_is_none(
    from_sdist: bool, has_nvcc: bool, asks: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copy(PACKAGE / "build_kernels.py", tmp_path)
    if from_sdist:
        (tmp_path / "PKG-INFO").touch()
    hook_module = load_script(PACKAGE / "hatch_build.py")
    hook = object.__new__(hook_module.CudaBuildHook)
    kernels = load_script(tmp_path / "build_kernels.py")
    monkeypatch.setattr(kernels, "find_nvcc", lambda: Path("nvcc") if has_nvcc else None)
    monkeypatch.setattr(hook_module.CudaBuildHook, "root", str(tmp_path), raising=False)
    monkeypatch.setattr(hook_module.CudaBuildHook, "_kernels", lambda self: kernels)
    assert hook.dependencies() == (list(kernels.COMPILER_WHEELS) if asks else [])


def test_what_has_not_changed_is_not_compiled_again(
    kernels: Path, build_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kernels.stat().st_mtime_ns
    assert build_kernels.build() == []
    assert kernels.stat().st_mtime_ns == before


def test_a_file_that_changes_makes_what_includes_it_stale(
    build_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources, build = tmp_path / "csrc", tmp_path / "build"
    sources.mkdir()
    build.mkdir()
    monkeypatch.setattr(build_kernels, "SOURCES", sources)
    monkeypatch.setattr(build_kernels, "BUILD", build)
    for name in ("one", "two"):
        (sources / f"{name}.cpp").write_text("int x;")
        (build / f"{name}.cpp.o").touch()
    header = sources / "header.h"
    header.write_text("// first")
    (build / "one.cpp.d").write_text(f"one.o: {sources / 'one.cpp'} \\\n {header} /usr/include/x.h")
    (build / "two.cpp.d").write_text(f"two.o: {sources / 'two.cpp'}")

    def stale(compiler: str = "nvcc 13") -> list[str]:
        found = [
            source
            for source in build_kernels.sources()
            if not build_kernels._is_current(source, compiler)
        ]
        return sorted(source.stem for source in found)

    assert stale() == ["one", "two"]
    for source in build_kernels.sources():
        stamp = build_kernels._stamp(source, "nvcc 13")
        (build / f"{source.name}.stamp").write_text(stamp)
    assert stale() == []
    header.write_text("// second")
    assert stale() == ["one"]
    assert stale("nvcc 14") == ["one", "two"]
    (build / "two.cpp.o").unlink()
    assert stale() == ["one", "two"]


def test_a_file_that_changes_while_it_is_compiled_is_compiled_again(
    build_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "one.cpp"
    source.write_text("int x;")
    monkeypatch.setattr(build_kernels, "SOURCES", tmp_path)
    monkeypatch.setattr(build_kernels, "BUILD", tmp_path)
    edits = ["int y;", None]

    def compile_it(_: list[str]) -> str:
        (tmp_path / "one.cpp.o").touch()
        (tmp_path / "one.cpp.d").write_text(f"one.o: {source}")
        text = edits.pop(0)
        if text is not None:
            source.write_text(text)
            later = time.time() + 1
            os.utime(source, (later, later))
        return ""

    monkeypatch.setattr(build_kernels, "_run", compile_it)
    build_kernels._compile(Path("nvcc"), source, "nvcc 13")
    assert not build_kernels._is_current(source, "nvcc 13")
    os.utime(source)
    build_kernels._compile(Path("nvcc"), source, "nvcc 13")
    assert build_kernels._is_current(source, "nvcc 13")


def test_a_variant_is_compiled_beside_what_is_shipped(
    build_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources, build = tmp_path / "csrc", tmp_path / "build"
    sources.mkdir()
    source = sources / "one.cpp"
    source.write_text("int x;")
    commands: list[list[str]] = []

    def compile_it(command: list[str]) -> str:
        commands.append(command)
        if "-c" in command:
            Path(command[command.index("-o") + 1]).touch()
            Path(command[command.index("-MF") + 1]).write_text(f"one.o: {source}")
        return ""

    for name, value in {"SOURCES": sources, "BUILD": build, "_run": compile_it}.items():
        monkeypatch.setattr(build_kernels, name, value)
    monkeypatch.setattr(build_kernels, "find_nvcc", lambda: Path("nvcc"))
    variant = build_kernels.Variant(("ONE", "TWO"))
    assert build_kernels.compile_sources([source], variant=variant) == [source]
    assert {"-DONE", "-DTWO"} <= set(commands[-1])
    assert build_kernels.compile_sources([source], variant=variant) == []
    assert variant.library.parent == build / "ONE+TWO"
    # What is shipped is not there yet, and knows nothing of these names.
    assert build_kernels.compile_sources([source]) == [source]
    assert not {"-DONE", "-DTWO"} & set(commands[-1])
    assert build_kernels.SHIPPED.library == build_kernels.LIBRARY
