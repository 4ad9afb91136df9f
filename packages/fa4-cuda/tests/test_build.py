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


def of_kernel(name: str, reports: list[Any]) -> list[Any]:
    found = [report for report in reports if name in report.name]
    assert found
    return found


@pytest.fixture(scope="module")
def sass(kernels: Path) -> list[str]:
    """The instructions of every kernel, after a line with its name."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    command = [cuobjdump, "--dump-sass", str(kernels)]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dump.split("Function :")[1:]


def sass_of(name: str, sass: list[str]) -> list[str]:
    found = [text for text in sass if name in text.split("\n", 1)[0]]
    assert found
    return found


MAY_SPILL = [f"backward_kernelILi{tile}E" for tile in (4, 5)]
"""The backward at head_dim 128 gives its consumers 240 registers and leaves 24 to those who load
and store. They wait for memory all the time: a few of theirs may lie there too."""


def test_no_kernel_spills(reports: list[Any]) -> None:
    assert reports
    spilling = [report for report in reports if report.spill_bytes or report.stack_bytes]
    for report in spilling:
        assert any(name in report.name for name in MAY_SPILL), report
        assert report.spill_bytes <= 128


def test_steps_of_the_backward_touch_no_spilled_register(sass: list[str]) -> None:
    for text in sass_of("backward_kernel", sass):
        lines = text.split("\n")
        # From the first product of a step's dQ to the last: the steady loop, and what follows it.
        products = [i for i, line in enumerate(lines) if "HGMMA" in line and ".tnspA" in line]
        steps = lines[products[0] : products[-1]]
        assert not [line for line in steps if " LDL" in line or " STL" in line]


def test_every_tile_is_compiled_for_both_types(reports: list[Any], planner: Any) -> None:
    assert len(of_kernel("forward_kernel", reports)) == 2 * len(planner.tiles())
    assert len(of_kernel("backward_kernel", reports)) == 2 * len(planner.backward_tiles())


def test_every_head_dim_of_the_backward_has_its_rows_prepared_and_finished(
    reports: list[Any], planner: Any
) -> None:
    head_dims = {tile.head_dim for tile in planner.backward_tiles()}
    for kernel in ("backward_prepare", "backward_finish"):
        assert len(of_kernel(kernel, reports)) == 2 * len(head_dims)


def test_registers_of_a_thread_block_fit_the_multiprocessor(reports: list[Any]) -> None:
    # 65536 of them, at launch evenly for 512 or 384 threads; setmaxnreg moves them later.
    assert {report.registers for report in of_kernel("forward_kernel", reports)} <= {128, 168}
    assert {report.registers for report in of_kernel("backward_kernel", reports)} == {168}


def test_kernels_that_go_by_rows_leave_room_for_enough_of_them(reports: list[Any]) -> None:
    # Four thread blocks of 128 at least, which load 16 bytes a thread and more ahead.
    for kernel in ("backward_prepare", "backward_finish"):
        assert all(report.registers <= 128 for report in of_kernel(kernel, reports))


def test_no_serialised_products(kernels: Path, build_kernels: ModuleType) -> None:
    # C7510 to C7520: ptxas had to wait after every wgmma.
    texts = [file.read_text() for file in build_kernels.BUILD.glob("*.ptxas")]
    for kernel in ("forward_kernel", "backward_kernel"):
        assert any(kernel in text for text in texts)
    assert not re.findall(r"C75[12]\d", "".join(texts))


def test_products_run_on_wgmma(sass: list[str]) -> None:
    for text in sass_of("forward_kernel", sass) + sass_of("backward_kernel", sass):
        assert "HGMMA.64x" in text
        assert "UTMALDG" in text


def test_nothing_goes_through_local_memory(sass: list[str]) -> None:
    for text in sass:
        name = text.split("\n", 1)[0]
        if not any(spilling in name for spilling in MAY_SPILL):
            assert not re.search(r"\b(LDL|STL)\b", text), name


@pytest.mark.parametrize(
    ("instruction", "purpose"),
    [
        (r"HGMMA\S+ [^;]*tnspA\.tnspB", "dQ = dS K reads dS^T and K by columns"),
        (r"HGMMA\S+ [^;]*\.tnspB, R\d+", "dV += P^T dO and dK += dS^T Q read dO and Q by columns"),
        (r"HGMMA\S+ R\d+, gdesc\[UR\d+\], ", "S and dP read rows"),
        (r"UTMALDG\.4D", "tiles come by the copy engine"),
        (r"UBLKCP\.S\.G", "and so do lse and delta"),
        (r"STSM\.16\.M88\.4", "dS goes to shared memory by matrices"),
        (r"REDG\S*F32x4|UBLKRED", "dQ is added up in float32, 16 bytes at a time or more"),
        (r"USETMAXREG", "registers go to who computes"),
        (r"MAX_?\S*NAN|MNMX\S*NAN", "gradients that come out NaN are noticed"),
    ],
)
def test_instructions_of_the_backward(sass: list[str], instruction: str, purpose: str) -> None:
    for text in sass_of("backward_kernel", sass):
        assert re.search(instruction, text), f"{purpose}: {text.split(chr(10), 1)[0]}"


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
