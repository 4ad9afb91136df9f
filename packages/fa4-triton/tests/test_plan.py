"""From the looks of a call to a launch: no GPU, no tensor memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fa4_triton.plan import (
    Device,
    Packed,
    Plan,
    Request,
    plan_key_gradients,
    plan_queries,
    request_of,
)
from fa4_triton.tiles import tile
from flash_attention_registry.sdpa import AttentionCall

DEVICE = Device("hopper", l2_bytes=50 << 20, multiprocessors=132)


def request(**changes: Any) -> Request:
    """2 sequences of 1000 queries and 1500 keys, 8 query heads on 2 key heads, head_dim 64."""
    dense = Request((2, 1000, 8, 64), (2, 1500, 2, 64), False, None, None, None)
    return dense._replace(**changes)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


TENSORS = {"forward": "qkkq", "dq": "qkkqqq", "dkdv": "qkkqkk", "dk": "qkkqkk", "dv": "qkkqkk"}
"""Whether each tensor of a kernel is shaped like the query or like the key."""


def plan(asked: Request, *, kernel: Any = "forward", alignment: int = 15, **options: Any) -> Plan:
    """Plan a kernel for contiguous tensors, or for the strides given."""
    shapes = {"q": asked.query_shape, "k": asked.key_shape}
    strides = options.pop("strides", tuple(contiguous(shapes[one]) for one in TENSORS[kernel]))
    make = plan_queries if kernel in ("forward", "dq") else plan_key_gradients
    return make(kernel, DEVICE, asked, strides, alignment, **options)


def test_a_program_for_each_block_of_rows_of_each_query_head() -> None:
    rows = tile("hopper", "forward", 64).m
    assert plan(request()).programs == 2 * 8 * -(-1000 // rows)


def test_a_program_for_each_block_of_keys_of_each_key_head() -> None:
    keys = tile("hopper", "dkdv", 64).n
    assert plan(request(), kernel="dkdv").programs == 2 * 2 * -(-1500 // keys)


def test_packed_sequences_count_as_long_as_the_longest() -> None:
    asked = request(query_shape=(700, 8, 64), key_shape=(900, 2, 64), packed=Packed(5, 333, 450))
    rows = tile("hopper", "forward", 64).m
    planned = plan(asked)
    assert planned.constants.varlen
    assert planned.programs == 5 * 8 * -(-333 // rows)
    # Batches are rows: no batch stride.
    assert planned.scalars[:3] == (0, 64 // 8, 8 * 64 // 8)


@pytest.mark.parametrize("sizes", [Packed(0, 333, 450), Packed(5, 0, 0)], ids=str)
@pytest.mark.parametrize("kernel", TENSORS)
def test_without_a_sequence_that_has_rows_there_is_no_program(kernel: str, sizes: Packed) -> None:
    asked = request(query_shape=(700, 8, 64), key_shape=(900, 2, 64), packed=sizes)
    assert plan(asked, kernel=kernel).programs == 0


def test_strides_count_in_units_of_16_bytes_where_all_allow_it() -> None:
    planned = plan(request())
    assert planned.constants.unit == 8
    assert planned.scalars[:6] == (64000, 8, 64, 24000, 8, 16)


def test_one_odd_stride_makes_all_strides_count_elements() -> None:
    strides = [contiguous((2, 1000, 8, 64))] * 4
    strides[2] = (1, 513, 64, 1)
    planned = plan(request(), strides=tuple(strides))
    assert planned.constants.unit == 1
    assert planned.scalars[:3] == (512000, 64, 512)
    assert planned.scalars[6:9] == (1, 64, 513)


def test_the_stride_of_a_dimension_of_one_does_not_count() -> None:
    asked = request(query_shape=(1, 1000, 1, 64), key_shape=(1, 1500, 1, 64))
    planned = plan(asked, strides=((7, 64, 3, 1),) * 4)
    assert planned.constants.unit == 8
    assert planned.scalars[:3] == (0, 0, 8)


@pytest.mark.parametrize(("row_stride", "wide"), [(512, False), (1 << 24, False), (1 << 26, True)])
def test_offsets_take_64_bits_only_where_a_tile_is_that_long(row_stride: int, wide: bool) -> None:
    strides = ((0, row_stride, 64, 1),) * 4
    assert plan(request(), strides=strides).constants.wide is wide


@pytest.mark.parametrize(
    ("window", "causal", "has"),
    [
        ((None, None), False, (False, False)),
        ((None, None), True, (False, True)),
        ((10, None), True, (True, True)),
        ((10, 20), False, (True, True)),
        ((0, None), False, (True, False)),
        ((None, 5), False, (False, True)),
        ((2500, 2500), False, (False, False)),
        ((1 << 40, None), True, (False, True)),
    ],
    ids=str,
)
def test_bounds_that_hide_nothing_cost_nothing(window: Any, causal: bool, has: Any) -> None:
    asked = request(window_left=window[0], window_right=window[1], causal=causal)
    constants = plan(asked).constants
    assert (constants.has_left, constants.has_right) == has


def test_what_a_kernel_is_compiled_for_does_not_depend_on_lengths_or_counts() -> None:
    other = request(query_shape=(3, 17, 6, 64), key_shape=(3, 5000, 3, 64))
    for kernel in ("forward", "dq", "dkdv"):
        assert plan(request(), kernel=kernel).constants == plan(other, kernel=kernel).constants


def test_what_a_kernel_is_compiled_for_tells_apart_what_must_be() -> None:
    distinct = {
        plan(request()).constants,
        plan(request(), negative_scale=True).constants,
        plan(request(), alignment=7).constants,
        plan(request(causal=True)).constants,
    }
    assert len(distinct) == 4
    one_head = request(query_shape=(2, 1000, 2, 64))
    assert plan(one_head, kernel="dkdv").constants.mha
    assert not plan(request(), kernel="dkdv").constants.mha
    gradients = [plan(request(), kernel=kernel).constants.gradients for kernel in ("dk", "dv")]
    assert gradients == ["dk", "dv"]


@pytest.mark.parametrize(("rows", "heads"), [(1 << 20, 4), (1000, 16)])
def test_heads_side_by_side_are_as_many_as_the_cache_holds(rows: int, heads: int) -> None:
    """A million keys fit for no two key heads: then only those that share one run together."""
    asked = request(key_shape=(2, rows, 2, 64))
    assert plan(asked).scalars[-1] == heads


def test_a_request_is_what_of_a_call_decides() -> None:
    query, key = (torch.empty(shape, device="meta") for shape in ((2, 5, 4, 64), (2, 7, 2, 64)))
    call = AttentionCall(query, key, key, 1.0, True, 3)
    expected = Request((2, 5, 4, 64), (2, 7, 2, 64), True, 3, None, None)
    assert request_of(call) == expected
    assert hash(request_of(call)) == hash(request_of(call._replace(scale=2.0)))
    offsets = torch.empty(4, dtype=torch.int32, device="meta")
    packed = AttentionCall(
        *(query[0], key[0], key[0], 1.0, False),
        cu_seqlens_query=offsets,
        cu_seqlens_key=offsets,
        max_seqlen_query=3,
        max_seqlen_key=4,
    )
    assert request_of(packed).packed == Packed(3, 3, 4)


@pytest.mark.parametrize("said", [6, 1 << 20, 1 << 30, (1 << 31) + 1])
def test_no_packed_sequence_counts_as_longer_than_all_rows(said: int) -> None:
    query, key = (torch.empty(shape, device="meta") for shape in ((5, 4, 64), (3, 2, 64)))
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    call = AttentionCall(query, key, key, 1.0, False, None, None, offsets, offsets, said, said)
    assert request_of(call).packed == Packed(2, 5, 3)
