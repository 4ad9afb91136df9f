"""Compile `src/fa4_cuda/csrc` into the one shared library of this package: `hatch run build-cuda`.

    python packages/fa4-cuda/build_kernels.py [OUTPUT] [--jobs N] [--define NAME ...]

Every source file becomes an object with a stamp beside it: a hash of the compiler, the flags, the
file and all that it includes from here. What has its stamp is not compiled again. Objects, stamps
and what ptxas reports of each kernel are in `build/`, the library is in `src/fa4_cuda/lib/`. With
names defined, which the sources ask for while a variant is on trial, all of it is in a folder of
`build/` with these names. Needs nothing but the standard library, nvcc and the host compiler that
nvcc calls; no torch, no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "src/fa4_cuda/csrc"
LIBRARY = ROOT / "src/fa4_cuda/lib/libfa4_cuda.so"
BUILD = ROOT / "build"

COMPILE_FLAGS = (
    "-std=c++20",
    "-O3",
    # Device code calls constexpr functions of the tile table.
    "--expt-relaxed-constexpr",
    # The "a": wgmma and setmaxnreg exist for this architecture only. No PTX: it would run on no
    # other GPU.
    "-gencode=arch=compute_90a,code=sm_90a",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall",
)
LINK_FLAGS = (
    "-shared",
    "-cudart=static",
    # Torch loads a CUDA runtime of its own: none of this one's symbols may be seen.
    "-Xlinker=--exclude-libs,ALL",
    # The library is loaded beside torch with and without CUDA: it may need neither.
    "-Xlinker=-z,defs",
    "-Xlinker=-s",
)

COMPILER_WHEELS = tuple(
    f"nvidia-{name}==13.0.*"
    for name in ("cuda-nvcc", "cuda-runtime", "cuda-crt", "cuda-cccl", "nvvm")
)
"""NVIDIA's, of one version: the compiler, its headers and the static runtime."""

NO_NVCC = f"""nvcc was not found (looked at $CUDACXX, $CUDA_HOME/bin, $CUDA_PATH/bin, PATH, \
/usr/local/cuda/bin and NVIDIA's wheel nvidia-cuda-nvcc). Do one of these:
  - install the wheel, which needs no compiler: pip install --only-binary fa4-cuda fa4-cuda
  - install a CUDA toolkit, 12.8 or newer, and set CUDA_HOME
  - install NVIDIA's compiler beside this Python: pip install {" ".join(COMPILER_WHEELS)}"""


class BuildError(Exception):
    """The library cannot be built; the message says why and what to do."""


