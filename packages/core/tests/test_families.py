"""Families: which member is taken, and what happens if none can be."""

from __future__ import annotations

import pytest

from flash_attention_registry import (
    CudaNeededError,
    FamilyUnavailableError,
    ImplUnavailableError,
    RegistryWarning,
    UnknownImplError,
)
from flash_attention_registry.cuda import before_using_cuda, without_cuda


@pytest.fixture
def member(registry, kernels):
    """Register a member of family FA4."""

    def register(name, priority=0, *, family="FA4", register_fn=None, **arguments):
        register_fn = register_fn or kernels.installer(name)
        registry.register(
            name, register_fn=register_fn, family=family, priority=priority, **arguments
        )

    return register


def test_the_greatest_priority_is_taken(registry, kernels, member):
    member("low", 1)
    member("high", 20)
    member("middle", 5)
    registry.activate("FA4")
    assert (registry.current(), kernels.running) == ("high", "high")


def test_the_alphabet_decides_between_equals(registry, member):
    member("b")
    member("a")
    registry.activate("FA4")
    assert registry.current() == "a"


def test_members_of_other_families_are_not_taken(registry, member):
    member("other", 99, family="FA3")
    member("ours")
    registry.activate("FA4")
    assert registry.current() == "ours"


@pytest.mark.parametrize("check", ["availability", "recommended"])
def test_a_member_with_a_reason_yields_to_the_next(registry, member, check):
    member("best", 10, **{check: lambda: "not on this GPU"})
    member("next", 1)
    registry.activate("FA4")
    assert registry.current() == "next"


def test_whether_it_is_recommended_is_not_asked_of_what_is_unavailable(registry, member, failing):
    member("best", 10, availability=lambda: "no", recommended=failing(KeyboardInterrupt()))
    member("next", 1)
    registry.activate("FA4")
    assert registry.current() == "next"


def test_a_member_that_fails_yields_to_the_next_with_a_warning(registry, kernels, member, failing):
    member("best", 10, register_fn=failing(OSError("gone")))
    member("next", 1)
    registry.register("before", register_fn=kernels.installer("before"))
    registry.activate("before")
    with pytest.warns(RegistryWarning, match="Passed over 'best' of family 'FA4'.*gone"):
        registry.activate("FA4")
    assert (registry.current(), kernels.installed) == ("next", ["next"])


def test_an_interrupt_does_not_yield_to_the_next(registry, kernels, member, failing):
    member("best", 10, register_fn=failing(KeyboardInterrupt()))
    member("next", 1)
    with pytest.raises(KeyboardInterrupt):
        registry.activate("FA4")
    assert (registry.current(), kernels.running) == (None, "stock")


@pytest.mark.filterwarnings("ignore::flash_attention_registry.RegistryWarning")
@pytest.mark.parametrize("active", ["before", None])
def test_if_no_member_is_left_each_reason_is_given_and_nothing_changes(
    registry, kernels, member, failing, active
):
    if active is not None:
        registry.register(active, register_fn=kernels.installer(active))
        registry.activate(active)
    member("raises", 3, register_fn=failing(OSError("gone")))
    member("absent", 2, availability=lambda: "needs sm_90")
    member("slow", 1, recommended=lambda: "cuDNN is faster here")
    with pytest.raises(FamilyUnavailableError) as caught:
        registry.activate("FA4")
    assert caught.value.reasons == {
        "raises": "its activation raised OSError: gone",
        "absent": "not available: needs sm_90",
        "slow": "not recommended here: cuDNN is faster here",
    }
    for name, reason in caught.value.reasons.items():
        assert f"\n  {name}: {reason}" in str(caught.value)
    assert "by its own name" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert isinstance(caught.value, ImplUnavailableError)
    assert (registry.current(), kernels.running) == (active, active or "stock")


def test_an_exact_name_is_obeyed_although_not_recommended(registry, member, failing):
    member("slow", recommended=failing(KeyboardInterrupt()))
    registry.activate("slow")
    assert registry.current() == "slow"


def test_an_exact_name_wins_over_a_family_of_that_name(registry, member):
    member("best", 10)
    member("FA4", family=None)
    registry.activate("FA4")
    assert registry.current() == "FA4"


def test_activating_the_family_of_the_active_member_does_nothing(registry, kernels, member):
    member("low", 1, recommended=lambda: "another one is faster")
    member("high", 10)
    registry.activate("low")
    registry.activate("FA4")
    assert (registry.current(), kernels.removals) == ("low", [])


def test_activating_the_family_leaves_an_active_member_that_is_no_longer_available(
    registry, kernels, member
):
    reason = None
    member("high", 10, availability=lambda: reason)
    member("low", 1)
    registry.activate("FA4")
    assert registry.current() == "high"
    reason = "the GPU fell off the bus"
    registry.activate("FA4")
    assert (registry.current(), kernels.installed) == ("low", ["low"])


def test_the_name_of_no_family_is_unknown(registry, member):
    member("one", family=None)
    with pytest.raises(UnknownImplError):
        registry.activate("FA4")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda: 1 / 0, "availability check raised ZeroDivisionError: division by zero"),
        (lambda: False, "availability check returned an object of type bool; it must return None"),
        (lambda: "", "no reason given"),
    ],
)
def test_a_check_that_does_not_answer_is_a_reason(registry, member, answer, reason):
    member("odd", availability=answer)
    with pytest.raises(FamilyUnavailableError) as caught:
        registry.activate("FA4")
    assert reason in caught.value.reasons["odd"]


def test_a_recommendation_that_raises_is_a_reason(registry, member, failing):
    member("odd", recommended=failing(RuntimeError))
    with pytest.raises(FamilyUnavailableError, match="recommendation check raised RuntimeError"):
        registry.activate("FA4")


def test_a_member_that_has_to_wait_for_cuda_does_not_yield_to_the_next(registry, kernels):
    registry.register(
        "best",
        register_fn=kernels.installer("best"),
        family="FA4",
        priority=1,
        prepare=before_using_cuda,
    )
    registry.register("next", register_fn=kernels.installer("next"), family="FA4")
    with pytest.raises(CudaNeededError):
        without_cuda(lambda: registry.activate("FA4"))
    assert kernels.running == "stock"
    registry.activate("FA4")
    assert kernels.running == "best"
