"""Every kernel compiles for every architecture, fits it, and keeps its loop on the tensor cores."""

from __future__ import annotations

from typing import Any, TypeAlias

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import resources
from compilation import SHARED_LIMITS

Variant: TypeAlias = tuple[int, str, int, str]  # capability, kernel, head dim, mask

MEASURED = "this tile was the fastest on the GPU, spill included"
FEW = "a register or two, and the next smaller tile halves the work of a load"
CAPPED = "ptxas keeps to 128 registers unasked; the causal variant takes what it needs"
THREE = "ptxas keeps to 168 registers unasked, with which three programs fit an SM"
MASKED = "the variant without a left bound has no spill, and is the one that runs by far most"
# Variant -> (bytes spilled at most, why that is accepted).
ACCEPTED_SPILLS: dict[Variant, tuple[int, str]] = {
    (80, "dq", 96, "window"): (8, FEW),
    (80, "dkdv", 96, "window"): (8, FEW),
    (80, "dq", 128, "window"): (8, FEW),
    (86, "forward", 64, "causal"): (16, THREE),
    (89, "forward", 64, "causal"): (16, THREE),
    (90, "dkdv", 128, "causal"): (24, MEASURED),
    (90, "dkdv", 128, "window"): (128, MASKED),
    (90, "forward", 256, "none"): (8, MEASURED),
    (100, "dq", 128, "none"): (48, CAPPED),
    (100, "forward", 256, "none"): (
        40,
        "nine registers; half the keys would need none, and be half a load's work",
    ),
    (120, "dkdv", 80, "causal"): (8, FEW),
    (120, "dkdv", 96, "window"): (32, MASKED),
    (120, "dq", 192, "causal"): (8, FEW),
    (120, "dk", 192, "causal"): (24, "none on 8.6 and 8.9, whose tile it shares"),
    (120, "dv", 192, "causal"): (24, "none on 8.6 and 8.9, whose tile it shares"),
}

LOOPS = "ptxas does so where there are three loops over keys, which only a window makes"
# Variants whose matrix products ptxas serialises (C7515), and why that is accepted.
ACCEPTED_ADVISORIES: dict[Variant, str] = {
    (90, "forward", 96, "window"): LOOPS,
    (90, "forward", 128, "window"): LOOPS,
    (90, "dq", 96, "window"): LOOPS,
    (90, "dq", 128, "window"): LOOPS,
    (90, "dk", 192, "causal"): "shares the tile that was measured at 256",
    (90, "dv", 192, "causal"): "shares the tile that was measured at 256",
    (90, "dv", 256, "causal"): MEASURED,
}

# The instruction that multiplies matrices on each architecture.
PRODUCTS = {
    80: "mma.sync",
    86: "mma.sync",
    89: "mma.sync",
    90: "wgmma.mma_async",
    100: "tcgen05.mma",
    120: "mma.sync",
}


def variant_of(record: Any) -> Variant:
    case = record.case
    return case.capability, case.kernel, case.head_dim, case.mask


def test_every_case_compiles(records: list[Any]) -> None:
    assert [record.case for record in records] == list(resources.tested_cases())


def test_shared_memory_is_within_the_limit_of_the_architecture(records: list[Any]) -> None:
    over = [one for one in records if one.shared_bytes > SHARED_LIMITS[one.case.capability]]
    assert over == []


def test_nothing_spills_but_what_is_accepted(records: list[Any]) -> None:
    spilling = [
        record
        for record in records
        if record.report.spilled_bytes > ACCEPTED_SPILLS.get(variant_of(record), (0, ""))[0]
    ]
    assert spilling == []


def test_the_compiler_serialises_no_matrix_products_but_what_is_accepted(
    records: list[Any],
) -> None:
    serialised = [
        record
        for record in records
        if record.report.advisories and variant_of(record) not in ACCEPTED_ADVISORIES
    ]
    assert serialised == []


def test_nothing_is_accepted_in_vain(records: list[Any]) -> None:
    spilling = {variant_of(record) for record in records if record.report.spilled_bytes}
    serialised = {variant_of(record) for record in records if record.report.advisories}
    assert set(ACCEPTED_SPILLS) <= spilling
    assert set(ACCEPTED_ADVISORIES) <= serialised


def test_matrix_products_run_on_the_tensor_cores(records: list[Any]) -> None:
    without = [
        record for record in records if PRODUCTS[record.case.capability] not in record.products
    ]
    assert without == []


def test_the_notebook_says_what_the_compiler_says(records: list[Any]) -> None:
    assert resources.TABLE.told() == resources.render(records), (
        "the tables are out of date: run resources.py and commit the notebook"
    )
