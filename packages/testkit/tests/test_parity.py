from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_attention_testkit import (
    ParityRule,
    SdpaCase,
    SdpaResult,
    assert_sdpa_parity,
    faithful_sdpa,
    measure_sdpa_parity,
)
from flash_attention_testkit import make_inputs as inputs_of

DTYPES = [torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (1, 257), (17, 17), (113, 203), (203, 113), (500, 3)]
MASKS = [
    {},
    {"causal": True},
    {"causal": True, "window_left": 7},
    {"causal": True, "window_left": 0},
]


@pytest.mark.parametrize("std", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_correct_kernel_passes(
    dtype: torch.dtype, shape: tuple[int, int], std: float, flash_style, make_inputs
) -> None:
    seed = 0
    for mask in MASKS:
        for heads, kv_heads in ((2, 2), (3, 1)):
            seed += 1
            size = dict(zip(("queries", "keys"), shape, strict=True))
            query, key, value, grad_out = make_inputs(
                seed, dtype, **size, heads=heads, kv_heads=kv_heads, std=std
            )
            kernel = flash_style(block=(32, 64, 128)[seed % 3], reverse=bool(seed % 2))
            actual = kernel(query, key, value, grad_out=grad_out, **mask)

            assert_sdpa_parity(
                f"{mask} {heads}", actual, query, key, value, grad_out=grad_out, **mask
            )


@pytest.mark.parametrize("scale", [0.0, -0.125, 2.0])
def test_a_correct_kernel_passes_at_any_scale(scale: float, flash_style, make_inputs) -> None:
    query, key, value, grad_out = make_inputs(5, torch.bfloat16, queries=40, keys=70)
    actual = flash_style()(query, key, value, grad_out=grad_out, scale=scale)

    assert_sdpa_parity("scale", actual, query, key, value, grad_out=grad_out, scale=scale)


@pytest.mark.parametrize(
    ("case", "seed", "reverse"),
    [
        (SdpaCase(1, 2, 1, 3, 130, 64, torch.float16, family="std-3"), 115, False),
        (SdpaCase(1, 2, 2, 1, 130, 64, torch.bfloat16, family="offset"), 62, True),
    ],
    ids=["three rows", "one row"],
)
def test_the_gradients_of_few_rows_may_be_unlucky(
    case: SdpaCase, seed: int, reverse: bool, flash_style
) -> None:
    inputs = inputs_of(case, seed)  # as they come once in a thousand times
    tensors = (inputs.query, inputs.key, inputs.value)
    actual = flash_style(reverse=reverse)(*tensors, grad_out=inputs.grad_out, **inputs.options)

    report = assert_sdpa_parity(case, actual, *tensors, grad_out=inputs.grad_out, **inputs.options)

    assert report["dk"].rms_error > 2 * report["dk"].reference_rms


def test_packed_sequences_are_checked_too(flash_style, make_inputs) -> None:
    query, key, value, grad_out = make_inputs(6, torch.float16, queries=60, keys=60)
    halves = [
        flash_style()(*(x[:, part] for x in (query, key, value)), grad_out=grad_out[:, part])
        for part in (slice(0, 20), slice(20, 60))
    ]
    joined = {
        name: torch.cat([getattr(half, name)[0] for half in halves], int(name == "lse"))
        for name in ("out", "lse", "dq", "dk", "dv")
    }
    packed = [x[0] for x in (query, key, value)]
    edges = torch.tensor([0, 20, 60], dtype=torch.int32)
    options = {"grad_out": grad_out[0], "cu_seqlens_query": edges, "cu_seqlens_key": edges}

    assert_sdpa_parity("packed", SdpaResult(**joined), *packed, **options)
    swapped = edges.flip(0).mul(-1).add(60)  # 0, 40, 60
    options = {"grad_out": grad_out[0], "cu_seqlens_query": swapped, "cu_seqlens_key": swapped}
    assert not measure_sdpa_parity("packed", SdpaResult(**joined), *packed, **options).passed


CAUSAL_RAGGED = {"queries": 113, "keys": 203}
PLANTED = [
    ("scale 1 % off", {}, {"std": 1.0}, {"out", "lse", "dq", "dk"}),
    ("no rescale", {}, {"std": 1.0}, {"out"}),
    ("keys beyond the end", {}, {"std": 0.3}, {"out", "lse"}),
    ("top-left causal", {"causal": True}, {}, {"out", "lse", "dq", "dk", "dv"}),
    ("window off by one", {"causal": True, "window_left": 7}, {}, {"out", "lse", "dq", "dk", "dv"}),
    ("wrong key head", {}, {}, {"out", "lse", "dq", "dk", "dv"}),
    ("one head of the group", {}, {}, {"dk", "dv"}),
    ("dq 1 % off", {}, {}, {"dq"}),
    ("no delta", {}, {}, {"dq", "dk"}),
    ("lse in base 2", {}, {}, {"lse"}),
    ("scores in storage dtype", {}, {"std": 3.0}, {"out"}),
    ("one wrong element", {}, {}, {"out"}),
]


@pytest.mark.parametrize(("bug", "mask", "family", "failing"), PLANTED, ids=[p[0] for p in PLANTED])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_planted_bug_is_caught(
    dtype: torch.dtype, bug: str, mask, family, failing, flash_style, make_inputs
) -> None:
    for seed in range(3):
        query, key, value, grad_out = make_inputs(seed, dtype, **{**CAUSAL_RAGGED, **family})
        actual = flash_style(bug)(query, key, value, grad_out=grad_out, **mask)

        report = measure_sdpa_parity(bug, actual, query, key, value, grad_out=grad_out, **mask)

        assert {tensor.name for tensor in report.tensors if not tensor.passed} >= failing


def test_failure_text_names_case_limits_place_and_what_to_expect(flash_style, make_inputs) -> None:
    query, key, value, _ = make_inputs(0, torch.float16, **CAUSAL_RAGGED)
    actual = flash_style("one wrong element")(query, key, value)
    report = measure_sdpa_parity("bf16-113x203", actual, query, key, value)

    with pytest.raises(AssertionError) as raised:
        assert_sdpa_parity("bf16-113x203", actual, query, key, value)

    text = str(raised.value)
    assert text.startswith("bf16-113x203: out not as right as this precision allows")
    assert "out[0, 56, 0, 3]" in text
    assert "sequence 0, rows 32 to 63, head 0" in text
    for number in (
        report["out"].max_error,
        report["out"].max_limit,
        report["out"].rms_error,
        report["out"].rms_limit,
        report["out"].reference_max,
        report["out"].reference_rms,
        report["out"].local_error,
        report["out"].local_limit,
        report["out"].local_reference,
    ):
        assert f"{number:.3e}" in text
    assert "lse:" not in text


@pytest.fixture
def square(make_inputs):
    """Inputs, grad_out and results that pass."""
    query, key, value, grad_out = make_inputs(2, torch.bfloat16, queries=40, keys=40)
    return (query, key, value), grad_out, faithful_sdpa(query, key, value, grad_out=grad_out)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("out", lambda x: x.float(), r"is torch\.float32, but should be torch\.bfloat16"),
        ("lse", lambda x: x.double(), r"is torch\.float64, but should be torch\.float32"),
        ("dk", lambda x: x.transpose(1, 2), r"has shape \[1, 2, 40, 64\], but should have"),
        ("dv", lambda x: None, "is missing, though grad_out was given"),
        ("dq", lambda x: x.to("meta"), "is on meta, but should be on cpu"),
    ],
)
def test_wrong_form_is_reported(square, name: str, spoil, message: str) -> None:
    inputs, grad_out, good = square
    actual = replace(good, **{name: spoil(getattr(good, name))})

    with pytest.raises(AssertionError, match=f"{name}: {message}"):
        assert_sdpa_parity("form", actual, *inputs, grad_out=grad_out)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
