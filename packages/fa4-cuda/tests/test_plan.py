"""Which tile, grid and schedule a call gets: decided from sizes alone."""

from __future__ import annotations

from typing import Any

import pytest

OK, INVALID, HEAD_DIM, STRIDE, SIZE = 0, 1, 2, 3, 4
FULL, CAUSAL, WINDOW = 0, 1, 2
HEAD_DIMS = (64, 96, 128, 192, 256)
BY_GRADIENTS = 1
"""The split of tiles whose dQ has a kernel of its own."""


def tile_of(planner: Any, **call: Any) -> Any:
    status, plan = planner.plan(**call)
    assert status == OK
    return planner.tiles()[plan.tile]


def test_table_has_every_head_dim_and_mask(planner) -> None:
    rows = {(tile.head_dim, tile.mask) for tile in planner.tiles()}
    assert rows == {(d, mask) for d in HEAD_DIMS for mask in (FULL, CAUSAL, WINDOW)}


def test_tiles_fit_shared_memory(planner) -> None:
    assert all(tile.shared_bytes <= 227 * 1024 for tile in planner.tiles())


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_head_dims_are_served_by_the_next_tile(planner, head_dim: int) -> None:
    expected = min(d for d in HEAD_DIMS if d >= head_dim)
    assert tile_of(planner, head_dim=head_dim).head_dim == expected


@pytest.mark.parametrize("head_dim", [0, 4, 12, 100, 264])
def test_other_head_dims_are_declined(planner, head_dim: int) -> None:
    assert planner.plan(head_dim=head_dim)[0] == HEAD_DIM


@pytest.mark.parametrize(
    ("call", "mask"),
    [
        ({}, FULL),
        ({"causal": 1}, CAUSAL),
        ({"causal": 1, "window_right": 5}, CAUSAL),
        ({"window_right": 0}, CAUSAL),
        ({"window_left": 100}, WINDOW),
        ({"window_left": 100, "causal": 1}, WINDOW),
        # Windows as wide as the sequence hide nothing.
        ({"window_left": 1023, "window_right": 1023}, FULL),
        ({"window_left": 1022, "window_right": 1022}, WINDOW),
        ({"window_left": 1023, "causal": 1}, CAUSAL),
        ({"seq_q": 1, "seq_k": 4096, "causal": 1}, FULL),
    ],
)
def test_mask_is_the_least_that_is_needed(planner, call: dict[str, Any], mask: int) -> None:
    assert tile_of(planner, **call).mask == mask


def test_grid_is_the_multiprocessors_or_the_tiles_if_fewer(planner) -> None:
    assert planner.plan()[1].grid == 132
    few = planner.plan(batch=1, heads_q=2, seq_q=64)[1]
    assert few.tiles == 2
    assert few.grid == 2


