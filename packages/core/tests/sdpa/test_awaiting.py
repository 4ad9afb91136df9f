"""What is settled by the first call that finds no kernel set: once, and in time for that call."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flash_attention_registry import (
    Registry,
    RegistryWarning,
    RequestUnavailableError,
    before_using_cuda,
)
from flash_attention_registry.sdpa import dispatch_counts, install, router, uninstall
from flash_attention_registry.sdpa.router import await_first_call

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
CUDA_FORWARD = "_scaled_dot_product_flash_attention"
WAIT = 20  # seconds; for threads that are to go on at once

generator = torch.Generator().manual_seed(1)
TENSOR = torch.randn(1, 2, 8, 16, generator=generator).to(torch.bfloat16)


def attend() -> torch.Tensor:
    return F.scaled_dot_product_attention(TENSOR, TENSOR, TENSOR)


class First:
    """What is awaited: notes its calls, and installs a kernel set if it has one."""

    def __init__(self, kernel_set: Any = None, done: bool = True) -> None:
        self.kernel_set = kernel_set
        self.done = done
        self.calls = 0

    def __call__(self) -> bool:
        self.calls += 1
        if self.kernel_set is not None:
            install(self.kernel_set, "cpu")
        return self.done


def test_the_call_that_settles_it_is_served_already(plain_kernels: type) -> None:
    first = First(plain_kernels())
    await_first_call("cpu", first)
    assert first.calls == 0
    attend()
    assert (first.calls, dispatch_counts()[FORWARD].served) == (1, 1)


def test_it_is_settled_once(plain_kernels: type) -> None:
    first = First(plain_kernels())
    await_first_call("cpu", first)
    attend()
    router._slots["cpu"].kernels = None
    attend()
    assert (first.calls, dispatch_counts()[FORWARD].served) == (1, 1)


def test_a_call_runs_on_stock_if_nothing_was_installed() -> None:
    expected = attend()
    first = First()
    await_first_call("cpu", first)
    for _ in range(2):
        assert torch.equal(attend(), expected)
    assert first.calls == 1
    assert str(dispatch_counts()) == "no calls"


def test_a_backward_may_be_the_first_call(plain_kernels: type) -> None:
    tensor = TENSOR.clone().requires_grad_()
    out = F.scaled_dot_product_attention(tensor, tensor, tensor)
    await_first_call("cpu", First(plain_kernels()))
    out.sum().backward()
    assert dispatch_counts()[f"{FORWARD}_backward"].served == 1


def test_calls_of_another_device_type_do_not_settle_it(
    plain_kernels: type, cuda_op: Callable[..., Any]
) -> None:
    first = First()
    await_first_call("cuda", first)
    attend()
    assert first.calls == 0
    first.kernel_set = plain_kernels()
    with pytest.raises(RuntimeError, match="no CUDA kernel"):  # it installed for the CPU
        cuda_op(CUDA_FORWARD, TENSOR, TENSOR, TENSOR)
    assert first.calls == 1


def test_a_device_type_without_routed_ops_is_refused() -> None:
    with pytest.raises(ValueError, match="no attention ops are routed for device type 'tpu'"):
        await_first_call("tpu", First())


def test_what_it_raises_the_call_raises_and_the_next_call_again(plain_kernels: type) -> None:
    class Fails(First):
        def __call__(self) -> bool:
            super().__call__()
            raise OSError("no kernels")

    first = Fails()
    await_first_call("cpu", first)
    for calls in (1, 2):
        with pytest.raises(OSError, match="no kernels"):
            attend()
        assert first.calls == calls
    await_first_call("cpu", First(plain_kernels()))
    attend()
    assert dispatch_counts()[FORWARD].served == 1


def test_it_is_called_until_it_is_done(plain_kernels: type) -> None:
    first = First(done=False)
    await_first_call("cpu", first)
    attend()
    attend()
    assert first.calls == 2
    first.kernel_set, first.done = plain_kernels(), True
    attend()
    assert (first.calls, dispatch_counts()[FORWARD].served) == (3, 1)


def test_a_call_that_it_makes_itself_runs_on_stock_and_does_not_settle_it(
    plain_kernels: type,
) -> None:
    expected = attend()
    inner = []

    class Calls(First):
        def __call__(self) -> bool:
            inner.append(attend())
            super().__call__()
            inner.append(attend())
            return True

    first = Calls(plain_kernels())
    await_first_call("cpu", first)
    attend()
    assert first.calls == 1
    assert torch.equal(inner[0], expected)
    assert dispatch_counts()[FORWARD].served == 2, "the one after the installation, and the outer"


def test_what_fails_after_a_call_of_its_own_is_tried_again() -> None:
    class CallsAndFails(First):
        def __call__(self) -> bool:
            attend()
            super().__call__()
            raise OSError("no kernels")

    first = CallsAndFails()
    await_first_call("cpu", first)
    for calls in (1, 2):
        with pytest.raises(OSError, match="no kernels"):
            attend()
        assert first.calls == calls


def test_a_call_that_an_installed_kernel_set_makes_settles_nothing(plain_kernels: type) -> None:
    """Its set is removed while it runs, so that its own call finds none."""
    first = First()

    class Leaves(plain_kernels):  # type: ignore[misc]  # a fixture gives the class
        def forward(self, call: Any) -> Any:
            handle.remove()
            await_first_call("cpu", first)
            attend()
            return super().forward(call)

    handle = install(Leaves(), "cpu")
    attend()
    assert first.calls == 0
    attend()
    assert first.calls == 1


def test_with_a_kernel_set_installed_nothing_is_settled(plain_kernels: type) -> None:
    first = First()
    await_first_call("cpu", first)
    handle = install(plain_kernels(), "cpu")
    attend()
    assert first.calls == 0
    handle.remove()
    attend()
    assert first.calls == 1


def test_uninstalling_the_routers_forgets_it() -> None:
    first = First()
    await_first_call("cpu", first)
    uninstall("cpu")
    attend()
    slot = router._slots["cpu"]
    assert (slot.library, slot.awaiting) == (None, None)
    assert first.calls == 0


def test_what_is_awaited_anew_meanwhile_is_not_forgotten() -> None:
    second = First()

    class Replaced(First):
        def __call__(self) -> bool:
            await_first_call("cpu", second)
            return super().__call__()

    await_first_call("cpu", Replaced())
    attend()
    assert second.calls == 0
    attend()
    assert second.calls == 1


# With the request of an environment


@pytest.fixture
def pending(registry: Registry, asked: Any, plain_kernels: type) -> Registry:
    """A registry of which `gpu` is asked for, a kernel set that must wait for CUDA."""
    registry.register(
        "gpu", register_fn=lambda: install(plain_kernels(), "cpu"), availability=before_using_cuda
    )
    asked("gpu")
    registry.request.honour(lambda _gpu, settle: await_first_call("cpu", settle))
    assert registry.request.pending == ("gpu",)
    return registry


def test_the_first_call_settles_a_request_and_is_served(pending: Registry) -> None:
    attend()
    assert (pending.current(), pending.request.pending) == ("gpu", ())
    assert dispatch_counts()[FORWARD].served == 1
    pending.restore()
    attend()
    assert dispatch_counts()[FORWARD].served == 1


def test_two_first_calls_at_once_are_both_served_and_settle_it_once(
    pending: Registry, plain_kernels: type
) -> None:
    inside, go_on, checks = threading.Event(), threading.Event(), []

    def check() -> None:
        checks.append(threading.get_ident())
        inside.set()
        assert go_on.wait(WAIT)

    pending.register("gpu", register_fn=lambda: install(plain_kernels(), "cpu"), availability=check)
    threads = [threading.Thread(target=attend) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert inside.wait(WAIT)
    threads[1].join(0.1)
    assert all(thread.is_alive() for thread in threads)
    go_on.set()
    for thread in threads:
        thread.join(WAIT)
    assert len(checks) == 1
    counts = dispatch_counts()[FORWARD]
    assert (counts.served, counts.total_declined) == (2, 0)


def test_a_request_that_cannot_be_met_is_one_warning_and_stock_runs(pending: Registry) -> None:
    expected = stock_result()
    pending.unregister("gpu")
    with pytest.warns(RegistryWarning, match="Torch's own attention kernels run"):
        out = attend()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = attend()
    assert torch.equal(out, expected)
    assert torch.equal(again, expected)


def stock_result() -> torch.Tensor:
    awaiting, router._slots["cpu"].awaiting = router._slots["cpu"].awaiting, None
    try:
        return attend()
    finally:
        router._slots["cpu"].awaiting = awaiting


def test_a_request_that_cannot_be_met_fails_every_call_in_a_strict_environment(
    pending: Registry, asked: Any
) -> None:
    asked("gpu", strict="1")
    pending.unregister("gpu")
    for _ in range(3):
        with pytest.raises(RequestUnavailableError, match="Unknown flash attention impl 'gpu'"):
            attend()


def test_a_call_in_a_transition_leaves_the_request_for_the_next_call(pending: Registry) -> None:
    def prepare() -> None:
        attend()
        raise OSError("no kernels")

    pending.register("other", register_fn=lambda: None, prepare=prepare)
    with pytest.raises(OSError, match="no kernels"):
        pending.activate("other")
    assert pending.request.pending == ("gpu",)
    attend()
    assert (pending.current(), dispatch_counts()[FORWARD].served) == ("gpu", 1)


@pytest.mark.filterwarnings("ignore:No flash attention impl is active")
def test_what_the_program_decided_before_stands(pending: Registry) -> None:
    pending.restore()
    attend()
    assert pending.current() is None
    assert router._slots["cpu"].awaiting is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_settles_it_for_itself(pending: Registry) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's threads; the child below uses none of them
        child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            attend()
            os._exit(0 if pending.current() == "gpu" else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pending.request.pending == ("gpu",)