def test_a_single_non_finite_element_fails(square, name: str, value: float) -> None:
    inputs, grad_out, good = square
    spoilt = getattr(good, name).clone()
    spoilt.view(-1)[7] = value

    with pytest.raises(AssertionError, match=f"{name}: 1 of {spoilt.numel()} elements are NaN"):
        assert_sdpa_parity("nan", replace(good, **{name: spoilt}), *inputs, grad_out=grad_out)


def test_a_swallowed_nan_fails(square) -> None:
    (query, key, value), _, good = square
    value[:, 3] = float("nan")

    with pytest.raises(AssertionError, match=r"out: .* are finite, though an Inf or NaN"):
        assert_sdpa_parity("hidden", replace(good, dq=None, dk=None, dv=None), query, key, value)
    spread = faithful_sdpa(query, key, value)
    assert_sdpa_parity("shown", spread, query, key, value)


def test_nothing_is_asked_beyond_the_range_of_the_dtype() -> None:
    query = torch.zeros(1, 1, 1, 8, dtype=torch.float16)
    grad_out = torch.full_like(query, 6e4)
    group = query.expand(1, 1, 2, 8), grad_out.expand(1, 1, 2, 8)

    result = faithful_sdpa(group[0], query, query, grad_out=group[1])

    assert result.dv.isinf().all()  # 12e4, the sum over the group, exceeds fp16
    assert_sdpa_parity("overflow", result, group[0], query, query, grad_out=group[1])


