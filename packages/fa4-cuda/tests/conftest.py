"""The C ABI through ctypes, and builds of it that are kept between runs."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from ctypes import c_int32
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import pytest

from fa4_cuda.library import (
    FUNCTIONS,
    BackwardArgs,
    BackwardPlan,
    ForwardArgs,
    ForwardPlan,
    TensorArg,
)

PACKAGE = Path(__file__).parents[1]
CSRC = PACKAGE / "src" / "fa4_cuda" / "csrc"
PLANNERS = [CSRC / "plan.cpp", CSRC / "backward_plan.cpp"]
CACHE = PACKAGE.parents[1] / ".cache" / "fa4-cuda"

Row = TypeVar("Row", bound=ctypes.Structure)


class ForwardTile(ctypes.Structure):
    """fa4_forward_tile."""

    _fields_ = tuple(
        (name, c_int32)
        for name in (
            *("head_dim", "mask", "block_m", "block_n"),
            *("q_stages", "kv_stages", "shared_bytes"),
        )
    )


class BackwardTile(ctypes.Structure):
    """fa4_backward_tile."""

    _fields_ = tuple(
        (name, c_int32)
        for name in (
            *("head_dim", "mask", "split", "block_m", "block_n"),
            *("q_stages", "do_stages", "k_stages", "v_stages"),
            *("shared_bytes", "query_shared_bytes"),
        )
    )


class Planner:
    """The host side of the library, without CUDA."""

    tensor = TensorArg

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.library.fa4_error_string.restype = ctypes.c_char_p

    def tiles(self) -> list[ForwardTile]:
        """The tile table."""
        return self._table(self.library.fa4_forward_tile_at, ForwardTile)

    def backward_tiles(self) -> list[BackwardTile]:
        """The tile table of the backward."""
        return self._table(self.library.fa4_backward_tile_at, BackwardTile)

    @staticmethod
    def _table(tile_at: Any, row: type[Row]) -> list[Row]:
        found: list[Row] = []
        while True:
            tile = row()
            if tile_at(len(found), ctypes.byref(tile)) != 0:
                return found
            found.append(tile)

    def plan(self, multiprocessors: int = 132, **changes: Any) -> tuple[int, ForwardPlan]:
        """Status and plan of a dense bf16 call, [2, 1024, 16, 128] unless changed."""
        args, plan = ForwardArgs(lse=4096), ForwardPlan()
        self._describe(args, ("q", "out"), ("k", "v"), changes)
        status = self.library.fa4_plan_forward(
            ctypes.byref(args), multiprocessors, ctypes.byref(plan)
        )
        return status, plan

    def plan_backward(self, multiprocessors: int = 132, **changes: Any) -> tuple[int, BackwardPlan]:
        """Likewise of its backward."""
        args, plan = BackwardArgs(lse=4096), BackwardPlan()
        self._describe(args, ("q", "out", "grad_out", "dq"), ("k", "v", "dk", "dv"), changes)
        status = self.library.fa4_plan_backward(
            ctypes.byref(args), multiprocessors, ctypes.byref(plan)
        )
        return status, plan

    def _describe(
        self,
        args: ForwardArgs | BackwardArgs,
        queries: tuple[str, ...],
        keys: tuple[str, ...],
        changes: dict[str, Any],
    ) -> None:
        sizes: dict[str, Any] = {
            "element": 1,
            "batch": 2,
            "heads_q": 16,
            "heads_k": changes.get("heads_q", 16),
            "head_dim": 128,
            "seq_q": 1024,
            "seq_k": changes.get("seq_q", 1024),
            "window_left": -1,
            "window_right": -1,
            "scale": 1.0,
            **changes,
        }
        for name in queries + keys:
            heads = sizes["heads_q" if name in queries else "heads_k"]
            seq = sizes["seq_q" if name in queries else "seq_k"]
            row = heads * sizes["head_dim"]
            tensor = TensorArg(4096, max(seq, 1) * row, row, sizes["head_dim"])
            setattr(args, name, changes.get(name, tensor))
        for name, value in sizes.items():
            setattr(args, name, value)


def load_script(path: Path) -> ModuleType:
    """A file that is no module of the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest(*paths: Path) -> str:
    """Names a build by what it is made of."""
    content = hashlib.sha256()
    for path in sorted(paths):
        content.update(path.name.encode() + path.read_bytes())
    return content.hexdigest()[:16]


