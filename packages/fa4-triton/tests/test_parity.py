"""Out, lse and gradients against the testkit's references, where kernels usually go wrong.

Small enough for Triton's interpreter; `test_parity_gpu.py` has the sizes of real use, and few
enough variants to compile them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def device() -> str:
    """The interpreter, whatever the other files' tests run on."""
    return "cpu"


HEAD_DIMS = (8, 64, 72, 80, 96, 128, 192, 256)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims_need_no_padding(parity: Callable[..., None], head_dim: int, dtype: str) -> None:
    parity(lengths=(17, 70), heads=(2, 1), head_dim=head_dim, dtype=dtype, causal=True)


@pytest.mark.parametrize(
    ("lengths", "causal"),
    [
        ((1, 1), False),
        ((1, 1), True),
        ((1, 130), False),
        ((1, 130), True),
        ((130, 1), False),
        ((130, 1), True),
        ((17, 17), True),
        ((17, 113), True),
        ((113, 17), False),
        ((113, 17), True),
        ((113, 113), False),
        ((128, 128), True),
        ((130, 113), True),
        ((130, 130), True),
    ],
    ids=str,
)
def test_lengths_need_not_be_equal_or_round(
    parity: Callable[..., None], lengths: tuple[int, int], causal: bool
) -> None:
    parity(lengths=lengths, causal=causal)


@pytest.mark.parametrize(
    ("lengths", "causal", "window"),
    [
        ((130, 130), False, (0, 0)),
        ((130, 130), False, (0, None)),
        ((130, 130), False, (20, 5)),
        ((130, 130), False, (None, 70)),
        ((130, 130), True, (33, None)),
        ((130, 130), True, (0, None)),
        ((113, 17), False, (5, 3)),
        ((17, 113), False, (5, 3)),
        ((17, 113), True, (64, None)),
        ((70, 70), False, (70, 70)),
        ((70, 70), False, (1 << 40, 1 << 40)),
        ((70, 70), True, (1000, None)),
    ],
    ids=str,
)
def test_windows_show_what_they_say(
    parity: Callable[..., None], lengths: Any, causal: bool, window: Any
) -> None:
    parity(lengths=lengths, causal=causal, window=window, head_dim=16)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (4, 4), (6, 2), (8, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_groups_of_heads_read_their_own_key_head(
    parity: Callable[..., None], heads: tuple[int, int], batch: int
) -> None:
    parity(lengths=(17, 30), heads=heads, batch=batch, head_dim=16, causal=True)


PACKED = {
    "uneven": ([5, 1, 130], [7, 130, 1]),
    "empty query": ([5, 0, 40], [7, 20, 64]),
    "empty key": ([5, 20, 40], [7, 0, 64]),
    "both empty": ([0, 33, 0, 2], [0, 33, 0, 2]),
    "one": ([70], [70]),
}


@pytest.mark.parametrize(
    ("causal", "window"),
    [(False, (None, None)), (True, (None, None)), (False, (10, 3))],
    ids=["all", "causal", "window"],
)
@pytest.mark.parametrize("lengths", PACKED.values(), ids=PACKED)
def test_packed_sequences_do_not_see_one_another(
    parity: Callable[..., None], lengths: Any, causal: bool, window: Any
) -> None:
    parity(lengths=lengths, heads=(2, 1), head_dim=32, causal=causal, window=window)


@pytest.mark.parametrize("lengths", [(40, 40), ([30, 10], [3, 37])], ids=["dense", "packed"])
@pytest.mark.parametrize("scale", [0.0, -0.3, 0.02, 1.0])
def test_scale_is_the_callers(parity: Callable[..., None], scale: float, lengths: Any) -> None:
    parity(lengths=lengths, scale=scale, causal=True)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("std", [0.3, 3.0])
def test_small_and_large_scores_keep_their_precision(
    parity: Callable[..., None], std: float, dtype: str
) -> None:
    parity(lengths=(70, 100), std=std, dtype=dtype, head_dim=72)


@pytest.mark.parametrize(
    "layout",
    [
        "heads first",
        "batch last",
        "padded rows",
        "odd strides",
        "misaligned",
        "one head for all",
        "one batch for all",
        "one row for all",
        "one projection",
    ],
)
def test_strides_are_arbitrary(parity: Callable[..., None], layout: str) -> None:
    parity(lengths=(35, 35), heads=(4, 2), batch=2, head_dim=40, layout=layout, causal=True)


@pytest.mark.parametrize("layout", ["padded rows", "odd strides", "one head for all"])
def test_strides_of_packed_sequences_are_arbitrary(
    parity: Callable[..., None], layout: str
) -> None:
    parity(lengths=([30, 5], [10, 25]), heads=(2, 2), head_dim=40, layout=layout)
