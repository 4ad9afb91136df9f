"""Which calls go to the Hopper kernels, for what reason not, and how a forward is laid out."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fa4_triton.hopper import (
    KERNELS,
    Choice,
    HopperPlan,
    Situation,
    asked_for,
    choose,
    plan_hopper_forward,
    situation_of,
    why_no_gluon,
    why_not_this_call,
    why_untested,
)
from fa4_triton.plan import Device, Packed, Request, sizes_of

DEVICE = Device("hopper", l2_bytes=50 << 20, multiprocessors=132)
SERVED = Situation("hopper", "3.6.0", None, 128, "bf16", "causal", "forward", False)


def request(**changes: Any) -> Request:
    """2 sequences of 1000 queries and 1500 keys, 8 query heads on 2 key heads, head_dim 64."""
    dense = Request((2, 1000, 8, 64), (2, 1500, 2, 64), False, None, None, None)
    return dense._replace(**changes)


def packed(sizes: Packed) -> Request:
    """700 queries and 900 keys."""
    return request(query_shape=(700, 8, 64), key_shape=(900, 2, 64), packed=sizes)


def contiguous(asked: Request) -> tuple[tuple[int, ...], ...]:
    """Strides of query, key, value and out."""
    query, key = (
        tuple(torch.empty(shape, device="meta").stride())
        for shape in (asked.query_shape, asked.key_shape)
    )
    return query, key, key, query


def situation(asked: Request) -> Situation:
    return situation_of(
        asked, DEVICE, "bf16", "forward", triton="3.6.0", gluon=None, asked="fastest"
    )


def obstacle(asked: Request, **changes: Any) -> str | None:
    given = {"strides": contiguous(asked), "alignment": 0b1111, "scale": "positive"}
    return why_not_this_call(asked, **{**given, **changes})


def plan(asked: Request, head_dim: int = 64, strides: Any = None) -> HopperPlan:
    found = situation(asked)
    tile = choose(found._replace(head_dim=head_dim)).tile(sizes_of(asked).seq_len_q)
    return plan_hopper_forward(DEVICE, asked, strides or contiguous(asked), tile)


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "window"])
@pytest.mark.parametrize("head_dim", range(40, 257, 8))
def test_every_head_dim_from_40_is_served_by_a_tile_that_holds_it(
    head_dim: int, mask: Any, varlen: bool
) -> None:
    choice = choose(SERVED._replace(head_dim=head_dim, mask=mask, varlen=varlen))
    assert choice.reason is None
    for rows in (1, 1000, 1 << 20):
        tile = choice.tile(rows)
        assert tile.d // 2 < head_dim <= tile.d
        assert tile.m in (128, 192)
        assert tile.drawn or (mask == "none" and not varlen)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architecture": "ampere"}, "do not run on ampere"),
        ({"architecture": "interpreter"}, "do not run on interpreter"),
        ({"triton": "3.7.1"}, r"tested with Triton 3\.6\.x only, and this is 3\.7\.1"),
        ({"triton": "3.60.0"}, "this is 3.60.0"),
        ({"gluon": "ImportError: none"}, "Gluon cannot be used: ImportError: none"),
        ({"asked": "portable"}, "FA4_TRITON_KERNELS asks for it"),
        ({"direction": "backward", "varlen": True}, "packed sequences"),
        ({"direction": "backward", "mask": "window"}, "a window"),
        ({"head_dim": 32}, "head_dim 32"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_not_served_goes_to_the_portable_kernels_for_a_reason(
    change: dict[str, Any], reason: str
) -> None:
    choice = choose(SERVED._replace(**change))
    assert choice.tiles == ()
    assert choice.reason is not None
    assert re.search(reason, choice.reason)


def test_the_choice_depends_on_nothing_else() -> None:
    assert choose(SERVED) is choose(SERVED._replace())
    assert isinstance(choose(SERVED), Choice)


@pytest.mark.parametrize(
    ("changes", "mask"),
    [
        ({}, "none"),
        ({"causal": True}, "causal"),
        ({"window_left": 10}, "window"),
        ({"window_right": 0}, "window"),
        ({"causal": True, "window_left": 10}, "window"),
        ({"causal": True, "window_left": 1 << 40}, "causal"),  # hides nothing
        ({"window_left": 2500, "window_right": 2500}, "none"),
    ],
)
def test_a_window_that_hides_nothing_is_none(changes: dict[str, Any], mask: str) -> None:
    asked = request(**changes)
    found = situation_of(
        asked, DEVICE, "bf16", "forward", triton="3.6.0", gluon=None, asked="fastest"
    )
    assert found == SERVED._replace(head_dim=64, mask=mask)


def test_packed_sequences_are_a_situation_of_their_own() -> None:
    asked = packed(Packed(5, 333, 450))
    found = situation_of(
        asked, DEVICE, "bf16", "forward", triton="3.6.0", gluon=None, asked="fastest"
    )
    assert found.varlen


@pytest.mark.parametrize(
    ("asked", "changes", "reason"),
    [
        (request(), {"scale": "small"}, "a scale that is zero"),
        (request(), {"scale": "negative"}, "or negative"),
        (request(query_shape=(2, 0, 8, 64)), {}, "no queries"),
        (request(key_shape=(2, 0, 2, 64)), {}, "no keys"),
        (packed(Packed(0, 333, 450)), {}, "no queries or no keys"),
        (packed(Packed(5, 0, 450)), {}, "no queries"),
        (packed(Packed(5, 333, 0)), {}, "no keys"),
        (request(), {"alignment": 0b1011}, "does not start at a multiple of 16 bytes"),
    ],
)
def test_some_calls_cannot_go_to_the_hopper_kernels(
    asked: Request, changes: dict[str, Any], reason: str
) -> None:
    assert reason in str(obstacle(asked, **changes))


@pytest.mark.parametrize(
    ("head_dim", "mask", "changes", "reason"),
    [
        (64, "none", {}, None),
        (64, "none", {"query_shape": (2, 60, 8, 64)}, "fewer than 64 queries"),
        # 200 rows of 1500 keys are 300000 pairs; 160 are 240000, less than 2^18.
        (64, "none", {"query_shape": (32, 200, 8, 64)}, None),
        (64, "none", {"query_shape": (32, 160, 8, 64)}, "less than 262144 pairs"),
        (64, "causal", {}, "less than 32 * 2^20 pairs"),
        (64, "causal", {"query_shape": (3, 1000, 8, 64)}, None),
        (64, "window", {"query_shape": (3, 1000, 8, 64)}, "less than 32 * 2^20 pairs"),
        (64, "window", {"query_shape": (64, 1000, 8, 64)}, None),
        (128, "none", {"query_shape": (1, 64, 1, 128)}, None),
        (128, "causal", {"query_shape": (1, 1000, 8, 128)}, "less than 12 * 2^20 pairs"),
        (256, "causal", {"query_shape": (1, 64, 1, 256)}, None),
    ],
)
def test_where_the_portable_kernel_is_faster_it_serves(
    head_dim: int, mask: Any, changes: dict[str, Any], reason: str | None
) -> None:
    """Beside 1500 keys; the window sees 101 of them."""
    left = 100 if mask == "window" else None
    asked = request(causal=mask != "none", window_left=left)
    if mask == "none":
        asked = asked._replace(query_shape=(4, 2000, 8, 64))
    found = choose(SERVED._replace(head_dim=head_dim, mask=mask)).why_too_small(
        asked._replace(**changes)
    )
    assert (found is None) if reason is None else (found is not None and found.startswith(reason))


def test_packed_sequences_count_by_their_rows_in_all() -> None:
    """Not as if all were as long as the longest."""
    choice = choose(SERVED._replace(head_dim=64, varlen=True))
    few = request(
        query_shape=(1100, 8, 64), key_shape=(1100, 8, 64), packed=Packed(101, 1000, 1000)
    )
    assert "less than 32 * 2^20 pairs" in str(choice.why_too_small(few))
    many = few._replace(query_shape=(9000, 8, 64), key_shape=(9000, 8, 64))
    assert choice.why_too_small(many) is None


@pytest.mark.parametrize(
    ("value", "asked"),
    [(None, "fastest"), ("", "fastest"), (" Hopper ", "hopper"), ("portable", "portable")],
)
def test_the_environment_may_ask_for_one_kind(
    monkeypatch: pytest.MonkeyPatch, value: str | None, asked: str
) -> None:
    if value is None:
        monkeypatch.delenv(KERNELS, raising=False)
    else:
        monkeypatch.setenv(KERNELS, value)
    assert asked_for() == asked


def test_a_kind_that_is_not_known_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS, "ampere")
    with pytest.raises(ValueError, match=r"is 'ampere'.*; unset it, or set it to 'hopper'"):
        asked_for()


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(
    ("dim", "stride", "reason"),
    [
        (1, 516, "no multiples of 16 bytes"),
        (2, 0, "expanded"),
        (0, -512000, "no multiples"),
        (0, 1 << 39, "tebibyte"),
    ],
)
def test_strides_that_tma_does_not_take_are_seen_in_every_tensor(
    number: int, dim: int, stride: int, reason: str
) -> None:
    asked = request()
    strides = [list(one) for one in contiguous(asked)]
    assert obstacle(asked, strides=tuple(map(tuple, strides))) is None
    strides[number][dim] = stride
    assert reason in str(obstacle(asked, strides=tuple(map(tuple, strides))))


def test_strides_of_dimensions_of_size_one_do_not_matter() -> None:
    asked = request(query_shape=(1, 1000, 1, 64), key_shape=(1, 1500, 1, 64))
    strides = ((1, 64, 3, 1), (0, 64, 5, 1), (7, 64, 0, 1), (1, 64, 1, 1))
    assert obstacle(asked, strides=strides) is None
    for tensor in plan(asked, strides=strides).tensors:
        assert tensor.strides == (64, 64, 64, 1)


def test_tensors_are_described_heads_before_rows() -> None:
    query, key, value, out = plan(request()).tensors
    assert query.shape == out.shape == (2, 8, 1000, 64)
    assert key.shape == value.shape == (2, 2, 1500, 64)
    assert query.strides == (1000 * 8 * 64, 64, 8 * 64, 1)
    assert (query.block, key.block) == ((1, 1, 64, 64), (1, 1, 128, 64))


def test_a_head_dim_is_padded_by_the_block_alone() -> None:
    asked = request(query_shape=(2, 1000, 8, 72), key_shape=(2, 1500, 2, 72))
    for tensor in plan(asked, 72).tensors:
        assert tensor.shape[-1] == 72
        assert tensor.block[-1] == 128


@pytest.mark.parametrize(("heads", "programs"), [(8, 96), (64, 132)])
def test_there_are_as_many_programs_as_multiprocessors_or_tiles(heads: int, programs: int) -> None:
    asked = request(query_shape=(2, 1000, heads, 64))
    planned = plan(asked)
    assert planned.tile.m == 192
    assert planned.programs == programs
    *_, tiles, blocks, _ = planned.scalars
    assert (tiles, blocks) == (2 * heads * 6, 6)


@pytest.mark.parametrize(
    ("keys", "causal", "tail"), [(1500, False, True), (1536, False, False), (1500, True, False)]
)
def test_only_what_nothing_else_masks_has_a_tail(keys: int, causal: bool, tail: bool) -> None:
    planned = plan(request(key_shape=(2, keys, 2, 64), causal=causal))
    assert (planned.mask, planned.tail) == ("causal" if causal else "none", tail)


def test_packed_tensors_are_described_as_one_long_sequence() -> None:
    asked = packed(Packed(5, 333, 450))
    planned = plan(asked)
    query, key, _, _ = planned.tensors
    assert (query.shape, query.strides) == ((1, 8, 700, 64), (64, 64, 512, 1))
    assert (key.shape, key.strides) == ((1, 2, 900, 64), (64, 64, 128, 1))
    heads, group, heads_total, rows, keys, _, _, tiles, blocks, _ = planned.scalars
    assert (heads, group, heads_total, rows, keys) == (8, 4, 40, 700, 900)
    assert (tiles, blocks) == (40 * 2, 2)  # 192 of the longest sequence's 333 rows each
    assert planned.varlen
    assert planned.tail  # the next sequence's keys follow


def test_a_bound_that_hides_nothing_is_as_wide_as_the_sequences() -> None:
    assert plan(request(window_left=100)).scalars[5:7] == (100, 2500)
    assert plan(request(causal=True, window_left=100)).scalars[5:7] == (100, 0)
    assert plan(request(window_right=7)).scalars[5:7] == (2500, 7)
    assert plan(request(window_right=7)).mask == "window"


def test_heads_of_a_group_go_side_by_side_however_many() -> None:
    asked = request(query_shape=(2, 1000, 64, 64), key_shape=(2, 1500, 2, 64))
    assert plan(asked).scalars[-1] == 32
    assert plan(request()).scalars[-1] == 16


def test_short_causal_sequences_take_the_smaller_tile() -> None:
    asked = request(causal=True)
    assert plan(asked).tile.m == 128
    assert plan(asked._replace(query_shape=(2, 9000, 8, 64))).tile.m == 192


def test_the_installed_triton_is_tested_or_the_reason_is_said() -> None:
    import triton

    found = why_untested(triton.__version__, why_no_gluon())
    assert (found is None) == triton.__version__.startswith("3.6.")


def test_a_gluon_that_cannot_be_imported_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from fa4_triton import hopper

    def broken(name: str) -> Any:
        raise AttributeError("module 'gluon' has no attribute 'jit'")

    monkeypatch.setattr(hopper.importlib, "import_module", broken)
    reason = why_no_gluon.__wrapped__()
    assert reason == "AttributeError: module 'gluon' has no attribute 'jit'"
    assert "Gluon cannot be used" in str(why_untested("3.6.0", reason))
