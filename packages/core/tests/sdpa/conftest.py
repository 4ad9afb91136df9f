"""A kernel set that computes attention plainly, and the way to a CUDA op without a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402  # torch may be absent

from flash_attention_registry import sdpa  # noqa: E402
from flash_attention_registry.sdpa import AttentionCall, Capabilities, router  # noqa: E402

ALL_FEATURES = frozenset({"backward", "causal", "gqa", "varlen", "window"})


def capabilities(**changes: Any) -> Capabilities:
    """Capabilities of the plain kernel set, but for `changes`."""
    declared: dict[str, Any] = {
        "device_types": frozenset({"cpu", "cuda"}),
        "dtypes": frozenset({torch.bfloat16, torch.float16}),
        "head_dims": range(8, 257, 8),
        "features": ALL_FEATURES,
        "deterministic": "always",
    }
    return Capabilities(**(declared | changes))


def attend(query: Tensor, key: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Probabilities and lse, `[H, Sq, Sk]` and `[H, Sq]`, of `[S, H, D]` float32 inputs."""
    scores = torch.einsum("qhd,khd->hqk", query, key) * call.scale
    rows = torch.arange(query.shape[0])[:, None] + key.shape[0] - query.shape[0]
    columns = torch.arange(key.shape[0])[None, :]
    visible = torch.ones(query.shape[0], key.shape[0], dtype=torch.bool)
    if call.causal:
        visible &= columns <= rows
    if call.window_left is not None:
        visible &= columns >= rows - call.window_left
    if call.window_right is not None:
        visible &= columns <= rows + call.window_right
    scores = scores.masked_fill(~visible, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    probabilities = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
    return probabilities, lse.masked_fill(lse == -math.inf, call.lse_of_empty_rows)


def sequences(call: AttentionCall) -> list[tuple[Any, Any]]:
    """Index of each sequence in query-like and key-like tensors."""
    if call.cu_seqlens_query is None or call.cu_seqlens_key is None:
        return [(i, i) for i in range(call.query.shape[0])]
    starts, others = call.cu_seqlens_query.tolist(), call.cu_seqlens_key.tolist()
    slices = [list(map(slice, offsets, offsets[1:])) for offsets in (starts, others)]
    return list(zip(*slices, strict=True))


class PlainKernels:
    """Attention in float32 PyTorch, as a kernel set. Keeps the calls it ran."""

    def __init__(self, name: str = "plain", error: Exception | None = None, **changes: Any) -> None:
        self.name = name
        self.error = error
        self.capabilities = capabilities(**changes)
        self.calls: list[AttentionCall] = []

    def supports(self, call: AttentionCall) -> str | None:
        return self.capabilities.reason_to_decline(call)

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        assert call.out is not None
        packed = call.cu_seqlens_query is not None
        batch, heads = call.query.shape[0], call.query.shape[-2]
        shape = (heads, batch) if packed else (batch, heads, call.query.shape[1])
        lse = torch.empty(shape, dtype=torch.float32)
        for q, k in sequences(call):
            query, key, value = self._inputs(call, q, k)
            probabilities, part = attend(query, key, call)
            call.out[q] = torch.einsum("hqk,khd->qhd", probabilities, value).to(call.out.dtype)
            lse[(slice(None), q) if packed else q] = part
        return call.out, lse

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        assert call.out is None
        assert grad_out.stride(-1) == out.stride(-1) == 1
        assert lse.is_contiguous()
        grads = [torch.zeros(t.shape, dtype=t.dtype) for t in (call.query, call.key, call.value)]
        heads = call.key.shape[-2]
        for q, k in sequences(call):
            query, key, value = self._inputs(call, q, k)
            probabilities, _ = attend(query, key, call)
            upstream = grad_out[q].float()
            delta = (upstream * out[q].float()).sum(-1).T[..., None]
            slope = torch.einsum("qhd,khd->hqk", upstream, value) - delta
            slope = probabilities * slope * call.scale
            grads[0][q] = torch.einsum("hqk,khd->qhd", slope, key).to(query.dtype)
            for grad, parts in (
                (grads[1], torch.einsum("hqk,qhd->khd", slope, query)),
                (grads[2], torch.einsum("hqk,qhd->khd", probabilities, upstream)),
            ):
                grad[k] = parts.unflatten(1, (heads, -1)).sum(2).to(grad.dtype)
        return grads[0], grads[1], grads[2]

    @staticmethod
    def _inputs(call: AttentionCall, q: Any, k: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = call.query[q].float(), call.key[k].float(), call.value[k].float()
        group = query.shape[1] // key.shape[1]
        return query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)


class HeadsFirstKernels(PlainKernels):
    """The same with the shortcut for SDPA's layout; `shortcuts` counts how often it was taken."""

    def __init__(self, *args: Any, **changes: Any) -> None:
        super().__init__(*args, **changes)
        self.shortcuts = 0

    def forward_heads_first(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        causal: bool,
        lse_of_empty_rows: float,
    ) -> str | None:
        self.shortcuts += 1
        q, k, v, target = (tensor.transpose(1, 2) for tensor in (query, key, value, out))
        call = AttentionCall(
            q, k, v, scale, causal, out=target, lse_of_empty_rows=lse_of_empty_rows
        )
        reason = self.supports(call)
        if reason is None:
            lse.view(lse.shape[:3]).copy_(self.forward(call)[1])
        return reason


@pytest.fixture
def heads_first_kernels() -> type[HeadsFirstKernels]:
    """As `plain_kernels`, with the shortcut for SDPA's layout."""
    return HeadsFirstKernels


@pytest.fixture(scope="session")
def plain_kernels() -> type[PlainKernels]:
    """The class of kernel sets to install."""
    return PlainKernels


@pytest.fixture
def make_capabilities() -> Callable[..., Capabilities]:
    """Capabilities with changes."""
    return capabilities


@pytest.fixture
def cuda_op() -> Callable[..., Any]:
    """Calls an op's CUDA kernel with CPU tensors: `cuda_op(name, *args, **kwargs)`."""
    keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def call(op: str, *args: Any, **kwargs: Any) -> Any:
        kernel = torch.library.get_kernel(f"aten::{op}", "CUDA")
        with torch.no_grad():
            return kernel.call_boxed(keyset, *args, **kwargs)

    return call


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test starts and ends with torch's own kernels and counts of zero.

    Builds of torch with CUDA are made to look as those without: their CUDA kernels cannot take
    the CPU tensors of these tests.
    """
    capture = router._stock_kernel

    def stock_kernel(op: str, dispatch_key: str) -> Any:
        native_cuda = dispatch_key == "CUDA" and f"aten/{op}/CUDA" not in torch.library._impls
        return None if native_cuda else capture(op, dispatch_key)

    monkeypatch.setattr(router, "_stock_kernel", stock_kernel)
    yield
    for device_type, slot in router._slots.items():
        slot.kernels = None
        sdpa.uninstall(device_type)
    sdpa.reset_dispatch_counts()
