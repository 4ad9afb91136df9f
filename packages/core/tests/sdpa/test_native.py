"""Native kernels above the routers: put in once, switched with their kernel set, counted too."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flash_attention_registry.sdpa import (
    NativeKernels,
    dispatch_counts,
    install,
    reset_dispatch_counts,
    router,
    uninstall,
)

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
QUERY = torch.randn(1, 2, 8, 16).to(torch.bfloat16)


class FakeNative:
    """Native kernels in Python: serves float16 forwards with zeros, the rest goes on."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.on = False
        self.count = 0
        self.log: list[str] = []
        self.library: Any = None

    def put_in(self, routes: Mapping[str, Any]) -> Collection[str]:
        self.log.append("in")
        if self.error is not None:
            raise self.error
        route = routes[FORWARD]

        def kernel(keyset: torch.DispatchKeySet, query: torch.Tensor, *args: Any, **kw: Any) -> Any:
            if not self.on or query.dtype is not torch.float16:
                return route(keyset, query, *args, **kw)
            self.count += 1
            return torch.zeros_like(query), torch.zeros(query.shape[:3])

        self.library = torch.library.Library("aten", "IMPL")
        self.library.impl(FORWARD, kernel, "CPU", with_keyset=True, allow_override=True)
        return [FORWARD]

    def switch(self, on: bool) -> None:
        self.on = on

    def served(self, op: str) -> int:
        return self.count if op == FORWARD else 0

    def take_out(self) -> None:
        self.log.append("out")
        self.on = False
        self.library._destroy()


def attention(dtype: torch.dtype = torch.float16) -> torch.Tensor:
    query = QUERY.to(dtype)
    return F.scaled_dot_product_attention(query, query, query)


def test_what_native_kernels_take_never_comes_to_the_kernel_set(plain_kernels: type) -> None:
    kernel_set = plain_kernels()
    install(kernel_set, "cpu", native=FakeNative())
    assert not attention().any()
    assert kernel_set.calls == []


def test_what_they_do_not_take_is_the_routers_business(plain_kernels: type) -> None:
    kernel_set = plain_kernels()
    install(kernel_set, "cpu", native=FakeNative())
    attention(torch.bfloat16)
    attention(torch.float32)
    assert len(kernel_set.calls) == 1
    assert dispatch_counts()[FORWARD].declined == {"dtype torch.float32 is not supported": 1}


def test_they_serve_only_while_their_kernel_set_is_installed(plain_kernels: type) -> None:
    stock = attention()
    native = FakeNative()
    handle = install(plain_kernels(), "cpu", native=native)
    assert not attention().any()
    handle.remove()
    assert torch.equal(attention(), stock)
    install(plain_kernels(), "cpu", native=native)
    other = plain_kernels("other")
    install(other, "cpu")
    attention()
    assert len(other.calls) == 1
    assert native.log == ["in"]


def test_an_older_handle_does_not_switch_them_off(plain_kernels: type) -> None:
    native = FakeNative()
    older = install(plain_kernels(), "cpu", native=native)
    install(plain_kernels(), "cpu", native=native)
    older.remove()
    assert not attention().any()


def test_their_calls_are_counted_with_the_others_from_the_installation_on(
    plain_kernels: type,
) -> None:
    native = FakeNative()
    native.count = 5
    install(plain_kernels(), "cpu", native=native)
    attention()
    attention(torch.bfloat16)
    assert dispatch_counts()[FORWARD].served == 2
    reset_dispatch_counts()
    assert dispatch_counts()[FORWARD].served == 0
    attention()
    assert dispatch_counts()[FORWARD].served == 1


def test_they_are_counted_once_when_they_come_back(plain_kernels: type) -> None:
    native = FakeNative()
    install(plain_kernels(), "cpu", native=native).remove()
    uninstall("cpu")
    install(plain_kernels(), "cpu", native=native)
    attention()
    assert native.log == ["in", "out", "in"]
    assert dispatch_counts()[FORWARD].served == 1


def test_they_are_not_taken_for_another_librarys(plain_kernels: type) -> None:
    install(plain_kernels(), "cpu", native=FakeNative()).remove()
    assert router.ops_taken_over("cpu") == []
    install(plain_kernels(), "cpu", native=FakeNative())
    assert router.ops_taken_over("cpu") == []


def test_uninstalling_leaves_the_dispatcher_as_it_was(plain_kernels: type) -> None:
    before = repr(torch.library.get_kernel(f"aten::{FORWARD}", "CPU"))
    install(plain_kernels(), "cpu", native=FakeNative()).remove()
    uninstall("cpu")
    assert repr(torch.library.get_kernel(f"aten::{FORWARD}", "CPU")) == before


def test_where_they_cannot_be_put_in_nothing_changes(plain_kernels: type) -> None:
    before = plain_kernels("before")
    install(before, "cpu")
    with pytest.raises(OSError, match="no such library"):
        install(plain_kernels(), "cpu", native=FakeNative(OSError("no such library")))
    attention()
    assert len(before.calls) == 1


def test_the_fake_is_what_install_asks_for() -> None:
    native: NativeKernels = FakeNative()
    assert native.served("another") == 0
