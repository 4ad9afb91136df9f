"""The Hopper backward compiles, fits, and keeps in machine code what it is written for."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

PROGRAM = Path(__file__).with_name("hopper_backward_resources.py")

# (head dim, mask) of the fused kernel -> bytes spilled at most: around the loops, and in the masked
# one of two blocks a tile, a register of the mask's.
ACCEPTED_SPILLS = {(64, "full"): 16, (64, "tail"): 8, (64, "causal"): 60}

# What matters of a loop over blocks, in order.
ORDERS = {
    # S, dQ and dK are issued; under dK is P made. dP and dV follow, and under dV dS.
    "fused": [["PRODUCT", "WAIT 1", "EXP", "PRODUCT", "WAIT 1", "WAIT 0"]],
    # S and dV, and P under it; the other consumer's products run one by one.
    "dkdv": [["PRODUCT", "WAIT 1", "EXP", "WAIT 0"], ["PRODUCT", "WAIT 0", "PRODUCT", "WAIT 0"]],
    # S and dQ, and P under it; dP.
    "dq": [["PRODUCT", "WAIT 1", "EXP", "PRODUCT", "WAIT 1", "WAIT 0"]],
}


@pytest.fixture(scope="module")
def resources() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PROGRAM.parent))
        return importlib.import_module(PROGRAM.stem)


@pytest.fixture(scope="module")
def records(resources: ModuleType) -> list[Any]:
    # In a process of its own: this one may interpret kernels, and cannot compile them then.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--json", "--few"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [resources.record_of(entry) for entry in json.loads(done.stdout)]


def over_blocks(record: Any) -> list[Any]:
    """Loops over blocks, of all that multiply."""
    return [loop for loop in record.loops if list(loop.order) in ORDERS[record.case.kernel]]


def test_every_kernel_compiles(resources: ModuleType, records: list[Any]) -> None:
    assert [record.case for record in records] == list(resources.few_cases())


def test_shared_memory_is_within_the_limit(resources: ModuleType, records: list[Any]) -> None:
    assert [one for one in records if one.shared_bytes > resources.SHARED_LIMIT] == []


def test_both_consumers_have_a_loop_without_a_mask_and_where_there_is_one_with(
    records: list[Any],
) -> None:
    for record in records:
        expected = 2 if record.case.mask == "full" else 4
        assert len(over_blocks(record)) == expected, record.case


def test_no_loop_without_a_mask_touches_a_spilled_register(records: list[Any]) -> None:
    for record in records:
        shortest = sorted(over_blocks(record), key=lambda loop: loop.length)[:2]
        assert [loop for loop in shortest if loop.local] == [], record.case


def test_nothing_spills_but_what_is_accepted(records: list[Any]) -> None:
    for record in records:
        accepted = 0
        if record.case.kernel == "fused":
            accepted = ACCEPTED_SPILLS.get((record.case.head_dim, record.case.mask), 0)
        assert record.spilled_bytes <= accepted, record.case
        assert sum(loop.local for loop in over_blocks(record)) <= accepted // 12, record.case


def test_the_compiler_serialises_no_matrix_products(records: list[Any]) -> None:
    assert [record for record in records if record.advisories] == []


def test_no_operand_of_a_product_under_way_is_overwritten(records: list[Any]) -> None:
    for record in records:
        assert record.register_operands >= 8
        assert record.hazards == (), record.case


def test_p_of_what_is_unseen_is_zero_whatever_lse_is(records: list[Any]) -> None:
    """Of each consumer's first block and loop with a mask: hidden in S, a NaN in lse would show.

    dQ is made of dS alone, which is hidden itself.
    """
    ways = {"fused": 2, "dkdv": 1, "dq": 0}  # consumers whose P goes into a product
    for record in records:
        masked = 2 if record.case.mask == "causal" else 0
        made, hidden = record.exponents
        assert made >= hidden == ways[record.case.kernel] * masked, record.case


PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8], R24, gsb0 ;"
OTHER = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;"
WAIT_ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
WAIT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;"


@pytest.mark.parametrize(
    ("code", "hazards"),
    [
        ([PRODUCT, "MOV R91, R3 ;", WAIT_ALL], 1),
        ([PRODUCT, WAIT_ONE, "MOV R91, R3 ;"], 1),
        ([PRODUCT, OTHER, WAIT_ONE, "MOV R91, R3 ;"], 0),
        ([OTHER, PRODUCT, WAIT_ONE, "LDS.128 R88, [R4] ;"], 1),
        ([PRODUCT.replace(", gsb0", ""), OTHER, WAIT_ONE, "MOV R88, R3 ;"], 1),
        ([PRODUCT, WAIT_ALL, "MOV R91, R3 ;"], 0),
    ],
)
def test_the_scan_knows_which_groups_are_done(
    resources: ModuleType, code: list[str], hazards: int
) -> None:
    lines = [f"        /*{16 * at:04x}*/                   {text}" for at, text in enumerate(code)]
    assert len(resources.group_hazards(lines)[1]) == hazards


@pytest.mark.parametrize(
    ("last", "before", "hidden"),
    [("arith.select %3, %4, ", "arith.addf ", 1), ("arith.addf ", "arith.select %3, %4, ", 0)],
)
def test_the_scan_knows_what_was_the_last_to_touch_an_exponent(
    resources: ModuleType, last: str, before: str, hidden: int
) -> None:
    code = f"""
        %0 = {before}%6, %7 : tensor<64x64xf32, #mma>
        %1 = {last}%0 : tensor<64x8x4x2xf32, #linear>
        %2 = tt.reshape %1 : tensor<64x8x4x2xf32, #linear> -> tensor<64x64xf32, #linear1>
        %5 = math.exp2 %2 : tensor<64x64xf32, #linear1>
        %8 = math.exp2 %9 : f32
    """
    assert resources.exponents(code) == (1, hidden)


def test_the_notebook_says_what_the_compiler_says(
    resources: ModuleType, records: list[Any]
) -> None:
    page = resources.NOTEBOOK.read_text(encoding="utf-8")
    begin, end = resources.section(page)
    told = page[begin:end].strip().splitlines()
    assert [line for line in resources.render(records).splitlines() if line not in told] == [], (
        f"the table is out of date: run `python {PROGRAM.name}` and commit the notebook"
    )
