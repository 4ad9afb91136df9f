"""A kernel that raises never fails the caller; everything is counted."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flash_attention_registry.sdpa import (
    count_kernel,
    dispatch_counts,
    install,
    reset_dispatch_counts,
)
from flash_attention_registry.sdpa.counters import OpCounter

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


def query(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 2, 8, 16, generator=generator).to(dtype).requires_grad_()


class KernelError(Exception):
    """An error of a kind that nothing has warned of before."""


@pytest.mark.parametrize(
    "error", [RuntimeError("no luck"), torch.OutOfMemoryError("no memory"), TypeError("no type")]
)
def test_forward_that_raises_falls_back_to_stock_bitwise(
    error: Exception, plain_kernels: type
) -> None:
    tensor = query()
    stock = F.scaled_dot_product_attention(tensor, tensor, tensor)
    name = f"forward-{type(error).__name__}"
    install(plain_kernels(name, error), "cpu")
    with pytest.warns(RuntimeWarning, match=f"{name} raised .* in aten::{FORWARD}.*{error}"):
        out = F.scaled_dot_product_attention(tensor, tensor, tensor)
    assert torch.equal(out, stock)
    assert dispatch_counts()[FORWARD].declined == {f"kernel raised {type(error).__name__}": 1}


def test_backward_that_raises_falls_back_to_stock_bitwise(plain_kernels: type) -> None:
    tensor = query()
    F.scaled_dot_product_attention(tensor, tensor, tensor).sum().backward()
    expected, tensor.grad = tensor.grad, None
    out = F.scaled_dot_product_attention(tensor, tensor, tensor)
    install(plain_kernels("backward", KernelError("late")), "cpu")
    with pytest.warns(RuntimeWarning, match="backward raised KernelError"):
        out.sum().backward()
    assert tensor.grad is not None
    assert expected is not None
    assert torch.equal(tensor.grad, expected)
    assert dispatch_counts()[BACKWARD].declined == {"kernel raised KernelError": 1}


def test_second_failure_of_a_kind_is_counted_without_a_warning(plain_kernels: type) -> None:
    tensor = query().detach()
    install(plain_kernels("twice", KernelError("again")), "cpu")
    with pytest.warns(RuntimeWarning, match="twice raised"):
        F.scaled_dot_product_attention(tensor, tensor, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.scaled_dot_product_attention(tensor, tensor, tensor)
    assert dispatch_counts()[FORWARD].declined == {"kernel raised KernelError": 2}


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_failure_is_logged_where_warnings_are_errors(
    kind: str, plain_kernels: type, caplog: pytest.LogCaptureFixture
) -> None:
    tensor = query()
    expected = F.scaled_dot_product_attention(tensor, tensor, tensor)
    out = expected
    install(plain_kernels(f"strict-{kind}", KernelError("quiet")), "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if kind == "forward":
            out = F.scaled_dot_product_attention(tensor, tensor, tensor)
        else:
            out.sum().backward()
    assert torch.equal(out, expected)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"strict-{kind} raised KernelError" in caplog.text


def test_failure_whose_text_fails_falls_back_too(plain_kernels: type) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    tensor = query().detach()
    install(plain_kernels("mute", Mute()), "cpu")
    with pytest.warns(RuntimeWarning, match="mute raised Mute.*text cannot be had: ValueError"):
        F.scaled_dot_product_attention(tensor, tensor, tensor)
    assert dispatch_counts()[FORWARD].declined == {"kernel raised Mute": 1}


def test_warning_comes_after_stock_has_run_and_is_no_part_of_an_exception(
    plain_kernels: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def show(*_: object, **__: object) -> None:
        seen.append((dispatch_counts()[FORWARD].total_declined, sys.exc_info()[1]))

    tensor = query().detach()
    install(plain_kernels("late", KernelError("late")), "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        F.scaled_dot_product_attention(tensor, tensor, tensor)
    assert seen == [(1, None)]


def test_interruption_is_not_swallowed(plain_kernels: type) -> None:
    tensor = query().detach()
    install(plain_kernels(error=KeyboardInterrupt()), "cpu")
    with pytest.raises(KeyboardInterrupt):
        F.scaled_dot_product_attention(tensor, tensor, tensor)
    assert dispatch_counts()[FORWARD].total_declined == 0


def test_counts_are_a_snapshot_with_totals_and_text(plain_kernels: type) -> None:
    install(plain_kernels(), "cpu")
    assert str(dispatch_counts()) == "no calls"
    for dtype in (torch.bfloat16, torch.float32, torch.float32):
        tensor = query(dtype)
        F.scaled_dot_product_attention(tensor, tensor, tensor)
    counts = dispatch_counts()
    tensor = query()
    F.scaled_dot_product_attention(tensor, tensor, tensor)
    assert (counts.served, counts.declined) == (1, 2)
    assert counts[FORWARD].total_declined == 2
    assert set(counts) >= {FORWARD, BACKWARD}
    assert len(counts) == len(set(counts))
    assert str(counts) == (
        f"{FORWARD}: 1 served, 2 on stock\n  2 on stock: dtype torch.float32 is not supported"
    )
    assert dispatch_counts().served == 2
    reset_dispatch_counts()
    assert dispatch_counts().served == dispatch_counts().declined == 0
    assert counts.served == 1


@pytest.mark.parametrize(
    "copied", [lambda counts: pickle.loads(pickle.dumps(counts)), copy.deepcopy]
)
def test_counts_can_be_gathered_from_other_processes(
    copied: Callable[[Any], Any], plain_kernels: type
) -> None:
    install(plain_kernels(), "cpu")
    tensor = query()
    F.scaled_dot_product_attention(tensor, tensor, tensor)
    F.scaled_dot_product_attention(tensor.float(), tensor.float(), tensor.float())
    count_kernel("the wide one")
    counts = dispatch_counts()
    found = copied(counts)
    assert dict(found) == dict(counts)
    assert found.kernels == counts.kernels == {"the wide one": 1}
    assert (found.served, found.declined) == (1, 1)
    with pytest.raises(TypeError):
        found[FORWARD].declined["more"] = 1


def test_reason_is_logged_once(plain_kernels: type, caplog: pytest.LogCaptureFixture) -> None:
    install(plain_kernels(head_dims=range(8, 16)), "cpu")
    tensor = query().detach()
    with caplog.at_level(logging.INFO, "flash_attention_registry.sdpa"):
        for _ in range(3):
            F.scaled_dot_product_attention(tensor, tensor, tensor)
    assert [record.getMessage() for record in caplog.records] == [
        f"aten::{FORWARD} runs on stock: head_dim 16 is not supported"
    ]


def test_no_count_is_lost_between_threads() -> None:
    counter = OpCounter("op")

    def count() -> None:
        for _ in range(2000):
            counter.count_served()
            counter.count_declined("why")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = counter.counts()
    assert (counts.served, counts.declined) == (8000, {"why": 8000})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_can_count_and_install(plain_kernels: type) -> None:
    from flash_attention_registry.sdpa import counters, router

    handle = install(plain_kernels(), "cpu")
    with counters._guard.lock, router._guard.lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's threads; the child below uses none of them
        child = os.fork()
        if child == 0:
            handle.remove()
            os._exit(dispatch_counts().served)
    assert os.waitpid(child, 0)[1] == 0


def test_a_provider_may_say_which_of_its_kernels_served() -> None:
    for kernel in ("the fast one", "the slow one: odd strides", "the fast one"):
        count_kernel(kernel)
    counts = dispatch_counts()
    assert counts.kernels == {"the fast one": 2, "the slow one: odd strides": 1}
    assert str(counts).endswith("2 by the fast one\n1 by the slow one: odd strides")
    count_kernel("the fast one")
    assert counts.kernels["the fast one"] == 2  # a snapshot
    reset_dispatch_counts()
    assert dispatch_counts().kernels == {}
