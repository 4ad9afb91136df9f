"""The compiled kernels keep their promises: what the compiler says of them, and what is in them."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

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


def test_no_kernel_spills(kernels: tuple[Path, str], build_kernels: ModuleType) -> None:
    reports = build_kernels.parse_ptxas(kernels[1])
    spilling = [r for r in reports if r.spill_bytes or r.stack_bytes]
    assert reports
    assert not spilling


def test_every_tile_is_compiled_for_both_types(kernels, planner, build_kernels) -> None:
    names = [r.name for r in build_kernels.parse_ptxas(kernels[1])]
    forward = [name for name in names if "forward_kernel" in name]
    assert len(forward) == 2 * len(planner.tiles())


def test_register_demand_fits_the_launch(kernels, build_kernels) -> None:
    # setmaxnreg moves registers between warp groups: at launch they must all fit into 65536.
    for report in build_kernels.parse_ptxas(kernels[1]):
        if "forward_kernel" in report.name:
            assert report.registers in (128, 168)  # 512 and 384 threads


def test_no_serialised_products(kernels) -> None:
    # C7510 to C7520: ptxas had to wait after every wgmma.
    assert not re.findall(r"C75[12]\d", kernels[1])


def test_products_run_on_wgmma_and_nothing_goes_through_local_memory(kernels) -> None:
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    dump = subprocess.run(
        [cuobjdump, "--dump-sass", str(kernels[0])], capture_output=True, text=True, check=True
    ).stdout
    functions = dump.split("Function :")[1:]
    forward = [text for text in functions if "forward_kernel" in text.split("\n", 1)[0]]
    assert forward
    for text in forward:
        assert "HGMMA.64x" in text
        assert "UTMALDG" in text
        assert not re.search(r"\b(LDL|STL)\b", text)


def test_library_is_small(kernels) -> None:
    assert kernels[0].stat().st_size < 20 * 2**20


def test_library_loads_and_reports_errors_without_a_gpu(kernels) -> None:
    library = ctypes.CDLL(str(kernels[0]))
    library.fa4_error_string.restype = ctypes.c_char_p
    assert library.fa4_abi_version() == 1
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


def test_failing_compiler_is_quoted(build_kernels: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(build_kernels.BuildError, match="exit status 1"):
        build_kernels.build(tmp_path / "library.so", Path("/bin/false"))
