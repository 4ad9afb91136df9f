"""Out, lse and gradients on a GPU, at the sizes of real use.

Compiling takes most of the time. So each head dim is compiled for few variants, and each variant
meets several lengths, counts of heads and sizes of scores, which cost no compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

HEAD_DIMS = (64, 72, 80, 96, 128, 192, 256)

LENGTHS = (
    *((1, 1), (17, 17), (113, 113), (128, 128), (1000, 1000), (1023, 1023), (4096, 4096)),
    *((1, 4096), (17, 1000), (113, 1023), (128, 1000), (1000, 4096)),
    *((4096, 1), (1000, 17), (1023, 113), (1000, 128), (4096, 1000)),
)
PACKED = (
    ([1, 17, 113, 128, 1000, 1023], [1, 17, 113, 128, 1000, 1023]),
    ([4096, 0, 1, 17], [1000, 113, 0, 4096]),
    ([0, 0, 128], [17, 0, 4096]),
    ([1023, 1, 113], [17, 4096, 1000]),
    ([4096], [4096]),
)
GROUPS = ((3, 1), (8, 2), (8, 1), (4, 1), (6, 2))
STDS = (1.0, 0.3, 3.0)
LAYOUTS = ("rows first", "heads first", "padded rows", "batch last", "one head for all")

# What is compiled: masking and dtype here, beside packed or not and one query head a key head or
# more. A head dim takes every second one, its neighbour the others.
MASKS: tuple[dict[str, Any], ...] = (
    {"dtype": "bf16", "causal": True},
    {"dtype": "fp16", "causal": True},
    {"dtype": "fp16"},
    {"dtype": "bf16"},
)
WINDOWS: tuple[dict[str, Any], ...] = (
    {"dtype": "bf16", "window": (100, 30)},
    {"dtype": "fp16", "window": (128, None), "causal": True},
    {"dtype": "bf16", "window": (0, 0)},
    {"dtype": "fp16", "window": (None, 64)},
)
TIMES = 5


def _dense_and_packed() -> Iterator[dict[str, Any]]:
    lengths, packed, groups = cycle(LENGTHS), cycle(PACKED), cycle(GROUPS)
    stds, layouts, windows = cycle(STDS), cycle(LAYOUTS), cycle(WINDOWS)
    for number, head_dim in enumerate(HEAD_DIMS):
        for mask in MASKS[number % 2 :: 2]:
            for _ in range(TIMES):
                yield {
                    **{"head_dim": head_dim, **mask, "std": next(stds)},
                    **{"lengths": next(lengths), "heads": next(groups), "layout": next(layouts)},
                    "batch": 2,
                }
        # Packed sequences with and without a window in turn.
        variant = MASKS[number % 4] if number % 2 else next(windows)
        for _ in range(TIMES):
            yield {
                **{"head_dim": head_dim, **variant, "std": next(stds)},
                **{"lengths": next(packed), "heads": next(groups)},
            }


def _one_query_head_a_key_head() -> Iterator[dict[str, Any]]:
    lengths = cycle(LENGTHS)
    for head_dim, mask in zip((64, 80, 128, 256), MASKS, strict=True):
        for _ in range(TIMES):
            yield {
                **{"head_dim": head_dim, **mask, "lengths": next(lengths)},
                **{"heads": (3, 3), "batch": 2},
            }


def _dense_windows() -> Iterator[dict[str, Any]]:
    for head_dim, window in zip((64, 96, 128, 256), WINDOWS, strict=True):
        for lengths in LENGTHS[2::4]:
            yield {"head_dim": head_dim, **window, "lengths": lengths, "heads": (4, 2)}


def _the_rest() -> Iterator[dict[str, Any]]:
    for scale in (0.0, 0.5, -0.1):
        for lengths in ((1000, 1023), (17, 128)):
            yield {"scale": scale, "lengths": lengths, "heads": (8, 2), "causal": True}
    for layout in ("odd strides", "misaligned", "one projection", "one row for all"):
        yield {"layout": layout, "lengths": (1000, 1000), "heads": (8, 2), "causal": True}
    for head_dim in (8, 24, 120, 200):
        yield {"head_dim": head_dim, "lengths": (1000, 1023), "heads": (8, 2), "causal": True}


CASES = [*_dense_and_packed(), *_one_query_head_a_key_head(), *_dense_windows(), *_the_rest()]


def _name(case: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items() if key != "batch")


@pytest.fixture
def device() -> str:
    return "cuda"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_parity(parity: Callable[..., None], case: dict[str, Any]) -> None:
    parity(**case)
