"""The Hopper kernels compile, fit, and keep in machine code what they are written for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

PROGRAM = Path(__file__).with_name("hopper_resources.py")

# (columns, rows of a tile, mask, packed) -> bytes spilled at most. The way through `repair`, which
# nobody takes without an Inf or NaN in V, needs more registers than there are; the loops over keys
# need not (test_no_loop_over_keys_touches_a_spilled_register).
ACCEPTED_SPILLS = {
    (64, 192, "causal", False): 276,
    (64, 192, "none", True): 292,
    (128, 128, "causal", False): 8,
    (128, 128, "causal", True): 8,
    (128, 128, "window", False): 144,
    (256, 128, "causal", False): 56,
}


@pytest.fixture(scope="module")
def resources() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fa4_triton_hopper_resources", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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


def test_every_tile_of_the_table_compiles(resources: ModuleType, records: list[Any]) -> None:
    assert [record.case for record in records] == list(resources.few_cases())


def test_shared_memory_is_within_the_limit(resources: ModuleType, records: list[Any]) -> None:
    assert [one for one in records if one.shared_bytes > resources.SHARED_LIMIT] == []


def loops_over_keys(record: Any) -> list[Any]:
    """Of the loops that multiply, those that take one block a turn; the others are over tiles."""
    return [
        loop
        for loop in record.loops
        if loop.order.count("PASS") == loop.order.count("WAIT 1") == loop.order.count("WAIT 0") == 1
    ]


def test_every_consumer_has_a_loop_over_keys_and_one_more_for_each_masked_end(
    records: list[Any],
) -> None:
    for record in records:
        consumers = record.case.tile.m // 64
        expected = consumers * {"none": 1, "causal": 2, "window": 3}[record.case.mask]
        assert len(loops_over_keys(record)) == expected, record.case


def test_no_loop_over_keys_touches_a_spilled_register(records: list[Any]) -> None:
    for record in records:
        assert [loop for loop in loops_over_keys(record) if loop.local] == [], record.case


def test_a_causal_loop_without_a_mask_is_no_longer_than_one_of_a_full_tile(
    records: list[Any],
) -> None:
    """Copies of P between the loops' registers made it 14% longer once."""
    lengths: dict[Any, dict[bool, int]] = {}
    for record in (one for one in records if one.case.mask != "window"):
        tile, causal = record.case.tile, record.case.mask == "causal"
        shortest = min(loop.length for loop in loops_over_keys(record))
        lengths.setdefault((tile.m, tile.n, tile.d), {})[causal] = shortest
    both = [found for found in lengths.values() if len(found) == 2]
    assert len(both) == 3
    for found in both:
        assert found[True] <= 1.05 * found[False]


def test_nothing_spills_elsewhere_but_what_is_accepted(records: list[Any]) -> None:
    for record in records:
        case = record.case
        accepted = ACCEPTED_SPILLS.get((case.tile.d, case.tile.m, case.mask, case.varlen), 0)
        assert record.spilled_bytes <= accepted, case


def test_the_compiler_serialises_no_matrix_products(records: list[Any]) -> None:
    assert [record for record in records if record.advisories] == []


def test_two_products_are_under_way_when_the_turn_is_passed(records: list[Any]) -> None:
    """S of a block and P V of the one before; S is waited for first, and P V before O is scaled."""
    for record in records:
        for loop in loops_over_keys(record):
            kept = [event for event in loop.order if event != "EXP"]
            assert kept == ["PRODUCT", "PASS", "WAIT 1", "WAIT 0"], (record.case, loop)
            assert "EXP" in loop.order


def test_no_operand_of_a_product_under_way_is_overwritten(records: list[Any]) -> None:
    for record in records:
        assert record.register_operands >= 8
        assert record.hazards == (), record.case


PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8], R24, gsb0 ;"
WAIT_ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
WAIT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;"


@pytest.mark.parametrize(
    ("code", "hazards"),
    [
        ([PRODUCT, "MOV R91, R3 ;", WAIT_ALL], 1),
        ([PRODUCT, "@!P0 IMAD.WIDE R90, R3, R4, R6 ;", WAIT_ALL], 1),
        ([PRODUCT, WAIT_ONE, "LDS.128 R88, [R4] ;", WAIT_ALL], 1),
        ([PRODUCT, "STS [R88], R3 ;", "MOV R92, R3 ;", WAIT_ALL], 0),
        ([PRODUCT, WAIT_ALL, "MOV R91, R3 ;"], 0),
        (["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;", "MOV R88, R3 ;"], 0),
    ],
)
def test_the_scan_finds_an_operand_that_is_overwritten(
    resources: ModuleType, code: list[str], hazards: int
) -> None:
    lines = [f"        /*{16 * at:04x}*/                   {text}" for at, text in enumerate(code)]
    assert len(resources.operand_hazards(lines)[1]) == hazards


def test_the_scan_finds_spills_in_a_loop(resources: ModuleType) -> None:
    body = (PRODUCT, WAIT_ONE, "LDL R3, [R1+0x8] ;", "@P0 BRA `(.L_x_1) ;")
    code = [".L_x_1:", *(f"        /*{at:04x}*/    {text}" for at, text in enumerate(body))]
    (loop,) = resources.product_loops(code)
    assert loop == resources.Loop(("PRODUCT", "WAIT 1"), local=1, length=4)


def test_the_notebook_says_what_the_compiler_says(
    resources: ModuleType, records: list[Any]
) -> None:
    page = resources.NOTEBOOK.read_text(encoding="utf-8")
    begin, end = resources.section(page)
    told = page[begin:end].strip().splitlines()
    assert [line for line in resources.render(records).splitlines() if line not in told] == [], (
        f"the table is out of date: run `python {PROGRAM.name}` and commit the notebook"
    )
