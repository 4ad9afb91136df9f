"""Which calls go to the Hopper kernels, for what reason not, and how a forward is laid out."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from fa4_triton.hopper import (
    FEWEST_ROWS,
    Choice,
    HopperPlan,
    Situation,
    choose,
    plan_hopper_forward,
    situation_of,
    why_no_gluon,
    why_not_this_call,
    why_untested,
)
from fa4_triton.plan import Device, Packed, Request

DEVICE = Device("hopper", l2_bytes=50 << 20, multiprocessors=132)
SERVED = Situation("hopper", "3.6.0", None, 128, "bf16", "causal", "forward", False)


def request(**changes: Any) -> Request:
    """2 sequences of 1000 queries and 1500 keys, 8 query heads on 2 key heads, head_dim 64."""
    dense = Request((2, 1000, 8, 64), (2, 1500, 2, 64), False, None, None, None)
    return dense._replace(**changes)


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
    mask = "causal" if asked.causal else "none"
    choice = choose(SERVED._replace(head_dim=head_dim, mask=mask))
    tile = choice.tile(asked.query_shape[1])
    return plan_hopper_forward(DEVICE, asked, strides or contiguous(asked), tile)


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("head_dim", range(40, 257, 8))
def test_every_head_dim_from_40_is_served_by_a_tile_that_holds_it(head_dim: int, mask: Any) -> None:
    choice = choose(SERVED._replace(head_dim=head_dim, mask=mask))
    assert choice.reason is None
    for rows in (1, 1000, 1 << 20):
        tile = choice.tile(rows)
        assert tile.d // 2 < head_dim <= tile.d
        assert tile.m in (128, 192)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architecture": "ampere"}, "do not run on ampere"),
        ({"architecture": "interpreter"}, "do not run on interpreter"),
        ({"triton": "3.7.1"}, r"tested with Triton 3\.6\.x only, and this is 3\.7\.1"),
        ({"triton": "3.60.0"}, "this is 3.60.0"),
        ({"gluon": "ImportError: none"}, "Gluon cannot be used: ImportError: none"),
        ({"varlen": True}, "packed sequences"),
        ({"mask": "window"}, "a window"),
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
    asked = request(query_shape=(700, 8, 64), key_shape=(900, 2, 64), packed=Packed(5, 333, 450))
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
        (request(query_shape=(2, FEWEST_ROWS - 1, 8, 64)), {}, "fewer than 64 queries"),
        (request(), {"alignment": 0b1011}, "does not start at a multiple of 16 bytes"),
    ],
)
def test_some_calls_cannot_go_to_the_hopper_kernels(
    asked: Request, changes: dict[str, Any], reason: str
) -> None:
    assert reason in str(obstacle(asked, **changes))


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
    assert (planned.causal, planned.tail) == (causal, tail)


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
