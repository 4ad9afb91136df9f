"""A check that needs CUDA waits where CUDA must not be initialised yet, and nowhere else."""

from __future__ import annotations

import threading

import pytest

from flash_attention_registry import CudaNeededError, FamilyUnavailableError, before_using_cuda
from flash_attention_registry.cuda import without_cuda


def test_a_check_may_use_cuda_at_any_other_time():
    before_using_cuda()
    assert without_cuda(lambda: "answer") == "answer"
    before_using_cuda()


def test_a_check_must_wait_where_cuda_is_not_to_be_initialised():
    with pytest.raises(CudaNeededError, match="first attention call on the GPU"):
        without_cuda(before_using_cuda)
    before_using_cuda()


def test_calls_may_lie_in_one_another():
    def outer():
        without_cuda(lambda: None)
        before_using_cuda()

    with pytest.raises(CudaNeededError):
        without_cuda(outer)


def test_other_threads_are_not_held_up():
    raised = []

    def ask():
        try:
            before_using_cuda()
        except CudaNeededError as error:
            raised.append(error)

    def ask_elsewhere():
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    without_cuda(ask_elsewhere)
    assert raised == []


def needs_cuda():
    before_using_cuda()


@pytest.mark.parametrize("check", ["availability", "recommended"])
def test_the_registry_takes_it_for_no_verdict(ab, kernels, check):
    ab.register("c", register_fn=kernels.installer("c"), family="FA4", **{check: needs_cuda})
    with pytest.raises(CudaNeededError):
        without_cuda(lambda: ab.activate("FA4"))
    assert (ab.current(), kernels.installed) == ("a", ["a"])
    ab.activate("FA4")
    assert ab.current() == "c"


def test_a_reason_that_is_known_without_cuda_is_given_at_once(ab, kernels):
    def check():
        if kernels.installed:
            return "triton is not installed"
        before_using_cuda()
        return None

    ab.register("c", register_fn=kernels.installer("c"), family="FA4", availability=check)
    with pytest.raises(FamilyUnavailableError, match="triton is not installed"):
        without_cuda(lambda: ab.activate("FA4"))
