"""The counters of tiles that launches of the Hopper kernels share, or have to themselves."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


class Cuda:
    """Stands for CUDA: which stream is current, and what every counter was made by and on."""

    def __init__(self) -> None:
        self.stream = SimpleNamespace(stream_id=0)
        self.capturing = False
        self.made: list[tuple[int, Any]] = []
        self.entered: Any = None

    @contextlib.contextmanager
    def enter(self, stream: Any) -> Iterator[None]:
        self.entered = stream
        yield
        self.entered = None

    def zeros(self, size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.made.append((threading.get_ident(), self.entered))
        return torch.full((size,), 0, dtype=dtype)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    from fa4_triton import hopper_launch

    stub = Cuda()
    monkeypatch.setattr(hopper_launch, "_standing_counters", {}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: stub.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stub.stream)
    monkeypatch.setattr(torch.cuda, "stream", stub.enter)
    monkeypatch.setattr(torch, "zeros", stub.zeros)
    return stub


@pytest.mark.parametrize("stream_id", [0, 3, 35], ids=["default", "a pool's", "another"])
def test_a_stream_of_torch_has_one_counter_that_another_thread_allocates(
    cuda: Cuda, stream_id: int
) -> None:
    """Memory pools of this thread, such as a graph's that warms up, do not see it."""
    from fa4_triton.hopper_launch import _counter

    cuda.stream.stream_id = stream_id
    first = _counter(0, 1 << 20)
    assert _counter(0, 1 << 20) is first
    assert _counter(1, 1 << 20) is not first
    assert _counter(0, 1 << 21) is not first
    assert len(cuda.made) == 3
    for thread, stream in cuda.made:
        assert thread != threading.get_ident()
        assert stream is cuda.stream


@pytest.mark.parametrize("handle", [2, 1 << 20], ids=["of each thread", "foreign"])
def test_launches_on_a_stream_that_is_not_torchs_share_no_counter(cuda: Cuda, handle: int) -> None:
    from fa4_triton import hopper_launch

    cuda.stream.stream_id = handle
    assert hopper_launch._counter(0, handle) is not hopper_launch._counter(0, handle)
    assert not hopper_launch._standing_counters


def test_launches_in_a_graph_share_no_counter(cuda: Cuda) -> None:
    """Each is in the graph's memory, where this thread allocates."""
    from fa4_triton.hopper_launch import _counter

    standing = _counter(0, 0)
    cuda.capturing = True
    captured = [_counter(0, 0), _counter(0, 0)]
    assert len({id(one) for one in (standing, *captured)}) == 3
    assert [thread for thread, _ in cuda.made[1:]] == [threading.get_ident()] * 2
