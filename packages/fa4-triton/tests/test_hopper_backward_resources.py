"""The Hopper backward compiles, fits, and keeps in machine code what it is written for."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import hopper_backward_resources as resources
from compilation import SHARED_LIMITS

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


def over_blocks(record: Any) -> list[Any]:
    """Loops over blocks, of all that multiply."""
    return [loop for loop in record.code.loops if list(loop.order) in ORDERS[record.case.kernel]]


def test_every_kernel_compiles(records: list[Any]) -> None:
    assert [record.case for record in records] == list(resources.tested_cases())


def test_shared_memory_is_within_the_limit(records: list[Any]) -> None:
    assert [one for one in records if one.shared_bytes > SHARED_LIMITS[90]] == []


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
        assert record.report.spilled_bytes <= accepted, record.case
        assert sum(loop.local for loop in over_blocks(record)) <= accepted // 12, record.case


def test_the_compiler_serialises_no_matrix_products(records: list[Any]) -> None:
    assert [record for record in records if record.report.advisories] == []


def test_no_operand_of_a_product_under_way_is_overwritten(records: list[Any]) -> None:
    for record in records:
        assert record.code.register_operands >= 8
        assert record.code.hazards == (), record.case


def test_p_of_what_is_unseen_is_zero_whatever_lse_is(records: list[Any]) -> None:
    """Of each consumer's first block and loop with a mask: hidden in S, a NaN in lse would show.

    dQ is made of dS alone, which is hidden itself.
    """
    ways = {"fused": 2, "dkdv": 1, "dq": 0}  # consumers whose P goes into a product
    for record in records:
        masked = 2 if record.case.mask == "causal" else 0
        made, hidden = record.exponents
        assert made >= hidden == ways[record.case.kernel] * masked, record.case


@pytest.mark.parametrize(
    ("last", "before", "hidden"),
    [("arith.select %3, %4, ", "arith.addf ", 1), ("arith.addf ", "arith.select %3, %4, ", 0)],
)
def test_the_scan_knows_what_was_the_last_to_touch_an_exponent(
    last: str, before: str, hidden: int
) -> None:
    code = f"""
        %0 = {before}%6, %7 : tensor<64x64xf32, #mma>
        %1 = {last}%0 : tensor<64x8x4x2xf32, #linear>
        %2 = tt.reshape %1 : tensor<64x8x4x2xf32, #linear> -> tensor<64x64xf32, #linear1>
        %5 = math.exp2 %2 : tensor<64x64xf32, #linear1>
        %8 = math.exp2 %9 : f32
    """
    assert resources.exponents(code) == (1, hidden)


def test_the_notebook_says_what_the_compiler_says(records: list[Any]) -> None:
    told = resources.TABLE.told().splitlines()
    assert [line for line in resources.render(records).splitlines() if line not in told] == [], (
        "the table is out of date: run hopper_backward_resources.py and commit the notebook"
    )
