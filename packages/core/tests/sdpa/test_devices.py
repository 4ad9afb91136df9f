"""Several devices in one process, told with stand-ins for tensors on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from flash_attention_registry.sdpa import AttentionCall
from flash_attention_registry.sdpa.checks import (
    reason_of_backward,
    reason_of_dense,
    reason_of_packed,
    reason_of_seqused,
)
from flash_attention_registry.sdpa.serving import (
    ActiveKernels,
    run_backward,
    run_forward,
    run_heads_first,
)


class OnDevice:
    """A tensor that says it is on GPU `index`."""

    def __init__(self, tensor: torch.Tensor, index: int) -> None:
        self._tensor = tensor
        self._index = index

    def get_device(self) -> int:
        return self._index

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)


def gpu(index: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    return OnDevice(torch.zeros(shape, dtype=dtype), index)


def dense(index: int) -> Any:
    return gpu(index, 1, 2, 4, 16)


def rows(index: int) -> Any:
    return gpu(index, 4, 2, 16)


def offsets(index: int) -> Any:
    return gpu(index, 2, dtype=torch.int32)


def lse(index: int) -> Any:
    return gpu(index, 1, 2, 4, dtype=torch.float32)


@pytest.mark.parametrize("devices", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, -1)])
def test_inputs_on_several_devices_are_declined(devices: tuple[int, int, int]) -> None:
    reason = "query, key and value are not on one device"
    assert reason_of_dense(*map(dense, devices), 1) == reason
    first = devices[0]
    assert reason_of_packed(*map(rows, devices), offsets(first), offsets(first), False) == reason


@pytest.mark.parametrize("devices", [(0, 1), (1, 0)])
def test_offsets_on_another_device_are_declined(devices: tuple[int, int]) -> None:
    reason = reason_of_packed(rows(0), rows(0), rows(0), *map(offsets, devices), False)
    assert reason == "cum_seq_q or cum_seq_k is on another device"


def test_lengths_on_another_device_are_declined() -> None:
    used = gpu(1, 1, dtype=torch.int32)
    reason = reason_of_seqused(rows(0), used, cu_seqlens_key=offsets(0))
    assert reason == "seqused_k is on another device"


@pytest.mark.parametrize("devices", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_backward_inputs_on_another_device_are_declined(devices: tuple[int, int, int]) -> None:
    grad_out, out, sums = (make(i) for make, i in zip((dense, dense, lse), devices, strict=True))
    reason = reason_of_backward(grad_out, dense(0), out, sums, (1, 2, 4))
    assert reason == "grad_out, out or logsumexp is on another device"


class Recorder:
    """A kernel set that notes which device is current when it runs."""

    name = "recorder"

    def __init__(self, capabilities: Any, current: list[int]) -> None:
        self.capabilities = capabilities
        self.current = current
        self.ran_on: list[int] = []

    def supports(self, call: AttentionCall) -> str | None:
        return None

    def forward(self, call: AttentionCall) -> Any:
        self.ran_on.append(self.current[-1])
        return call.out, torch.zeros(1)

    def backward(self, call: AttentionCall, *tensors: Any) -> Any:
        self.ran_on.append(self.current[-1])
        return call.query, call.key, call.value


@pytest.mark.parametrize("index", [0, 1])
def test_kernels_run_on_the_device_of_their_tensors(
    index: int, make_capabilities: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    current, entered = [0], []

    @contextlib.contextmanager
    def device(to: int) -> Iterator[None]:
        entered.append(to)
        current.append(to)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    recorder = Recorder(make_capabilities(), current)
    kernels = ActiveKernels(recorder, strict=False)
    tensor = dense(index)
    call = AttentionCall(tensor, tensor, tensor, 1.0, False)
    run_forward(kernels, call._replace(out=tensor), tensor)
    run_backward(kernels, call, tensor, tensor, lse(index))
    run_heads_first(lambda *_: recorder.ran_on.append(current[-1]), tensor)
    assert recorder.ran_on == [index] * 3
    assert entered == ([] if index == 0 else [1] * 3)
    assert current == [0]
