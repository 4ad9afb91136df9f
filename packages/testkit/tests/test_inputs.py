from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_attention_testkit import (
    SdpaCase,
    assert_sdpa_parity,
    case_grid,
    make_inputs,
    measure_sdpa_parity,
    reference_sdpa,
)
from flash_attention_testkit.cases import Family, Layout

CASE = SdpaCase(2, 4, 2, 97, 97, 16, torch.float16, causal=True)
NARROW = SdpaCase(1, 4, 2, 24, 16, 16, torch.bfloat16, causal=True)
PACKED = replace(NARROW, batch=3, seq_q=24, seq_k=16, lengths=((24, 16), (0, 3), (5, 0)))
TENSORS = ("query", "key", "value", "grad_out")


def of_family(family: str, case: SdpaCase = NARROW, seed: int = 0):
    return make_inputs(replace(case, family=family), seed)


def solve(inputs):
    tensors = (inputs.query, inputs.key, inputs.value)
    return reference_sdpa(*tensors, grad_out=inputs.grad_out, **inputs.options)


def seen(queries: int, keys: int) -> torch.Tensor:
    """What a causal mask shows: bool [queries, keys]."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


@pytest.mark.parametrize("family", Family.__args__)
def test_a_seed_gives_one_set_of_numbers(family: str) -> None:
    first, again, other = (of_family(family, seed=seed) for seed in (1, 1, 2))
    for name in TENSORS:
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.grad_out, other.grad_out)


@pytest.mark.parametrize("layout", Layout.__args__)
def test_tensors_have_the_shapes_of_the_case_whatever_their_layout(layout: str) -> None:
    inputs = make_inputs(replace(CASE, layout=layout), 0)

    assert inputs.query.shape == inputs.grad_out.shape == (2, 97, 4, 16)
    assert inputs.key.shape == inputs.value.shape == (2, 97, 2, 16)
    assert {getattr(inputs, name).dtype for name in TENSORS} == {torch.float16}
    assert inputs.options == {
        "causal": True,
        "window_left": None,
        "window_right": None,
        "scale": None,
    }


def test_layouts_are_what_they_say() -> None:
    plain, outside, packed, expanded = (
        make_inputs(replace(CASE, layout=layout), 0) for layout in Layout.__args__
    )

    assert plain.query.is_contiguous()
    assert plain.key.is_contiguous()
    assert outside.query.transpose(1, 2).is_contiguous()
    assert outside.grad_out.transpose(1, 2).is_contiguous()
    starts = [x.storage_offset() for x in (packed.query, packed.key, packed.value)]
    assert starts == [0, 4 * 16, 6 * 16]
    assert packed.key.stride() == packed.query.stride() == (97 * 8 * 16, 8 * 16, 16, 1)
    assert expanded.key.stride(2) == expanded.value.stride(2) == 0
    for name in TENSORS:
        assert torch.equal(getattr(outside, name), getattr(plain, name))
        assert torch.equal(getattr(packed, name), getattr(plain, name))


@pytest.mark.parametrize("layout", ["BSHD", "packed QKV slice"])
def test_packed_sequences_come_with_their_offsets(layout: str) -> None:
    lengths = ((3, 3), (0, 0), (7, 7))
    case = SdpaCase(3, 4, 2, 7, 7, 16, torch.float16, lengths=lengths, layout=layout)

    inputs = make_inputs(case, 0)

    assert inputs.query.shape == (10, 4, 16)
    assert inputs.key.shape == (10, 2, 16)
    for side in ("query", "key"):
        offsets = inputs.options[f"cu_seqlens_{side}"]
        assert offsets.dtype == torch.int32
        assert offsets.tolist() == [0, 3, 3, 10]
    assert inputs.query.is_contiguous() is (layout == "BSHD")


@pytest.mark.parametrize("std", [0.3, 1, 3])
def test_standard_deviations_are_those_of_query_and_key(std: float) -> None:
    inputs = of_family(f"std-{std}", CASE)
    assert inputs.query.float().std().item() == pytest.approx(std, rel=0.05)
    assert inputs.key.float().std().item() == pytest.approx(std, rel=0.05)
    assert inputs.value.float().std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("case", [CASE, NARROW, PACKED], ids=str)
def test_peaked_rows_give_nearly_all_weight_to_a_key_they_see(case: SdpaCase) -> None:
    case = replace(case, head_dim=64, family="peaked")
    inputs = make_inputs(case, 0)
    one_hot = inputs.value.shape[0] if case.lengths else case.seq_k
    keys = torch.eye(one_hot, dtype=torch.float64)
    value = keys[:, None].expand(-1, 2, -1) if case.lengths else keys[None, :, None]
    if not case.lengths:
        value = value.expand(case.batch, -1, 2, -1)

    weights = reference_sdpa(inputs.query, inputs.key, value, **inputs.options).out

    largest = weights.amax(-1)[weights.sum(-1) > 0.5]
    assert (largest > 0.9).double().mean() > 0.9


def test_a_common_offset_raises_scores_and_leaves_the_weights_alone() -> None:
    case = replace(NARROW, head_dim=64, dtype=torch.float32)
    inputs = of_family("offset", case)
    shifted = solve(inputs)
    shifts = {"key": inputs.key - 4, "value": inputs.value - 4}
    plain = reference_sdpa(inputs.query, shifts["key"], shifts["value"], **inputs.options)

    rows = slice(8, None)  # those before see no key
    torch.testing.assert_close(shifted.out[:, rows], plain.out[:, rows] + 4, rtol=1e-5, atol=1e-5)
    assert (shifted.lse - plain.lse)[..., rows].min() > 30


def test_one_hot_values_let_the_mask_be_read_off_the_output() -> None:
    case = replace(NARROW, window_left=5, family="one-hot-values")

    out = solve(make_inputs(case, 0)).out

    visible = seen(24, 16) & ~torch.ones(24, 16, dtype=torch.bool).tril(16 - 24 - 6)
    expected = visible / visible.sum(-1, keepdim=True).clamp(min=1)
    for head in range(4):
        torch.testing.assert_close(out[0, :, head], expected.double())


def test_equal_keys_weigh_what_is_seen_equally() -> None:
    inputs = of_family("equal-keys")
    assert (inputs.key == inputs.key[:, :1]).all()

    lse = solve(inputs).lse

    visible = seen(24, 16).sum(-1)[8:]
    score = torch.einsum(
        "shd,hd->hs", inputs.query[0].double(), inputs.key[0, 0].double().repeat_interleave(2, 0)
    )
    torch.testing.assert_close(lse[0, :, 8:], score[:, 8:] / 4 + visible.log())


@pytest.mark.parametrize("case", [NARROW, PACKED], ids=str)
def test_rows_that_see_nothing_are_loud_and_reach_nothing(case: SdpaCase) -> None:
    loud, plain = of_family("masked-rows", case), of_family("std-1", case)

    expected, actual = solve(plain), solve(loud)

    for name in ("query", "grad_out"):
        ratio = (getattr(loud, name) / getattr(plain, name)).flatten(end_dim=-3).amax((1, 2))
        unseeing = [0] if case.lengths is None else [0, 24]
        assert ratio[unseeing].tolist() == [8.0] * len(unseeing)
        assert ratio[8:24].tolist() == [1.0] * 16
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", Family.__args__)
def test_a_correct_kernel_passes_on_every_family(family: str, dtype, flash_style) -> None:
    for seed, window in enumerate((None, 7)):
        case = SdpaCase(1, 4, 2, 150, 97, 64, dtype, True, window, family=family)
        inputs = make_inputs(case, seed)
        tensors = (inputs.query, inputs.key, inputs.value)
        actual = flash_style()(*tensors, grad_out=inputs.grad_out, causal=True, window_left=window)

        assert_sdpa_parity(case, actual, *tensors, grad_out=inputs.grad_out, **inputs.options)


@pytest.mark.parametrize("case", case_grid("quick"), ids=str)
def test_a_correct_kernel_passes_the_quick_grid(case: SdpaCase, flash_style) -> None:
    inputs = make_inputs(case, 2)
    tensors = (inputs.query, inputs.key, inputs.value)
    kernel = flash_style(block=64, reverse=True, noise=2**-22)
    actual = kernel(*tensors, grad_out=inputs.grad_out, **inputs.options)

    assert_sdpa_parity(case, actual, *tensors, grad_out=inputs.grad_out, **inputs.options)


@pytest.mark.parametrize(
    ("bug", "family", "found"),
    [
        ("keys beyond the end", "one-hot-values", "out"),
        ("keys beyond the end", "equal-keys", "lse"),
        ("top-left causal", "one-hot-values", "out"),
        ("window off by one", "one-hot-values", "out"),
        ("no rescale", "peaked", "out"),
        ("no delta", "offset", "dq"),
        ("scores in storage dtype", "offset", "out"),
    ],
)
def test_a_bug_shows_on_the_family_that_is_for_it(bug: str, family: str, found: str, flash_style):
    causal = bug in ("top-left causal", "no delta")
    window = 7 if bug == "window off by one" else None
    case = SdpaCase(1, 4, 2, 113, 203, 64, torch.bfloat16, causal, window, family=family)
    inputs = make_inputs(case, 0)
    tensors = (inputs.query, inputs.key, inputs.value)
    actual = flash_style(bug)(*tensors, grad_out=inputs.grad_out, causal=causal, window_left=window)

    report = measure_sdpa_parity(case, actual, *tensors, grad_out=inputs.grad_out, **inputs.options)

    assert not report[found].passed
    assert case.id in report.failure_text()