def test_rows_without_keys_must_have_the_lse_that_was_asked_for(make_inputs) -> None:
    query, key, value, _ = make_inputs(3, torch.float16, queries=9, keys=4)
    stock = faithful_sdpa(query, key, value, causal=True)
    positive = replace(stock, lse=torch.where(stock.lse.isneginf(), torch.inf, stock.lse))

    assert_sdpa_parity("-inf", stock, query, key, value, causal=True)
    assert_sdpa_parity("+inf", positive, query, key, value, causal=True, empty_lse=torch.inf)
    with pytest.raises(AssertionError, match="lse: 20 of 36 rows without a visible key are not"):
        assert_sdpa_parity("mixed up", positive, query, key, value, causal=True)


def test_lse_is_checked_only_where_it_is_returned(square) -> None:
    inputs, grad_out, good = square

    report = assert_sdpa_parity("no lse", replace(good, lse=None), *inputs, grad_out=grad_out)

    assert [tensor.name for tensor in report.tensors] == ["out", "dq", "dk", "dv"]


def test_gradients_without_grad_out_are_refused(square) -> None:
    inputs, _, good = square
    with pytest.raises(ValueError, match="actual has dq, dk, dv, but there is no grad_out"):
        measure_sdpa_parity("no grad_out", good, *inputs)


def test_a_provider_may_ask_for_larger_factors(flash_style, make_inputs) -> None:
    query, key, value, _ = make_inputs(0, torch.bfloat16, std=3.0, **CAUSAL_RAGGED)
    actual = flash_style("scores in storage dtype")(query, key, value)

    assert not measure_sdpa_parity("default", actual, query, key, value).passed
    loose = ParityRule(k_max=30.0, k_rms=30.0, k_local=30.0, lse_tolerance=1e-1)
    assert measure_sdpa_parity("loose", actual, query, key, value, rule=loose).passed


def test_report_shows_every_tensor_and_its_verdict(square) -> None:
    inputs, grad_out, good = square
    report = measure_sdpa_parity("case", replace(good, dq=good.dq * 2), *inputs, grad_out=grad_out)

    lines = str(report).splitlines()

    assert lines[0].endswith("case")
    assert [(line.split()[0], line.split()[-1]) for line in lines[1:]] == [
        ("out", "ok"),
        ("lse", "ok"),
        ("dq", "FAILED"),
        ("dk", "ok"),
        ("dv", "ok"),
    ]
    assert [line.split()[0] for line in lines if line.split()[-2] == "-"] == ["lse"]
    with pytest.raises(KeyError, match="checked were out, lse, dq, dk, dv"):
        report["delta"]


def test_results_without_any_error_pass_beside_empty_sequences() -> None:
    x = torch.zeros(40, 2, 8, dtype=torch.float16)
    edges = torch.tensor([0, 0, 40, 40])
    options = {"grad_out": x, "cu_seqlens_query": edges, "cu_seqlens_key": edges}

    report = assert_sdpa_parity("zeros", faithful_sdpa(x, x, x, **options), x, x, x, **options)

    assert report["dk"].local_place == "sequence 1, keys 0 to 39, head 0"


def test_empty_inputs_pass() -> None:
    x = torch.empty(1, 0, 2, 8, dtype=torch.float16)
    assert assert_sdpa_parity("empty", faithful_sdpa(x, x, x, grad_out=x), x, x, x, grad_out=x)