class Variant(NamedTuple):
    """A choice of what the sources leave open.

    Attributes:
        defines: Preprocessor names, none for what is shipped.
    """

    defines: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where its objects are."""
        return BUILD / "+".join(self.defines)

    @property
    def library(self) -> Path:
        """Where it is linked to, unless told otherwise."""
        return self.folder / LIBRARY.name if self.defines else LIBRARY

    @property
    def flags(self) -> tuple[str, ...]:
        """Of the compiler."""
        return (*COMPILE_FLAGS, *(f"-D{name}" for name in self.defines))


SHIPPED = Variant()


class KernelReport(NamedTuple):
    """What ptxas says of one kernel.

    Attributes:
        name: Its mangled name.
        registers: Per thread, at launch.
        stack_bytes: Of a thread.
        spill_bytes: Stores and loads together.
    """

    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int


def find_nvcc() -> Path | None:
    """Return the compiler to use, or None if there is none."""
    named = os.environ.get("CUDACXX")
    if named:
        return Path(named)
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home) / "bin/nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    if on_path:
        places.append(Path(on_path))
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    try:
        import nvidia.cu13 as wheel  # the folder into which NVIDIA's wheels put the toolkit
    except ImportError:
        pass
    else:
        places += [Path(folder) / "bin/nvcc" for folder in wheel.__path__]
    return next((place for place in places if place.exists()), None)


def sources() -> list[Path]:
    """Return the files that become objects, those that take longest first."""
    files = [*SOURCES.rglob("*.cu"), *SOURCES.rglob("*.cpp")]
    return sorted(files, key=lambda file: (file.suffix != ".cu", -_head_dim(file), file))


def _head_dim(file: Path) -> int:
    found = re.search(r"_d(\d+)", file.stem)
    return int(found[1]) if found else 0


def build(
    output: Path | None = None, *, jobs: int | None = None, variant: Variant = SHIPPED
) -> list[Path]:
    """Compile what has changed and link it.

    Args:
        output: The library, by default that of the variant.
        jobs: How many files to compile at once, the number of processors by default.
        variant: Of the sources.

    Returns:
        The sources that were compiled.

    Raises:
        BuildError: There is no nvcc, or it failed.
    """
    compiled = compile_sources(sources(), jobs=jobs, variant=variant)
    _forget_objects_without_source(variant)
    _link(output or variant.library, variant)
    return compiled


def compile_sources(
    files: Iterable[Path], *, jobs: int | None = None, variant: Variant = SHIPPED
) -> list[Path]:
    """Compile those of `files` that have changed, without linking; arguments are those of `build`.

    Returns:
        The sources that were compiled.

    Raises:
        BuildError: There is no nvcc, or it failed.
    """
    nvcc = _nvcc()
    compiler = _compiler(nvcc, variant)
    variant.folder.mkdir(parents=True, exist_ok=True)
    stale = [source for source in files if not _is_current(source, compiler, variant)]
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda source: _compile(nvcc, source, compiler, variant), stale))
    return stale


def is_current() -> bool:
    """Return whether the library is there and, where that can be told, what `build` would make."""
    nvcc = find_nvcc()
    if nvcc is None or not LIBRARY.exists():
        return LIBRARY.exists()
    compiler = _compiler(nvcc, SHIPPED)
    return all(_is_current(source, compiler) for source in sources())


def ptxas_output(source: Path, variant: Variant = SHIPPED) -> str:
    """Return what ptxas said of a file's kernels when it was compiled."""
    return _beside(source, ".ptxas", variant).read_text(encoding="utf-8")


def object_of(source: Path, variant: Variant = SHIPPED) -> Path:
    """Return the object that a file becomes."""
    return _beside(source, ".o", variant)


def reports(variant: Variant = SHIPPED) -> list[KernelReport]:
    """Return what ptxas said of every kernel when it was compiled."""
    texts = [ptxas_output(source, variant) for source in sources()]
    return [report for text in texts for report in parse_ptxas(text)]


def parse_ptxas(text: str) -> list[KernelReport]:
    """Return the kernels in the output of `ptxas -v`, in its order."""
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return [
        KernelReport(
            name=found["name"],
            registers=int(found["registers"]),
            stack_bytes=int(found["stack"]),
            spill_bytes=int(found["stores"]) + int(found["loads"]),
        )
        for found in entry.finditer(text)
    ]


def _nvcc() -> Path:
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(NO_NVCC)
    return nvcc


def _compiler(nvcc: Path, variant: Variant) -> str:
    """Return what every object of a variant depends on."""
    return _run([str(nvcc), "--version"]) + "\0".join(variant.flags)


def _beside(source: Path, suffix: str, variant: Variant = SHIPPED) -> Path:
    """Return the path in `build/` of what belongs to `source`."""
    return variant.folder / f"{'.'.join(source.relative_to(SOURCES).parts)}{suffix}"


def _forget_objects_without_source(variant: Variant) -> None:
    known = {object_of(source, variant) for source in sources()}
    for left in variant.folder.glob("*.o"):
        if left not in known:
            left.unlink()


def _stamp(source: Path, compiler: str, variant: Variant = SHIPPED) -> str | None:
    """Return what the object of `source` depends on, as a hash, or None if that is not known."""
    try:
        return _hash_of([compiler], _included(source, variant))
    except FileNotFoundError:
        return None


