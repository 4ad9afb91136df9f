"""The Hopper kernels compile, fit, and keep in machine code what they are written for."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import hopper_resources as resources
from compilation import SHARED_LIMITS

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


def test_every_tile_of_the_table_compiles(records: list[Any]) -> None:
    assert [record.case for record in records] == list(resources.tested_cases())


def test_shared_memory_is_within_the_limit(records: list[Any]) -> None:
    assert [one for one in records if one.shared_bytes > SHARED_LIMITS[90]] == []


def loops_over_keys(record: Any) -> list[Any]:
    """Of the loops that multiply, those that take one block a turn; the others are over tiles."""
    return [
        loop
        for loop in record.code.loops
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
        assert record.report.spilled_bytes <= accepted, case


def test_the_compiler_serialises_no_matrix_products(records: list[Any]) -> None:
    assert [record for record in records if record.report.advisories] == []


def test_two_products_are_under_way_when_the_turn_is_passed(records: list[Any]) -> None:
    """S of a block and P V of the one before; S is waited for first, and P V before O is scaled."""
    for record in records:
        for loop in loops_over_keys(record):
            kept = [event for event in loop.order if event != "EXP"]
            assert kept == ["PRODUCT", "PASS", "WAIT 1", "WAIT 0"], (record.case, loop)
            assert "EXP" in loop.order


def test_no_operand_of_a_product_under_way_is_overwritten(records: list[Any]) -> None:
    for record in records:
        assert record.code.register_operands >= 8
        assert record.code.hazards == (), record.case


def test_the_notebook_says_what_the_compiler_says(records: list[Any]) -> None:
    told = resources.TABLE.told().splitlines()
    assert [line for line in resources.render(records).splitlines() if line not in told] == [], (
        "the table is out of date: run hopper_resources.py and commit the notebook"
    )
