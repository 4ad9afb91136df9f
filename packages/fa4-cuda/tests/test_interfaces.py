"""What is declared twice is declared alike: torch's C interface, and ours in C and in ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from fa4_cuda.library import (
    ABI_VERSION,
    BackwardArgs,
    BackwardPlan,
    ForwardArgs,
    ForwardPlan,
    TensorArg,
)

CSRC = Path(__file__).parents[1] / "src/fa4_cuda/csrc"
STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "fa4_tensor": TensorArg,
    "fa4_forward_args": ForwardArgs,
    "fa4_forward_plan": ForwardPlan,
    "fa4_backward_args": BackwardArgs,
    "fa4_backward_plan": BackwardPlan,
}
PLACES = "\n".join(
    f"place({structure}, {name});"
    for structure, declared in STRUCTURES.items()
    for name, *_ in declared._fields_
)
SIZES = "\n".join(f'printf("%zu\\n", sizeof({structure}));' for structure in STRUCTURES)


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("g++")
    if found is None:
        pytest.skip("needs g++")
    return found


def test_torchs_functions_are_declared_as_in_its_headers(compiler: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    include = Path(torch.__file__).parent / "include"
    source = tmp_path / "compare.cpp"
    source.write_text("""
        #define USE_CUDA
        #include <torch/csrc/inductor/aoti_torch/c/shim.h>
        #include <torch/csrc/stable/c/shim.h>
        #include <type_traits>
        #include "glue/torch_api.h"
        #define COMPARE(result, name, parameters) \\
          static_assert(std::is_same_v<decltype(&::name), result(*) parameters>, #name);
        FA4_TORCH_FUNCTIONS(COMPARE)
        #if TORCH_FEATURE_VERSION >= (((0ULL + 2) << 56) | ((0ULL + 13) << 48))
        FA4_TORCH_OPTIONAL_FUNCTIONS(COMPARE)
        #endif
    """)
    flags = ["-std=c++20", "-fsyntax-only", f"-I{include}", f"-I{CSRC}"]
    done = subprocess.run([compiler, *flags, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torchs_base_of_exceptions_is_declared_as_in_its_header() -> None:
    """Up to the first virtual function that it adds, which is all that its handler calls."""
    torch = pytest.importorskip("torch")
    header = Path(torch.__file__).parent / "include/torch/csrc/Exceptions.h"
    text = header.read_text(encoding="utf-8")
    declared = text[text.index("struct PyTorchError : public std::exception {") :]
    virtual = [line.strip() for line in declared[: declared.index("};")].splitlines()]
    assert [line for line in virtual if line.startswith("virtual")] == [
        "virtual PyObject* python_type() = 0;"
    ]


def test_structures_are_laid_out_as_in_c(compiler: str, tmp_path: Path) -> None:
    source = tmp_path / "layout.c"
    source.write_text(f"""
        #include <stdio.h>
        #include "api.h"
        #define place(structure, field) \\
          printf("%s.%s %zu\\n", #structure, #field, offsetof(struct structure, field))
        int main(void) {{
          {PLACES}
          {SIZES}
          printf("%d\\n", FA4_ABI_VERSION);
        }}
    """)
    program = tmp_path / "layout"
    command = [compiler.replace("g++", "gcc"), f"-I{CSRC}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    expected = [
        f"{structure}.{name} {getattr(declared, name).offset}"
        for structure, declared in STRUCTURES.items()
        for name, *_ in declared._fields_
    ]
    sizes = [str(ctypes.sizeof(declared)) for declared in STRUCTURES.values()]
    assert found.splitlines() == [*expected, *sizes, str(ABI_VERSION)]