def _included(source: Path, variant: Variant) -> list[Path]:
    """Return `source` and all that it includes from here, as the compiler found it."""
    text = _beside(source, ".d", variant).read_text(encoding="utf-8")
    # A make rule: `target: file file \` and so on. Of the toolkit's files its version speaks.
    named = text.partition(":")[2].replace("\\\n", " ").split()
    included = {Path(name).resolve() for name in named}
    return sorted(path for path in included if path.is_relative_to(SOURCES))


def _hash_of(texts: Iterable[str], files: Iterable[Path]) -> str:
    digest = hashlib.sha256("\0".join(texts).encode())
    for path in files:
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def _is_current(source: Path, compiler: str, variant: Variant = SHIPPED) -> bool:
    stamp = _beside(source, ".stamp", variant)
    return (
        object_of(source, variant).exists()
        and stamp.exists()
        and stamp.read_text(encoding="utf-8") == _stamp(source, compiler, variant)
    )


def _compile(nvcc: Path, source: Path, compiler: str, variant: Variant = SHIPPED) -> None:
    recorded = _beside(source, ".stamp", variant)
    recorded.unlink(missing_ok=True)
    start, now = time.monotonic(), time.time()
    dependencies = ["-MD", "-MF", str(_beside(source, ".d", variant))]
    target = ["-c", str(source), "-o", str(object_of(source, variant))]
    report = _run([str(nvcc), *variant.flags, *dependencies, *target])
    _beside(source, ".ptxas", variant).write_text(report, encoding="utf-8")
    # What was edited while the compiler read it counts as not compiled.
    edited = any(path.stat().st_mtime > now for path in _included(source, variant))
    stamp = "" if edited else _stamp(source, compiler, variant) or ""
    recorded.write_text(stamp, encoding="utf-8")
    print(f"{time.monotonic() - start:6.1f} s  {source.relative_to(SOURCES)}", flush=True)


def _link(output: Path, variant: Variant) -> None:
    nvcc = _nvcc()
    stamps = [
        _beside(source, ".stamp", variant).read_text(encoding="utf-8") for source in sources()
    ]
    stamp = _hash_of([_compiler(nvcc, variant), *LINK_FLAGS, str(output), *stamps], [])
    recorded = variant.folder / "library.stamp"
    if output.exists() and recorded.exists() and recorded.read_text(encoding="utf-8") == stamp:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    # Wheels of the compiler keep the runtime library where nvcc does not look.
    beside = [f"-L{folder}" for folder in [nvcc.resolve().parents[1] / "lib"] if folder.is_dir()]
    # Linked beside its place and moved there: a process may have the old one loaded.
    made = output.with_suffix(".new")
    objects = [str(object_of(source, variant)) for source in sources()]
    _run([str(nvcc), *LINK_FLAGS, *beside, "-o", str(made), *objects])
    made.replace(output)
    recorded.write_text(stamp, encoding="utf-8")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode != 0:
        raise BuildError(
            f"{command[0]} failed with status {done.returncode}:\n{' '.join(command)}\n"
            f"{done.stdout}{done.stderr}"
        )
    return done.stdout + done.stderr


def main() -> int:
    """Build, and say what was done; return the exit status."""
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels of fa4-cuda.")
    parser.add_argument("output", nargs="?", type=Path, help="the library")
    parser.add_argument("--jobs", type=int, help="files to compile at once")
    parser.add_argument(
        "--define", action="append", default=[], metavar="NAME", help="what the sources ask for"
    )
    options = parser.parse_args()
    variant = Variant(tuple(sorted(options.define)))
    output = options.output or variant.library
    start = time.monotonic()
    try:
        compiled = build(output, jobs=options.jobs, variant=variant)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    for kernel in reports(variant):
        if kernel.spill_bytes or kernel.stack_bytes:
            print(f"{kernel.spill_bytes} bytes spilled by {kernel.name}")
    size = output.stat().st_size / 2**20
    print(f"{output.name}: {size:.1f} MiB, {len(compiled)} of {len(sources())} files compiled")
    print(f"{time.monotonic() - start:6.1f} s  in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
