"""Every kernel compiles for every architecture, fits it, and keeps its loop on the tensor cores."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

PROGRAM = Path(__file__).with_name("resources.py")

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


@pytest.fixture(scope="module")
def resources() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fa4_triton_resources", PROGRAM)
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
        [sys.executable, str(PROGRAM), "--json"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [resources.record_of(entry) for entry in json.loads(done.stdout)]


def variant_of(record: Any) -> Variant:
    case = record.case
    return case.capability, case.kernel, case.head_dim, case.mask


def test_every_case_compiles(resources: ModuleType, records: list[Any]) -> None:
    assert [record.case for record in records] == list(resources.cases())


def test_shared_memory_is_within_the_limit_of_the_architecture(
    resources: ModuleType, records: list[Any]
) -> None:
    limits = resources.SHARED_LIMITS
    over = [record for record in records if record.shared_bytes > limits[record.case.capability]]
    assert over == []


def test_nothing_spills_but_what_is_accepted(records: list[Any]) -> None:
    spilling = [
        record
        for record in records
        if record.spilled_bytes > ACCEPTED_SPILLS.get(variant_of(record), (0, ""))[0]
    ]
    assert spilling == []


def test_the_compiler_serialises_no_matrix_products_but_what_is_accepted(
    records: list[Any],
) -> None:
    serialised = [
        record
        for record in records
        if record.advisories and variant_of(record) not in ACCEPTED_ADVISORIES
    ]
    assert serialised == []


def test_nothing_is_accepted_in_vain(records: list[Any]) -> None:
    spilling = {variant_of(record) for record in records if record.spilled_bytes}
    serialised = {variant_of(record) for record in records if record.advisories}
    assert set(ACCEPTED_SPILLS) <= spilling
    assert set(ACCEPTED_ADVISORIES) <= serialised


def test_matrix_products_run_on_the_tensor_cores(records: list[Any]) -> None:
    without = [
        record for record in records if PRODUCTS[record.case.capability] not in record.products
    ]
    assert without == []


def test_the_notebook_says_what_the_compiler_says(
    resources: ModuleType, records: list[Any]
) -> None:
    page = resources.NOTEBOOK.read_text(encoding="utf-8")
    begin, end = resources.section(page)
    assert page[begin:end].strip() == resources.render(records), (
        f"the tables are out of date: run `python {PROGRAM.name}` and commit the notebook"
    )
