"""Compiles ``src/fa4_cuda/csrc`` into one shared library with a C ABI.

Needs nvcc (CUDA 12.8 or newer: C++20 and sm_90a) and a host compiler; no torch, no GPU. Standard library only, because
build backends import it. ``python build_kernels.py OUTPUT`` builds by hand.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "src" / "fa4_cuda" / "csrc"

COMPILE_FLAGS = (
    "-std=c++20",
    "-O3",
    # Device code calls constexpr functions of the tile table.
    "--expt-relaxed-constexpr",
    # The "a": wgmma and setmaxnreg exist for this architecture only, and there is no forward-compatible PTX.
    "-gencode=arch=compute_90a,code=sm_90a",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
)
LINK_FLAGS = ("-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", "-Xlinker=-s")


class BuildError(RuntimeError):
    """The compiler failed; the message has its command and output."""


@dataclass(frozen=True)
class KernelReport:
    """What ptxas says of one kernel."""

    name: str
    """Its mangled name."""
    registers: int
    """Per thread, at launch."""
    stack_bytes: int
    spill_bytes: int
    """Stores and loads together."""


def find_nvcc() -> Path | None:
    """The compiler: ``$CUDACXX``, then CUDA_HOME and CUDA_PATH, ``PATH``, and NVIDIA's wheels."""
    if explicit := os.environ.get("CUDACXX"):
        return Path(explicit)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        root = os.environ.get(variable)
        if root and (nvcc := Path(root) / "bin" / "nvcc").exists():
            return nvcc
    if found := shutil.which("nvcc"):
        return Path(found)
    try:
        import nvidia.cu13 as wheel  # a namespace package, of the wheel nvidia-cuda-nvcc
    except ImportError:
        return None
    nvcc = Path(next(iter(wheel.__path__))) / "bin" / "nvcc"
    return nvcc if nvcc.exists() else None


def sources(directory: Path = SOURCES) -> list[Path]:
    """What is compiled, the slowest first."""
    files = [*directory.glob("*.cpp"), *directory.glob("*.cu")]
    return sorted(files, key=lambda file: (file.suffix != ".cu", -_head_dim(file), file.name))


def _head_dim(file: Path) -> int:
    found = re.search(r"_d(\d+)$", file.stem)
    return int(found[1]) if found else 0


def parse_ptxas(text: str) -> list[KernelReport]:
    """The kernels in the output of ``ptxas -v``, in its order."""
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


def build(output: Path, nvcc: Path, *, jobs: int | None = None, directory: Path = SOURCES) -> str:
    """Compile and link ``output``; returns what the compiler said (``parse_ptxas`` reads it).

    Raises:
        BuildError: The compiler failed.
    """
    jobs = jobs or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        files = sources(directory)
        objects = [Path(folder) / f"{file.name}.o" for file in files]

        def compile_one(pair: tuple[Path, Path]) -> str:
            file, target = pair
            return _run([str(nvcc), *COMPILE_FLAGS, "-c", str(file), "-o", str(target)])

        with ThreadPoolExecutor(jobs) as pool:
            logs = list(pool.map(compile_one, zip(files, objects, strict=True)))
        # Wheels of the compiler keep the runtime library beside it.
        library = nvcc.parents[1] / "lib"
        search = [f"-L{library}"] if library.is_dir() else []
        output.parent.mkdir(parents=True, exist_ok=True)
        logs.append(_run([str(nvcc), *LINK_FLAGS, *search, "-o", str(output), *map(str, objects)]))
    return "".join(logs)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    if done.returncode:
        raise BuildError(f"exit status {done.returncode}: {' '.join(command)}\n{text}")
    return text


def main() -> None:
    """Build by hand."""
    if len(sys.argv) != 2:
        sys.exit("usage: python build_kernels.py OUTPUT.so")
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("nvcc was not found: set CUDACXX or CUDA_HOME, or put it on PATH")
    log = build(Path(sys.argv[1]), nvcc)
    for kernel in parse_ptxas(log):
        print(f"{kernel.registers:4} registers {kernel.spill_bytes:4} bytes spilled  {kernel.name}")


if __name__ == "__main__":
    main()
