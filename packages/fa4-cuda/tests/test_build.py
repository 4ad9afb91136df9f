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


BY_GRADIENTS = 1
"""The split of tiles whose dQ has a kernel of its own."""


@pytest.fixture(scope="module")
def summing_sass(sass: list[str], planner: Any) -> list[str]:
    """The instructions of the backward's main kernels that sum dQ."""
    tiles = enumerate(planner.backward_tiles())
    names = [f"backward_kernelILi{row}E" for row, tile in tiles if tile.split != BY_GRADIENTS]
    return [text for name in names for text in sass_of(name, sass)]


@pytest.fixture(scope="module")
def wide_sass(sass: list[str], planner: Any) -> list[str]:
    """The instructions of the backward's kernels where dQ has one of its own."""
    tiles = enumerate(planner.backward_tiles())
    rows = [row for row, tile in tiles if tile.split == BY_GRADIENTS]
    kernels = ("backward_kernelILi{}E", "backward_query_kernelILi{}E")
    return [text for row in rows for name in kernels for text in sass_of(name.format(row), sass)]


MAY_SPILL = [f"backward_kernelILi{tile}E" for tile in (4, 5)]
"""The backward at head_dim 128 gives its consumers 240 registers and leaves 24 to those who load
and store. They wait for memory all the time: some of theirs may lie there too, most of them of what
is done once a tile."""


def test_no_kernel_spills(reports: list[Any]) -> None:
    assert reports
    spilling = [report for report in reports if report.spill_bytes or report.stack_bytes]
    for report in spilling:
        assert any(name in report.name for name in MAY_SPILL), report
        assert report.spill_bytes <= 128


def test_steps_of_the_backward_touch_no_spilled_register(summing_sass: list[str]) -> None:
    for text in summing_sass:
        lines = text.split("\n")
        # From the first product of a step's dQ to the last: the steady loop, and what follows it.
        products = [i for i, line in enumerate(lines) if "HGMMA" in line and ".tnspA" in line]
        steps = lines[products[0] : products[-1]]
        assert not [line for line in steps if " LDL" in line or " STL" in line]


def test_every_tile_is_compiled_for_both_types(reports: list[Any], planner: Any) -> None:
    assert len(of_kernel("forward_kernel", reports)) == 2 * len(planner.tiles())
    tiles = planner.backward_tiles()
    assert len(of_kernel("backward_kernel", reports)) == 2 * len(tiles)
    with_dq_kernel = [tile for tile in tiles if tile.split == BY_GRADIENTS]
    found = [report for report in reports if "backward_query_kernel" in report.name]
    assert len(found) == 2 * len(with_dq_kernel)


def test_every_head_dim_of_the_backward_has_its_rows_prepared_and_finished(
    reports: list[Any], planner: Any
) -> None:
    tiles = planner.backward_tiles()
    summed = {tile.head_dim for tile in tiles if tile.split != BY_GRADIENTS}
    assert len(of_kernel("backward_prepare", reports)) == 2 * len({t.head_dim for t in tiles})
    assert len(of_kernel("backward_finish", reports)) == 2 * len(summed)


def test_registers_of_a_thread_block_fit_the_multiprocessor(reports: list[Any]) -> None:
    # 65536 of them, at launch evenly for 512 or 384 threads; setmaxnreg moves them later.
    assert {report.registers for report in of_kernel("forward_kernel", reports)} <= {128, 168}
    for kernel in ("backward_kernel", "backward_query_kernel"):
        assert {report.registers for report in of_kernel(kernel, reports)} == {168}


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
        (r"UBLKRED", "dQ is added up by the copy engine"),
        (r"USETMAXREG", "registers go to who computes"),
        (r"MAX_?\S*NAN|MNMX\S*NAN", "gradients that come out NaN are noticed"),
    ],
)
def test_instructions_of_the_backward(
    summing_sass: list[str], instruction: str, purpose: str
) -> None:
    for text in summing_sass:
        assert re.search(instruction, text), f"{purpose}: {text.split(chr(10), 1)[0]}"


def test_zeros_are_told_behind_a_fence_and_added_to_behind_another(summing_sass: list[str]) -> None:
    for text in summing_sass:
        # Zeros leave, are there for everybody, and are told of; then those of another are seen.
        zeros = text[text.rindex("UBLKCP.G.S") :]
        assert re.search(r"MEMBAR\S*\.GPU", zeros[: zeros.index("REDG")])
        told = zeros[zeros.index("REDG") :]
        seen = told[re.search(r"LDG\S*STRONG\.GPU", told).start() :]
        assert "FENCE.VIEW.ASYNC" in seen[: seen.index("UBLKRED")]


def test_who_takes_turns_lets_the_copy_engine_see_the_last(summing_sass: list[str]) -> None:
    for text in summing_sass:
        waits = [*re.finditer(r"LDG\S*STRONG\.GPU", text)]
        assert len(waits) == 2, "for turns, and for zeros"
        for wait in waits:
            waited = text[wait.start() :]
            assert "FENCE.VIEW.ASYNC" in waited[: waited.index("UBLKRED")]


WIDE_PRODUCT = r"HGMMA\.64x(?:192|256)x16\S* R\d+, "


@pytest.mark.parametrize(
    ("instruction", "purpose"),
    [
        (
            WIDE_PRODUCT + r"R\d+, gdesc\[UR\d+\]\.tnspB, R",
            "dQ, dK and dV take dS and P as registers",
        ),
        (r"HGMMA\.64x64x16\S* R\d+, gdesc\[UR\d+\], ", "S and dP read rows"),
        (r"UTMALDG\.4D", "tiles come by the copy engine"),
        (r"UBLKCP\.S\.G", "and so do lse and delta"),
        (r"USETMAXREG", "registers go to who computes"),
        (r"MAX_?\S*NAN|MNMX\S*NAN", "gradients that come out NaN are noticed"),
    ],
)
def test_instructions_of_wide_kernels(wide_sass: list[str], instruction: str, purpose: str) -> None:
    for text in wide_sass:
        assert re.search(instruction, text), f"{purpose}: {text.split(chr(10), 1)[0]}"


def test_wide_kernels_sum_nothing_in_memory_and_read_no_operand_twice(wide_sass: list[str]) -> None:
    for text in wide_sass:
        assert not re.search(r"REDG\S*F32|UBLKRED|STSM|\.tnspA|\b(LDL|STL)\b", text)
        # No wide product from shared memory alone.
        assert not re.search(WIDE_PRODUCT + "gdesc", text)


def test_probabilities_are_made_under_a_wide_product(wide_sass: list[str]) -> None:
    """Behind its issue and the wait for S, before the wait for itself."""
    for text in wide_sass:
        under = [
            words.split("DEPBAR.LE gsb0, 0x0", 1)[0]
            for words in re.split(WIDE_PRODUCT + r"[^\n]*gsb0[^\n]*\n", text)[1:]
        ]
        making = [words for words in under if "DEPBAR.LE gsb0, 0x1" in words.split("MUFU", 1)[0]]
        assert making
        # All 32; of dQ a few may be left, which are not needed before dP.
        assert all(words.count("MUFU.EX2") >= 24 for words in making)


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