def test_every_query_is_in_a_tile(planner) -> None:
    for seq in (1, 63, 64, 65, 127, 128, 129, 1000):
        plan = planner.plan(seq_q=seq, batch=3, heads_q=5)[1]
        assert plan.tiles == -(-seq // plan.tile_queries) * 3 * 5


def test_nothing_to_do_is_no_tiles(planner) -> None:
    for empty in ({"seq_q": 0}, {"batch": 0}, {"heads_q": 0, "heads_k": 0}):
        status, plan = planner.plan(**empty)
        assert (status, plan.tiles) == (OK, 0)


def test_no_keys_still_write_their_rows(planner) -> None:
    assert planner.plan(seq_k=0)[1].tiles > 0


def test_query_heads_of_a_group_share_a_tile_when_queries_are_few(planner) -> None:
    assert planner.plan(heads_q=32, heads_k=8, seq_q=1, seq_k=4096)[1].packed_heads == 4
    assert planner.plan(heads_q=32, heads_k=8, seq_q=4096)[1].packed_heads == 1
    assert planner.plan(heads_q=32, heads_k=32, seq_q=1, seq_k=4096)[1].packed_heads == 1


def test_groups_larger_than_a_slab_are_not_packed(planner) -> None:
    assert planner.plan(heads_q=65, heads_k=1, seq_q=1, seq_k=512)[1].packed_heads == 1


def test_tiles_of_different_length_are_drawn_and_equal_ones_are_dealt(planner) -> None:
    def dynamic(**call: Any) -> bool:
        plan = planner.plan(**call)[1]
        assert plan.workspace_bytes == (16 if plan.dynamic else 0)
        return bool(plan.dynamic)

    assert not dynamic()
    assert not dynamic(seq_q=113, seq_k=4093)  # one tile a head
    assert dynamic(seq_q=1000)  # the last of each head is short
    assert dynamic(causal=1)
    assert dynamic(window_left=100)
    assert dynamic(seqused_k=4096)


def test_sections_hold_at_most_sixteen_heads_of_keys(planner) -> None:
    assert planner.plan(causal=1)[1].section_keys == 16 * 1024
    assert planner.plan(causal=1, heads_q=16, heads_k=4)[1].section_keys == 4 * 16 * 1024
    assert planner.plan()[1].section_keys == 0


def test_sections_hold_the_keys_that_fit_l2(planner) -> None:
    # 32 MB of K and V at head_dim 128 in two bytes: 64k keys, of heads that do not share them.
    assert planner.plan(causal=1, seq_q=16384)[1].section_keys == 65536


def test_of_a_window_only_the_keys_that_are_in_use_need_fit(planner) -> None:
    # 64k keys of 128 columns fit: of a window of 1024 and eight tiles, those of 32 heads.
    call = {"seq_q": 8192, "heads_q": 16, "causal": 1}
    assert planner.plan(**call)[1].section_keys == 65536
    assert planner.plan(**call, window_left=1023)[1].section_keys == 16 * 8192
    assert planner.plan(**call, window_left=8000)[1].section_keys == 65536


def test_sections_of_very_many_shared_heads_do_not_overflow(planner) -> None:
    plan = planner.plan(causal=1, heads_q=2**14, heads_k=1, head_dim=8, seq_q=2**18)[1]
    assert plan.section_keys == 2**31 - 1


def packed(**changes: Any) -> dict[str, Any]:
    return {
        "batch": 5,
        "seq_q": 8192,
        "total_q": 16384,
        "total_k": 16384,
        "cu_seqlens_q": 4096,
        "cu_seqlens_k": 4096,
        **changes,
    }


def test_packed_sequences_have_a_table_and_at_most_one_short_tile_each(planner) -> None:
    plan = planner.plan(**packed())[1]
    assert plan.dynamic
    assert plan.workspace_bytes == 16 + 4 * (2 * 5 + 1)
    assert plan.tiles == (16384 // plan.tile_queries + 5) * 16


@pytest.mark.parametrize(
    "call",
    [
        {"element": 2},
        {"heads_q": 6, "heads_k": 4},
        {"seq_q": -1, "seq_k": 5},
        packed(cu_seqlens_k=0),
        packed(total_q=-1),
        {"lse": 0},
    ],
)
def test_contradictions_are_named(planner, call: dict[str, Any]) -> None:
    assert planner.plan(**call)[0] == INVALID


@pytest.mark.parametrize("tensor", ["q", "k", "v", "out"])
@pytest.mark.parametrize(
    ("data", "stride_batch", "stride_seq", "stride_head"),
    [
        (4104, 2**21, 2048, 128),
        (4096, 2**21, 2044, 128),
        (4096, 2**21, 2048, -128),
        (4096, 2**39, 2048, 128),
        (4096, 2**21 + 1, 2048, 128),
    ],
)
def test_what_the_copy_engine_cannot_address_is_declined(
    planner, tensor: str, data: int, stride_batch: int, stride_seq: int, stride_head: int
) -> None:
    view = planner.tensor(data, stride_batch, stride_seq, stride_head)
    assert planner.plan(**{tensor: view})[0] == STRIDE


def test_strides_of_dimensions_of_one_do_not_matter(planner) -> None:
    view = planner.tensor(4096, 3, 2048, 7)
    status, _ = planner.plan(batch=1, heads_q=1, q=view)
    assert status == OK


def test_too_many_rows_are_declined(planner) -> None:
    assert planner.plan(seq_q=2**30)[0] == SIZE
    assert planner.plan(seq_q=2**20, batch=2**10, heads_q=2**8)[0] == SIZE


def test_statuses_have_sentences(planner) -> None:
    texts = {planner.library.fa4_error_string(status) for status in range(8)}
    assert len(texts) == 8
    assert b"CUDA call failed" in planner.library.fa4_error_string(-1)


QUERIES, KEYS = ("q", "out", "grad_out", "dq"), ("k", "v", "dk", "dv")


def backward_tile_of(planner: Any, **call: Any) -> Any:
    status, plan = planner.plan_backward(**call)
    assert status == OK
    return planner.backward_tiles()[plan.tile]


def test_table_of_the_backward_has_every_head_dim_and_mask(planner) -> None:
    # One that serves causal masks serves calls without a mask as well.
    rows = [(tile.head_dim, tile.mask) for tile in planner.backward_tiles()]
    assert sorted(rows) == [(d, mask) for d in HEAD_DIMS for mask in (CAUSAL, WINDOW)]


def test_tiles_of_the_backward_fit_shared_memory_and_the_rows_of_workspaces(planner) -> None:
    for tile in planner.backward_tiles():
        assert max(tile.shared_bytes, tile.query_shared_bytes) <= 227 * 1024
        assert 128 % tile.block_m == 0


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_backwards_are_served_by_the_next_tile(planner, head_dim: int) -> None:
    expected = min(d for d in HEAD_DIMS if d >= head_dim)
    assert backward_tile_of(planner, head_dim=head_dim).head_dim == expected


@pytest.mark.parametrize(
    ("call", "mask"),
    [
        ({}, CAUSAL),
        ({"causal": 1}, CAUSAL),
        ({"window_right": 5}, CAUSAL),
        ({"window_left": 100}, WINDOW),
        ({"window_left": 100, "causal": 1}, WINDOW),
        # Windows as wide as the sequence hide nothing.
        ({"window_left": 1023, "causal": 1}, CAUSAL),
        ({"window_left": 1023, "window_right": 1023}, CAUSAL),
    ],
)
def test_mask_of_a_backward_is_the_least_that_is_needed(
    planner, call: dict[str, Any], mask: int
) -> None:
    for head_dim in HEAD_DIMS:
        assert backward_tile_of(planner, head_dim=head_dim, **call).mask == mask


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("seq_k", [1, 63, 64, 65, 128, 129, 1000])
def test_every_key_is_in_a_thread_block(planner, head_dim: int, seq_k: int) -> None:
    call = {"head_dim": head_dim, "seq_k": seq_k, "batch": 1, "heads_q": 10, "heads_k": 5}
    plan = planner.plan_backward(**call)[1]
    block_n = planner.backward_tiles()[plan.tile].block_n
    assert plan.grid == -(-seq_k // block_n) * 5


def test_every_packed_sequence_has_as_many_thread_blocks_as_the_longest(planner) -> None:
    call = packed(seq_k=700, heads_k=2)
    plan = planner.plan_backward(**call)[1]
    assert plan.grid == -(-700 // planner.backward_tiles()[plan.tile].block_n) * 5 * 2


def test_a_backward_without_keys_has_no_thread_blocks_and_one_without_queries_has(planner) -> None:
    status, plan = planner.plan_backward(seq_k=0)
    assert (status, plan.grid) == (OK, 0)
    status, plan = planner.plan_backward(seq_q=0, seq_k=1024)
    assert status == OK
    assert plan.grid > 0  # their gradients are zero, and somebody has to write so
    assert plan.workspace_bytes == 0
    for empty in ({"batch": 0}, {"heads_q": 0, "heads_k": 0}):
        status, plan = planner.plan_backward(**empty)
        assert (status, plan.grid, plan.workspace_bytes) == (OK, 0, 0)


@pytest.mark.parametrize("head_dim", [0, 4, 12, 100, 264])
def test_backwards_of_other_head_dims_are_declined(planner, head_dim: int) -> None:
    assert planner.plan_backward(head_dim=head_dim)[0] == HEAD_DIM


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
@pytest.mark.parametrize("mask", [{}, {"causal": 1}, {"window_left": 100, "window_right": 3}])
def test_every_forward_that_is_served_has_a_backward(
    planner, head_dim: int, mask: dict[str, int]
) -> None:
    for shape in ({}, {"heads_k": 2}, {"seq_q": 1, "seq_k": 1000}, packed()):
        call = {"head_dim": head_dim, **mask, **shape}
        assert planner.plan(**call)[0] == OK
        assert planner.plan_backward(**call)[0] == OK


@pytest.mark.parametrize("asked", [0, 1])
def test_a_backward_is_planned_as_deterministic_if_it_is_asked_to_be(planner, asked: int) -> None:
    assert planner.plan_backward(deterministic=asked)[1].deterministic == asked


@pytest.mark.parametrize("heads_k", [16, 4, 1])
@pytest.mark.parametrize("seq", [1024, 1000, 1])
@pytest.mark.parametrize("head_dim", [8, 64, 96, 128, 136, 256])
@pytest.mark.parametrize("deterministic", [0, 1])
def test_the_workspace_is_one_dq_and_two_numbers_a_row(
    planner, heads_k: int, seq: int, head_dim: int, deterministic: int
) -> None:
    plan = planner.plan_backward(
        head_dim=head_dim, heads_k=heads_k, seq_q=seq, seq_k=16384, deterministic=deterministic
    )[1]
    if planner.backward_tiles()[plan.tile].split == BY_GRADIENTS:
        head_dim = 0  # nothing is summed
    assert plan.workspace_bytes >= 2 * 16 * seq * (head_dim + 2) * 4
    # In whole tiles; and beside it, where sums are to be in order, whose turn it is.
    rows = 2 * 16 * -(-seq // 128) * 128
    columns = min(d for d in (0, *HEAD_DIMS) if d >= head_dim)
    turns = rows // 64 * -(-columns // 64) * deterministic
    assert plan.workspace_bytes <= (rows * (columns + 2) + turns) * 4 + 128


def test_the_workspace_of_packed_sequences_begins_each_at_a_whole_tile(planner) -> None:
    plan = planner.plan_backward(**packed())[1]
    assert plan.workspace_bytes >= 16 * 16384 * (128 + 2) * 4
    counters = 2 * 128 + 5 * 16 * 4
    assert plan.workspace_bytes <= 16 * (16384 + 5 * 128) * (128 + 2) * 4 + counters


@pytest.mark.parametrize(
    "call",
    [
        {"element": 2},
        {"heads_q": 6, "heads_k": 4},
        {"seq_q": -1, "seq_k": 5},
        packed(cu_seqlens_k=0),
        packed(total_q=-1),
        {"lse": 0},
    ],
)
def test_contradictions_in_a_backward_are_named(planner, call: dict[str, Any]) -> None:
    assert planner.plan_backward(**call)[0] == INVALID


@pytest.mark.parametrize("tensor", QUERIES + KEYS)
def test_every_tensor_of_a_backward_has_to_be_there(planner, tensor: str) -> None:
    view = planner.tensor(0, 2**21, 2048, 128)
    assert planner.plan_backward(**{tensor: view})[0] == INVALID
    # Tensors without elements have no address; those of the other side have gradients all the same.
    empty = {"seq_q": 0, "seq_k": 1024} if tensor in QUERIES else {"seq_k": 0}
    side = dict.fromkeys(QUERIES if tensor in QUERIES else KEYS, view)
    assert planner.plan_backward(**side, **empty)[0] == OK


@pytest.mark.parametrize("tensor", QUERIES + KEYS)
@pytest.mark.parametrize(
    ("data", "stride_seq", "stride_head"),
    [(4104, 2048, 128), (4096, 2044, 128), (4096, 2048, -128)],
)
def test_what_a_backward_cannot_address_is_declined(
    planner, tensor: str, data: int, stride_seq: int, stride_head: int
) -> None:
    view = planner.tensor(data, 2**21, stride_seq, stride_head)
    assert planner.plan_backward(**{tensor: view})[0] == STRIDE


def test_backwards_with_too_many_rows_are_declined(planner) -> None:
    assert planner.plan_backward(seq_q=2**30)[0] == SIZE
    assert planner.plan_backward(seq_k=2**30)[0] == SIZE
    many = {"batch": 2**10, "heads_q": 2**8}
    assert planner.plan_backward(seq_q=2**20, seq_k=64, **many)[0] == SIZE
    assert planner.plan_backward(seq_q=64, seq_k=2**20, **many)[0] == SIZE


@pytest.mark.parametrize(
    ("side", "last", "other"),
    [
        # The workspace holds 128 rows more or less, which are prepared 64 at a time.
        ("seq_q", 128 * (2**12 - 1), "seq_k"),
        ("seq_k", 64 * (2**13 - 1), "seq_q"),
    ],
)
def test_backwards_are_planned_up_to_what_a_grid_can_number(
    planner, side: str, last: int, other: str
) -> None:
    call = {"batch": 2**10, "heads_q": 2**8, "head_dim": 8, other: 64}
    status, plan = planner.plan_backward(**call, **{side: last})
    assert status == OK
    assert 0 < plan.grid < 2**31
    assert planner.plan_backward(**call, **{side: last + 1})[0] == SIZE


# The longest sequence of many has 2**16 rows: 1024 blocks of each would be too many.
MANY = packed(batch=2**18, heads_q=8, seq_q=2**16, total_q=2**17, total_k=2**17)


@pytest.mark.parametrize(
    "call",
    [
        MANY,
        {"batch": 2**10, "heads_q": 2**8, "seq_q": 64, "seq_k": 2**19},
        {"batch": 2**10, "heads_q": 2**8, "seq_q": 2**19, "seq_k": 64},
    ],
    ids=["packed", "keys", "queries"],
)
def test_a_forward_whose_backward_has_too_many_tiles_is_declined(
    planner, call: dict[str, Any]
) -> None:
    assert planner.plan_backward(**call)[0] == SIZE
    assert planner.plan(**call)[0] == SIZE
    fewer = {**call, "batch": call["batch"] // 2}
    assert planner.plan_backward(**fewer)[0] == planner.plan(**fewer)[0] == OK


def test_a_forward_that_no_backward_follows_may_be_of_any_number_of_sequences(planner) -> None:
    assert planner.plan(**MANY, seqused_k=4096)[0] == OK


def test_workspaces_of_the_backward_may_exceed_32_bits(planner) -> None:
    plan = planner.plan_backward(batch=64, seq_q=2**16, heads_q=64)[1]
    assert plan.workspace_bytes >= 64 * 2**16 * 64 * (128 + 2) * 4


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("mask", [{}, {"causal": 1}, {"window_left": 100}])
def test_a_grid_is_planned_for_dq_where_it_has_a_kernel(
    planner, head_dim: int, mask: dict[str, int]
) -> None:
    plan = planner.plan_backward(head_dim=head_dim, **mask)[1]
    has_kernel = planner.backward_tiles()[plan.tile].split == BY_GRADIENTS
    assert (plan.query_grid > 0) == has_kernel


@pytest.mark.parametrize("head_dim", [136, 192, 200, 256])
@pytest.mark.parametrize("mask", [{}, {"causal": 1}, {"window_left": 100}])
@pytest.mark.parametrize("seq", [1, 128, 129, 1024])
def test_a_kernel_for_dq_takes_its_queries_128_at_a_time(
    planner, head_dim: int, mask: dict[str, int], seq: int
) -> None:
    few = {"batch": 1, "heads_q": 6, "heads_k": 2}
    for sequences in ({"seq_q": seq}, packed(batch=1, seq_q=seq)):
        plan = planner.plan_backward(head_dim=head_dim, **{**few, **mask, **sequences})[1]
        assert plan.query_grid == min(132, -(-seq // 128) * 6)


def test_where_dq_has_a_kernel_the_workspace_is_two_numbers_a_row(planner) -> None:
    call = {"head_dim": 256, "seq_q": 1000, "seq_k": 4096}
    bytes_of = [
        planner.plan_backward(deterministic=asked, **call)[1].workspace_bytes for asked in (0, 1)
    ]
    assert bytes_of == [2 * 16 * 1024 * 2 * 4 + 128] * 2


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192])
@pytest.mark.parametrize("deterministic", [0, 1])
def test_who_zeroes_ahead_counts_by_key_head(planner, head_dim: int, deterministic: int) -> None:
    call = {"head_dim": head_dim, "seq_q": 1000, "heads_k": 20, "heads_q": 40}
    call["deterministic"] = deterministic

    def bytes_of(seq_k: int) -> int:
        return int(planner.plan_backward(**call, seq_k=seq_k)[1].workspace_bytes)

    # Long sequences are zeroed before, and without keys there is no main kernel.
    assert bytes_of(8193) == bytes_of(0)
    counters = 2 * 20 * 4
    zeroes = head_dim <= 128 and not deterministic
    assert bytes_of(8192) - bytes_of(8193) == (-(-counters // 128) * 128 if zeroes else 0)


def test_a_kernel_for_dq_is_launched_without_keys_too(planner) -> None:
    status, plan = planner.plan_backward(head_dim=256, seq_q=1024, seq_k=0)
    assert (status, plan.grid, plan.query_grid) == (OK, 0, 132)
    assert planner.plan_backward(head_dim=256, seq_q=0, seq_k=64)[1].query_grid == 0


def test_tiles_of_wide_heads_have_a_kernel_for_dq(planner) -> None:
    for tile in planner.backward_tiles():
        assert (tile.split == BY_GRADIENTS) == (tile.head_dim > 128)
        assert (tile.query_shared_bytes > 0) == (tile.head_dim > 128)
        assert max(tile.shared_bytes, tile.query_shared_bytes) <= 227 * 1024