@pytest.fixture(scope="session")
def build_kernels() -> ModuleType:
    """The build script."""
    return load_script(PACKAGE / "build_kernels.py")


@pytest.fixture(scope="session")
def planner() -> Planner:
    """The planners alone, by the host compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = CACHE / f"libplan-{digest(*PLANNERS, *CSRC.glob('*.h'))}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        subprocess.run([*command, *map(str, PLANNERS), "-o", str(library)], check=True)
    return Planner(ctypes.CDLL(str(library)))


CompileHost = Callable[..., Path]


@pytest.fixture(scope="session")
def compile_host() -> CompileHost:
    """Compile a program that runs device code on the host: `compile_host(source, folder, *flags)`.

    What the folder has stands for headers of the toolkit, of which little is needed.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")

    def compiled(source: Path, folder: Path, *flags: str) -> Path:
        (folder / "cuda.h").write_text("struct CUtensorMap {};")
        command = [compiler, "-std=c++20", "-Wno-unknown-pragmas", *flags, f"-I{folder}"]
        subprocess.run([*command, str(source), "-o", str(folder / source.stem)], check=True)
        return folder / source.stem

    return compiled


@pytest.fixture(scope="session")
def kernels(build_kernels: ModuleType) -> Path:
    """The library. Compiling takes minutes, so it is not done here."""
    if not build_kernels.is_current():
        pytest.skip("the kernels are not compiled as they are now: hatch run build-cuda")
    return Path(build_kernels.LIBRARY)


@pytest.fixture(scope="session")
def reports(kernels: Path, build_kernels: ModuleType) -> list[Any]:
    """What ptxas says of every kernel."""
    return list(build_kernels.reports())


@pytest.fixture(scope="session")
def on_cpu() -> ctypes.CDLL:
    """The glue and the planner, by the host compiler, with a CPU for a GPU (cpu_device.cpp)."""
    pytest.importorskip("torch")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    glue = CSRC / "glue"
    sources = [path for path in sorted(glue.glob("*.cpp")) if path.stem != "devices"]
    sources += [*PLANNERS, Path(__file__).with_name("cpu_device.cpp")]
    headers = [*CSRC.glob("*.h"), *glue.glob("*.h")]
    target = CACHE / f"libcpu-{digest(*sources, *headers)}.so"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        flags += ["-fvisibility=hidden", "-Wl,-z,defs", f"-I{CSRC}", "-o", str(target)]
        subprocess.run([compiler, *flags, *map(str, sources)], check=True)
    found = ctypes.CDLL(str(target))
    for name, result, parameters in FUNCTIONS:
        if name != "fa4_driver_version":
            function = getattr(found, name)
            function.restype, function.argtypes = result, parameters
    return found


@pytest.fixture(scope="session")
def native(on_cpu: ctypes.CDLL) -> Any:
    """Its native kernels; one object, as in every process, since it counts for ever."""
    from fa4_cuda.native import NativeOps

    return NativeOps(library=lambda: on_cpu)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch, on_cpu: ctypes.CDLL) -> Any:
    """The kernel set, with a CPU for a Hopper: called directly, or installed."""
    import torch

    from fa4_cuda import kernel_set, library

    found = dataclasses.replace(
        kernel_set.CAPABILITIES,
        device_types=frozenset({"cpu"}),
        min_compute_capability=None,
        max_compute_capability=None,
    )
    monkeypatch.setattr(kernel_set, "CAPABILITIES", found)
    for module in (kernel_set, library):
        monkeypatch.setattr(module, "load", lambda: on_cpu)
    monkeypatch.setattr(kernel_set, "_multiprocessors", lambda _device: 132)
    stream = SimpleNamespace(cuda_stream=None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: stream)
    on_cpu.fa4_torch_find()
    on_cpu.pretend(0)
    return kernel_set.CudaKernels()
