"""Providers that are broken in one way each, and the standard tests that find it."""

from __future__ import annotations

from broken import contract, device, dispatch, heads_first, parity, rare, robustness
from broken.table import BROKEN, let_appear, unexpected, unmatched

__all__ = [
    "BROKEN",
    "contract",
    "device",
    "dispatch",
    "heads_first",
    "let_appear",
    "parity",
    "rare",
    "robustness",
    "unexpected",
    "unmatched",
]
