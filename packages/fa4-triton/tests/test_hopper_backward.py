"""Which backwards go to the Hopper kernels, for what reason not, and how one is laid out."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from fa4_triton.hopper import Situation, choose
from fa4_triton.hopper_backward import (
    MOST_SIDE_BY_SIDE,
    OPERANDS,
    HopperBackwardPlan,
    KernelPlan,
    plan_hopper_backward,
    why_not_this_backward,
)
from fa4_triton.plan import Device, Request

DEVICE = Device("hopper", l2_bytes=50 << 20, multiprocessors=132)
SERVED = Situation("hopper", "3.6.0", None, 128, "bf16", "causal", "backward", False)


def request(**changes: Any) -> Request:
    """2 sequences of 1000 queries and 1500 keys, 8 query heads on 2 key heads, head_dim 64."""
    dense = Request((2, 1000, 8, 64), (2, 1500, 2, 64), False, None, None, None)
    return dense._replace(**changes)


def contiguous(asked: Request) -> tuple[tuple[int, ...], ...]:
    """Strides of query, key, value, grad_out, out, dq, dk and dv."""
    query, key = (
        tuple(torch.empty(shape, device="meta").stride())
        for shape in (asked.query_shape, asked.key_shape)
    )
    return query, key, key, query, query, query, key, key


def obstacle(asked: Request, **changes: Any) -> str | None:
    given = {"strides": contiguous(asked), "alignment": 0xFF, "small_scale": False}
    return why_not_this_backward(asked, **{**given, **changes})


def plan(asked: Request) -> HopperBackwardPlan:
    mask = "causal" if asked.causal else "none"
    tile = choose(SERVED._replace(head_dim=asked.query_shape[-1], mask=mask)).backward
    assert tile is not None
    return plan_hopper_backward(DEVICE, asked, contiguous(asked), tile)


def kernels(asked: Request) -> dict[str, KernelPlan]:
    return {kernel.kernel: kernel for kernel in plan(asked).kernels}


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("head_dim", range(40, 257, 8))
def test_every_head_dim_from_40_is_served_by_a_tile_that_holds_it(head_dim: int, mask: Any) -> None:
    choice = choose(SERVED._replace(head_dim=head_dim, mask=mask))
    assert choice.reason is None
    assert choice.backward is not None
    assert choice.backward.d // 2 < head_dim <= choice.backward.d


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architecture": "ampere"}, "do not run on ampere"),
        ({"triton": "3.7.1"}, r"tested with Triton 3\.6\.x only, and this is 3\.7\.1"),
        ({"gluon": "ImportError: none"}, "Gluon cannot be used: ImportError: none"),
        ({"varlen": True}, "packed sequences"),
        ({"mask": "window"}, "a window"),
        ({"head_dim": 32}, "head_dim 32"),
        ({"deterministic": True}, "deterministic gradients"),
        ({"deterministic": True, "head_dim": 64}, "deterministic gradients"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_not_served_goes_to_the_portable_kernels_for_a_reason(
    change: dict[str, Any], reason: str
) -> None:
    choice = choose(SERVED._replace(**change))
    assert choice.backward is None
    assert choice.reason is not None
    assert re.search(reason, choice.reason)


def test_wide_heads_have_deterministic_gradients_anyway() -> None:
    choice = choose(SERVED._replace(head_dim=256, deterministic=True))
    assert choice.reason is None
    assert choice.backward == choose(SERVED._replace(head_dim=256)).backward


def test_a_forward_does_not_care_for_determinism() -> None:
    forward = SERVED._replace(direction="forward")
    assert choose(forward._replace(deterministic=True)) == choose(forward)
    assert choose(forward).backward is None


@pytest.mark.parametrize(
    ("asked", "changes", "reason"),
    [
        (request(), {"small_scale": True}, "a scale that is zero"),
        (request(query_shape=(2, 0, 8, 64)), {}, "no queries"),
        (request(key_shape=(2, 0, 2, 64)), {}, "no keys"),
        (request(), {"alignment": 0b10111111}, "does not start at a multiple of 16 bytes"),
        (request(query_shape=(1 << 16, 8192, 8, 64)), {}, "row statistics"),
    ],
)
def test_a_call_that_has_to_go_elsewhere_says_why(
    asked: Request, changes: dict[str, Any], reason: str
) -> None:
    assert obstacle(request()) is None
    found = obstacle(asked, **changes)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize("operand", range(8))
@pytest.mark.parametrize(
    ("stride", "reason"),
    [(0, "an expanded dimension"), (516, "no multiples of 16 bytes"), (1 << 39, "a tebibyte")],
)
def test_every_tensor_needs_strides_that_tma_can_walk(
    operand: int, stride: int, reason: str
) -> None:
    strides = list(contiguous(request()))
    batch, _, *rest = strides[operand]
    strides[operand] = (batch, stride, *rest)
    found = obstacle(request(), strides=tuple(strides))
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["prepare", "fused", "finish"]),
        ({"causal": True}, ["prepare", "fused", "finish", "repair"]),
        (
            {"query_shape": (2, 1000, 8, 192), "key_shape": (2, 1500, 2, 192), "causal": True},
            ["prepare", "dkdv", "dq", "repair"],
        ),
    ],
)
def test_kernels_of_a_backward(changes: dict[str, Any], names: list[str]) -> None:
    assert list(kernels(request(**changes))) == names


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_workspaces_hold_every_row_and_do_not_overlap(head_dim: int, causal: bool) -> None:
    asked = request(
        query_shape=(2, 1000, 8, head_dim), key_shape=(2, 1500, 2, head_dim), causal=causal
    )
    found = plan(asked)
    lse, delta, sums, counters = found.offsets
    rows = delta - lse
    block = kernels(asked)["prepare"]
    assert rows == block.programs * 64 >= 2 * 8 * 1000
    assert sums - delta == rows
    assert counters - sums == (0 if head_dim == 256 else rows * head_dim)
    assert found.workspace == counters + 2
    assert all(offset * 4 % 16 == 0 for offset in found.offsets)  # as TMA and the compiler want it


def test_views_show_tensors_as_tma_wants_them() -> None:
    fused = kernels(request(causal=True))["fused"]
    views = {OPERANDS[view.operand]: view for view in fused.views}
    assert views["query"] == (0, (2, 8, 1000, 64), (512000, 64, 512, 1), (1, 1, 128, 64))
    assert views["dk"][1:] == ((2, 2, 1500, 64), (192000, 64, 128, 1), (1, 1, 64, 64))
    assert views["negative_lse"].block == views["delta"].block == (128,)
    # 16 rows of 1024 queries padded to blocks, in lines.
    assert views["sums"].shape == (16 * 1024 * 64 // 256, 256)


def test_a_batch_of_one_may_have_any_stride_there() -> None:
    asked = request(query_shape=(1, 1000, 8, 64), key_shape=(1, 1500, 2, 64))
    strides = tuple((7, *rest) for _, *rest in contiguous(asked))
    assert obstacle(asked, strides=strides) is None
    tile = choose(SERVED._replace(head_dim=64, mask="none")).backward
    assert tile is not None
    found = plan_hopper_backward(DEVICE, asked, strides, tile)
    for kernel in found.kernels:
        for view in kernel.views:
            assert all(stride % 4 == 0 for stride in view.strides[:-1])


def test_heads_go_side_by_side_under_a_mask_as_far_as_the_l2_cache_holds_them() -> None:
    def section(seq_len: int, causal: bool) -> int:
        shape = (2, seq_len, 32, 64)
        fused = kernels(request(query_shape=shape, key_shape=shape, causal=causal))["fused"]
        return fused.ints[7]

    assert section(1024, causal=False) == section(65536, causal=False) == 1
    assert section(1024, causal=True) == MOST_SIDE_BY_SIDE
    assert 1 < section(16384, causal=True) < MOST_SIDE_BY_SIDE
    assert section(1 << 20, causal=True) == 1


def test_no_more_programs_than_tiles_or_multiprocessors() -> None:
    few = kernels(request(query_shape=(1, 100, 2, 256), key_shape=(1, 100, 2, 256)))
    assert few["dkdv"].programs == 2 * math.ceil(100 / 64)
    assert few["dq"].programs == 2
    assert kernels(request(causal=True))["fused"].programs == min(
        132, 2 * 2 * math.ceil(1500 / 128)
    )
