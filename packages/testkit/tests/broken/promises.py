"""Names of standard tests that several broken providers fail together."""

from __future__ import annotations

OUT = ("test_out_is_right",)
LSE = ("test_lse_is_right",)
DQ = ("test_gradient_of_query_is_right",)
DK = ("test_gradient_of_key_is_right",)
DV = ("test_gradient_of_value_is_right",)
FORWARD, BACKWARD = (*OUT, *LSE), (*DQ, *DK, *DV)
EVERYTHING = (*FORWARD, *BACKWARD)

ROWS_SEE = "test_rows_see_exactly_the_keys_that_the_mask_shows"
VALUES_COME_FROM = "test_gradients_of_value_come_from_exactly_the_rows_that_see_it"
MASKS = (ROWS_SEE, VALUES_COME_FROM)
WINDOWS = "test_windows_count_from_the_diagonal"
OUTSIDE = "test_keys_outside_of_the_window_may_be_anything"
NEIGHBOURS = "test_packed_neighbours_may_be_anything"
EMPTY_ROWS = (
    "test_lse_of_rows_without_keys_is_the_calls",
    "test_rows_without_keys_read_as_torchs",
)

TORCHS_BACKWARD, TORCHS_FORWARD = (
    "test_torchs_backward_may_follow",
    "test_torchs_forward_may_precede",
)
TORCH = (TORCHS_BACKWARD, TORCHS_FORWARD)
"""Whose out or lse is wrong does not go together with torch's own either."""

ZERO_SCALE = "test_a_scale_of_zero_averages_what_is_seen"
NEGATIVE_SCALE = "test_a_negative_scale_is_a_negative_query"
SCALE_IS_A_FACTOR = "test_a_scale_is_a_factor_of_the_query"
SCALE = "test_scale_is_the_callers"
SCALE_OF_BACKWARD = "test_scale_of_the_backward_is_the_callers"

OTHER_CALLS = (
    "test_masks_are_of_this_call",
    "test_packed_sequences_are_of_this_call",
    "test_sequences_may_be_many",
)
"""They compare calls with each other, which may or may not show what is wrong in all of them."""

DRAWN = "test_drawn_cases_are_right"
"""May find whatever is wrong, or may not: the cases differ between versions of hypothesis."""


def of(cases: str, tests: tuple[str, ...]) -> tuple[str, ...]:
    """These tests, of the cases that match."""
    return tuple(f"{test}[{cases}]" for test in tests)
