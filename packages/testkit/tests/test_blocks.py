"""The local side of the rule: faults that are small beside the rest of a tensor."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from flash_attention_testkit import ParityRule, SdpaResult, faithful_sdpa, measure_sdpa_parity
from flash_attention_testkit._blocks import Blocks

LENGTH = 1024
FAULTS = {
    "a factor in one head": {
        "out": (slice(-32, None), slice(1, 2), 0.95, "rows 992 to 1023, head 1"),
        "dq": (slice(-32, None), slice(3, 4), 0.95, "rows 992 to 1023, head 3"),
        "dk": (slice(-32, None), slice(2, 3), 0.5, "keys 992 to 1023, head 2"),
        "dv": (slice(-32, None), slice(0, 1), 0.5, "keys 992 to 1023, head 0"),
    },
    "zeros in one head": {
        "dk": (slice(-16, None), slice(1, 2), 0.0, "keys 992 to 1023, head 1"),
        "dv": (slice(-16, None), slice(1, 2), 0.0, "keys 992 to 1023, head 1"),
    },
    "a key without gradient": {
        "dv": (slice(-1, None), slice(None), 0.0, "keys 992 to 1023, head "),
    },
}


@pytest.fixture(scope="module")
def long_causal():
    """Inputs in bf16, in which the first keys' gradients dwarf the last ones', and good results."""
    generator = torch.Generator().manual_seed(7)
    query, key, value, grad_out = (
        torch.randn(1, LENGTH, 8, 32, generator=generator).bfloat16() for _ in range(4)
    )
    good = faithful_sdpa(query, key, value, grad_out=grad_out, causal=True)
    return (query, key, value), grad_out, good


def spoil(tensor: torch.Tensor, rows: slice, heads: slice, factor: float) -> torch.Tensor:
    """A copy in which some rows of some heads are multiplied by ``factor``."""
    spoilt = tensor.clone()
    spoilt[:, rows, heads] *= factor
    return spoilt


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_block_wrong_in_small_gradients_is_caught_and_named(long_causal, faults) -> None:
    inputs, grad_out, good = long_causal
    wrong = {name: spoil(getattr(good, name), *fault[:3]) for name, fault in faults.items()}

    report = measure_sdpa_parity(
        "spoilt", replace(good, **wrong), *inputs, grad_out=grad_out, causal=True
    )

    assert {tensor.name for tensor in report.tensors if not tensor.passed} == set(faults)
    for name, (*_, place) in faults.items():
        found = report[name]
        assert found.max_error <= found.max_limit, "neither overall limit shows it"
        assert found.rms_error <= found.rms_limit, "neither overall limit shows it"
        assert found.local_error > 1.5 * found.local_limit
        assert f"{name}: worst block: sequence 0, {place}" in report.failure_text()
        assert f"(local limit {found.local_limit:.3e})" in report.failure_text()


def test_k_local_is_the_factor_of_the_faithful_error_in_a_block(long_causal) -> None:
    (query, key, value), _, good = long_causal
    actual = SdpaResult(spoil(good.out, slice(64, 96), slice(5, 6), 0.97))
    limits = [
        measure_sdpa_parity("k", actual, query, key, value, causal=True, rule=rule)["out"]
        for rule in (ParityRule(k_local=3.0), ParityRule(k_local=5.0))
    ]

    assert limits[0].local_place == "sequence 0, rows 64 to 95, head 5"
    widening = limits[1].local_limit - limits[0].local_limit
    assert widening == pytest.approx(2 * limits[0].local_reference)


def blocks_of(*lengths: int) -> Blocks:
    edges = [sum(lengths[:place]) for place in range(len(lengths) + 1)]
    rows = [slice(first, last) for first, last in pairwise(edges)]
    return Blocks.of(rows, torch.device("cpu"))


def test_blocks_end_with_their_sequence_and_leave_no_short_remainder() -> None:
    blocks = blocks_of(0, 95, 0, 5, 64)

    sizes = blocks.block_of_row.bincount().tolist()

    assert sizes == [32, 63, 5, 32, 32]
    places = [blocks.describe(block, "keys") for block in range(blocks.count)]
    assert places == [
        "sequence 1, keys 0 to 31",
        "sequence 1, keys 32 to 94",
        "sequence 3, keys 0 to 4",
        "sequence 4, keys 0 to 31",
        "sequence 4, keys 32 to 63",
    ]


def test_rms_of_blocks_is_that_of_their_elements() -> None:
    blocks = blocks_of(40, 70)
    values = torch.randn(110, 3, 8, generator=torch.Generator().manual_seed(0))

    rms = blocks.rms(values)

    parts = [values[:40], values[40:72], values[72:]]
    expected = torch.stack([part.double().square().mean((0, 2)).sqrt() for part in parts])
    torch.testing.assert_close(rms, expected)
    torch.testing.assert_close(blocks.rms(values.view(2, 55, 3, 8)), expected)
