"""Installing, replacing, removing: one slot, many threads."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flash_attention_registry.sdpa import (
    dispatch_counts,
    install,
    installed_kernel_sets,
    uninstall,
)

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
QUERY = torch.randn(1, 2, 8, 16).to(torch.bfloat16)


def attention() -> torch.Tensor:
    return F.scaled_dot_product_attention(QUERY, QUERY, QUERY)


def test_later_install_replaces_and_the_older_handle_does_nothing(plain_kernels: type) -> None:
    first, second = plain_kernels("first"), plain_kernels("second")
    older = install(first, "cpu")
    newer = install(second, "cpu")
    older.remove()
    attention()
    newer.remove()
    newer.remove()
    attention()
    assert (len(first.calls), len(second.calls)) == (0, 1)


def test_handle_of_the_same_kernel_set_installed_again_does_nothing(plain_kernels: type) -> None:
    kernel_set = plain_kernels()
    older = install(kernel_set, "cpu")
    install(kernel_set, "cpu")
    older.remove()
    attention()
    assert len(kernel_set.calls) == 1


def test_device_types_have_slots_of_their_own(
    plain_kernels: type, cuda_op: Callable[..., Any]
) -> None:
    on_cpu, on_cuda = plain_kernels("cpu"), plain_kernels("cuda")
    install(on_cpu, "cpu")
    install(on_cuda, "cuda").remove()
    assert installed_kernel_sets() == {"cpu": on_cpu}
    install(on_cuda, "cuda")
    assert installed_kernel_sets() == {"cpu": on_cpu, "cuda": on_cuda}
    attention()
    cuda_op("_scaled_dot_product_flash_attention", QUERY, QUERY, QUERY)
    assert (len(on_cpu.calls), len(on_cuda.calls)) == (1, 1)


def test_routers_are_put_in_once(plain_kernels: type, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = []
    original = torch.library.Library.impl

    def counting(library: torch.library.Library, op: str, *args: Any, **kwargs: Any) -> None:
        installed.append(op)
        original(library, op, *args, **kwargs)

    monkeypatch.setattr(torch.library.Library, "impl", counting)
    install(plain_kernels(), "cpu").remove()
    install(plain_kernels(), "cpu")
    assert installed == [FORWARD, f"{FORWARD}_backward"]


def test_uninstall_leaves_the_dispatcher_as_it_was(plain_kernels: type) -> None:
    before = repr(torch.library.get_kernel(f"aten::{FORWARD}", "CPU"))
    overrides = set(torch.library._impls)
    handle = install(plain_kernels(), "cpu")
    assert repr(torch.library.get_kernel(f"aten::{FORWARD}", "CPU")) != before
    handle.remove()
    uninstall("cpu")
    assert repr(torch.library.get_kernel(f"aten::{FORWARD}", "CPU")) == before
    assert set(torch.library._impls) == overrides
    uninstall("cpu")


def test_uninstall_under_an_installed_kernel_set_is_refused(plain_kernels: type) -> None:
    kernel_set = plain_kernels("in-use")
    handle = install(kernel_set, "cpu")
    with pytest.raises(RuntimeError, match=r"'cpu'.*in-use is installed.*remove\(\) of the handle"):
        uninstall("cpu")
    attention()
    assert len(kernel_set.calls) == 1
    handle.remove()
    uninstall("cpu")


def test_install_works_again_after_uninstall(plain_kernels: type) -> None:
    install(plain_kernels(), "cpu").remove()
    uninstall("cpu")
    kernel_set = plain_kernels()
    install(kernel_set, "cpu")
    attention()
    assert len(kernel_set.calls) == 1


def test_install_is_silent(plain_kernels: type) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install(plain_kernels(), "cpu")
        install(plain_kernels(), "cuda")


def test_python_override_of_others_is_told_and_used_for_declined_calls(plain_kernels: type) -> None:
    seen = []

    def theirs(query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        seen.append(query.dtype)
        return torch.empty_like(query), torch.empty(query.shape[:3])

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(FORWARD, theirs, "CPU", allow_override=True)
        with pytest.warns(RuntimeWarning, match=f"aten::{FORWARD} .CPU. is already overridden"):
            handle = install(plain_kernels(), "cpu")
        attention()
        F.scaled_dot_product_attention(QUERY.float(), QUERY.float(), QUERY.float())
        assert seen == [torch.float32]
        handle.remove()
        uninstall("cpu")


def test_install_under_a_later_override_of_others_says_that_nothing_is_served(
    plain_kernels: type,
) -> None:
    def theirs(query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return torch.empty_like(query), torch.empty(query.shape[:3])

    install(plain_kernels(), "cpu").remove()
    kernel_set = plain_kernels("hidden")
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(FORWARD, theirs, "CPU", allow_override=True)
        with pytest.warns(RuntimeWarning, match=rf"aten::{FORWARD} \(CPU\) since") as caught:
            install(kernel_set, "cpu")
        assert caught[0].filename == __file__
        attention()
        assert kernel_set.calls == []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RuntimeWarning):
                install(plain_kernels("refused"), "cpu")
        assert installed_kernel_sets() == {"cpu": kernel_set}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install(kernel_set, "cpu")
    attention()
    assert len(kernel_set.calls) == 1


def test_nothing_is_told_by_kernels_whose_text_is_an_address(
    plain_kernels: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unlabelled:
        def __init__(self, op: str, dispatch_key: str) -> None:
            self.call_boxed = get_kernel(op, dispatch_key).call_boxed

    get_kernel = torch.library.get_kernel
    monkeypatch.setattr(torch.library, "get_kernel", Unlabelled)
    install(plain_kernels(), "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install(plain_kernels(), "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_inside_a_kernel_set_is_stocks(plain_kernels: type, dtype: torch.dtype) -> None:
    class Nested(plain_kernels):  # type: ignore[misc]  # a base that is a value
        def forward(self, call: Any) -> Any:
            rows = call.query.transpose(1, 2).to(dtype)
            inner.append(F.scaled_dot_product_attention(rows, rows, rows))
            return super().forward(call)

    inner: list[torch.Tensor] = []
    expected = F.scaled_dot_product_attention(*[QUERY.to(dtype)] * 3)
    install(Nested(), "cpu")
    attention()
    attention()
    assert all(torch.equal(one, expected) for one in inner)
    counts = dispatch_counts()[FORWARD]
    assert (counts.served, counts.declined) == (2, {"called from inside a kernel set": 2})


@pytest.mark.filterwarnings("ignore:aten")
def test_call_declined_at_an_outer_op_stays_declined_inside_stock(
    plain_kernels: type, cuda_op: Callable[..., Any]
) -> None:
    outer, inner = "_scaled_dot_product_flash_attention", "_flash_attention_forward"
    seen = []

    def stock_outer(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(outer)
        rows = query.transpose(1, 2)
        arguments = rows, rows, rows, None, None, rows.shape[1], rows.shape[1], 0.0, False, False
        parts = cuda_op(inner, *arguments)
        return parts[0].mT, parts[1], None, None, 1, 1, *parts[2:]

    def stock_inner(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(inner)
        return tuple(torch.empty_like(query) for _ in range(5))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(outer, stock_outer, "CUDA", allow_override=True)
        library.impl(inner, stock_inner, "CUDA", allow_override=True)
        kernel_set = plain_kernels()
        handle = install(kernel_set, "cuda")
        cuda_op(outer, QUERY, QUERY, QUERY, 0.5)
        assert seen == [outer, inner]
        assert kernel_set.calls == []
        counts = dispatch_counts()
        assert (counts[outer].total_declined, counts[inner].total_declined) == (1, 0)
        cuda_op(outer, QUERY, QUERY, QUERY)
        assert len(kernel_set.calls) == 1
        handle.remove()
        uninstall("cuda")


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.12.1"])
def test_older_torch_may_register_its_own_on_top(
    version: str, plain_kernels: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    install(plain_kernels(), "cpu")
    seen = []

    def theirs(query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        seen.append(query.dtype)
        return torch.empty_like(query), torch.empty(query.shape[:3])

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(FORWARD, theirs, "CPU", allow_override=False)
        attention()
    assert len(seen) == 1
    attention()
    assert dispatch_counts()[FORWARD].served == 1


@pytest.mark.parametrize("call", [install, lambda _, device: uninstall(device)])
def test_unrouted_device_type_is_refused(call: Callable[..., Any], plain_kernels: type) -> None:
    with pytest.raises(ValueError, match="device type 'tpu'; choose one of"):
        call(plain_kernels(), "tpu")


def test_undeclared_device_type_is_refused(plain_kernels: type) -> None:
    with pytest.raises(ValueError, match=r"plain cannot .* 'cpu': its capabilities .* \['cuda'\]"):
        install(plain_kernels(device_types=frozenset({"cuda"})), "cpu")


def test_what_is_no_kernel_set_is_refused() -> None:
    with pytest.raises(TypeError, match=r"takes a KernelSet .* got object, which lacks name, cap"):
        install(object(), "cpu")  # type: ignore[arg-type]  # that is the mistake


def test_a_class_of_kernel_sets_is_refused(plain_kernels: type) -> None:
    with pytest.raises(TypeError, match=r"the class PlainKernels; give an instance of it"):
        install(plain_kernels, "cpu")


def test_switching_under_load_serves_every_call_whole(plain_kernels: type) -> None:
    expected = attention().float()
    errors: list[BaseException] = []
    calls = [0, 0, 0]
    stop = threading.Event()

    def load(index: int) -> None:
        try:
            while not stop.is_set():
                out = attention().float()
                torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
                calls[index] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=load, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    first, second = plain_kernels("first"), plain_kernels("second")
    switches, end = 0, time.monotonic() + 2
    while time.monotonic() < end:
        handle = install((first, second)[switches % 2], "cpu")
        if switches % 3 == 0:
            handle.remove()
        switches += 1
        time.sleep(0.0005)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    counts = dispatch_counts()[FORWARD]
    assert counts.declined == {}
    assert 0 < counts.served <= sum(calls)
    assert counts.served == len(first.calls) + len(second.calls)
