"""The compiled kernels keep their promises: what the compiler says of them, and what is in them."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fa4_cuda.library import ABI_VERSION

CSRC = Path(__file__).parents[1] / "src" / "fa4_cuda" / "csrc"


def find_cuobjdump() -> str | None:
    """On PATH, or in Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(tool) if tool.exists() else None


def test_no_kernel_spills(reports: list[Any]) -> None:
    assert reports
    assert not [report for report in reports if report.spill_bytes or report.stack_bytes]


def test_every_tile_is_compiled_for_both_types(reports: list[Any], planner: Any) -> None:
    forward = [report for report in reports if "forward_kernel" in report.name]
    assert len(forward) == 2 * len(planner.tiles())


def test_registers_of_a_thread_block_fit_the_multiprocessor(reports: list[Any]) -> None:
    # 65536 of them, at launch evenly for 512 or 384 threads; setmaxnreg moves them later.
    forward = [report for report in reports if "forward_kernel" in report.name]
    assert {report.registers for report in forward} <= {128, 168}


def test_no_serialised_products(kernels: Path, build_kernels: ModuleType) -> None:
    # C7510 to C7520: ptxas had to wait after every wgmma.
    texts = [file.read_text() for file in build_kernels.BUILD.glob("*.ptxas")]
    assert any("forward_kernel" in text for text in texts)
    assert not re.findall(r"C75[12]\d", "".join(texts))


def test_products_run_on_wgmma_and_nothing_goes_through_local_memory(kernels: Path) -> None:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    dump = subprocess.run(
        [cuobjdump, "--dump-sass", str(kernels)], capture_output=True, text=True, check=True
    ).stdout
    functions = dump.split("Function :")[1:]
    forward = [text for text in functions if "forward_kernel" in text.split("\n", 1)[0]]
    assert forward
    for text in forward:
        assert "HGMMA.64x" in text
        assert "UTMALDG" in text
        assert not re.search(r"\b(LDL|STL)\b", text)


def test_library_is_small(kernels: Path) -> None:
    assert kernels.stat().st_size < 20 * 2**20


def test_library_loads_and_reports_errors_without_a_gpu(kernels: Path) -> None:
    library = ctypes.CDLL(str(kernels))
    library.fa4_error_string.restype = ctypes.c_char_p
    assert library.fa4_abi_version() == ABI_VERSION
    assert b"multiples of 8" in library.fa4_error_string(2)


def test_instruction_header_is_what_its_script_writes() -> None:
    script = CSRC / "generate_wgmma.py"
    written = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True
    ).stdout
    assert (CSRC / "wgmma_instructions.cuh").read_text() == written


def test_report_is_read_off_the_compilers_words(build_kernels: ModuleType) -> None:
    text = (
        "ptxas info    : Compiling entry function '_Z1kPi' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Z1kPi\n"
        "    48 bytes stack frame, 60 bytes spill stores, 124 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers\n"
    )
    (report,) = build_kernels.parse_ptxas(text)
    assert (report.name, report.registers, report.stack_bytes) == ("_Z1kPi", 168, 48)
    assert report.spill_bytes == 184
