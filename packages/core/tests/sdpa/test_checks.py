"""Windows in the form that kernels read."""

from __future__ import annotations

import pytest

from flash_attention_registry.sdpa.checks import normalised_window


@pytest.mark.parametrize(
    ("asked", "normalised"),
    [
        pytest.param((False, None, None), (False, None, None), id="none"),
        pytest.param((False, -1, -1), (False, None, None), id="minus-one-is-none"),
        pytest.param((True, None, None), (True, None, None), id="causal"),
        pytest.param((True, 3, 5), (True, 3, None), id="causal-wins-over-right"),
        pytest.param((False, -1, 0), (True, None, None), id="right-zero-is-causal"),
        pytest.param((False, 0, 0), (True, 0, None), id="diagonal-alone"),
        pytest.param((False, 3, 5), (False, 3, 5), id="both"),
        pytest.param((False, 20, 10), (False, None, None), id="bounds-beyond-the-ends"),
        pytest.param((False, 19, 9), (False, 19, 9), id="bounds-at-the-ends"),
        pytest.param((False, 2**40, 2**40), (False, None, None), id="huge"),
    ],
)
def test_window_is_normalised(
    asked: tuple[bool, int | None, int | None], normalised: tuple[bool, int | None, int | None]
) -> None:
    assert normalised_window(*asked, seq_len_query=10, seq_len_key=20) == normalised
