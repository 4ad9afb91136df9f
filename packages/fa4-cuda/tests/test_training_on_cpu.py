"""Training by torch's ops with a CPU in the GPU's place: autograd, switches, compiled graphs.

The native kernels and the registry's routers stand at the CPU key here, where autograd comes by
with tensors of a CPU, and below them what passes for torch's own kernels. Glue, planner, kernel set
and registry are the real ones; only what launches is replaced (`cpu_device.cpp`).
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fa4_cuda.kernel_set import CudaKernels
from fa4_cuda.native import NativeOps
from flash_attention_registry.sdpa import (
    InstalledKernels,
    dispatch_counts,
    install,
    reset_dispatch_counts,
    router,
    uninstall,
)
from flash_attention_registry.sdpa.ops import ROUTED_OPS, RoutedOps
from flash_attention_testkit import SdpaResult, assert_sdpa_parity

FLASH = "_scaled_dot_product_flash_attention"
CUDNN = "_scaled_dot_product_cudnn_attention"
GENERAL = "_flash_attention_forward"
GENERAL_BACKWARD = "_flash_attention_backward"
ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"

OFFSETS = torch.tensor([0, 4, 4, 10], dtype=torch.int32)


class Stock:
    """Passes for torch's own kernels of the SDPA ops: float64, and a list of what was called.

    Its backward goes by out and lse, as all do: by who ran the forward. Dropout it does not apply.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.error: Exception | None = None
        make_library: Any = torch.library.Library
        self.library = make_library("aten", "IMPL")
        for op in (FLASH, CUDNN):
            self.library.impl(op, getattr(self, op), "CPU")
            self.library.impl(f"{op}_backward", getattr(self, f"{op}_backward"), "CPU")

    def _scores(self, query: Tensor, key: Tensor, causal: bool, scale: float | None) -> Tensor:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).double()
        scores = query.double() @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        rows, columns = scores.shape[-2:]
        seen = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        return scores.masked_fill(~seen, -torch.inf) if causal else scores

    def _forward(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        scores = self._scores(query, key, causal, scale)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1).double()
        out = scores.softmax(-1).nan_to_num() @ value
        return torch.empty_like(query).copy_(out), scores.logsumexp(-1).float()

    def _backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.error is not None:
            raise self.error
        group = query.shape[1] // key.shape[1]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = self._scores(query, key, causal, scale) - lse.double()[..., None]
        weights = scores.exp().masked_fill(lse.isinf()[..., None], 0)
        wide = grad_out.double()
        delta = (wide * out.double()).sum(-1, keepdim=True)
        grads = weights * (wide @ value.repeat_interleave(group, 1).double().mT - delta) * factor
        dq = grads @ key.repeat_interleave(group, 1).double()
        dk, dv = grads.mT @ query.double(), weights.mT @ wide
        dk, dv = (grad.unflatten(1, (-1, group)).sum(2) for grad in (dk, dv))
        return (
            torch.empty_like(query).copy_(dq),
            torch.empty_like(key).copy_(dk),
            torch.empty_like(value).copy_(dv),
        )

    def _scaled_dot_product_flash_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        causal: bool = False,
        debug: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        self.calls.append(FLASH)
        out, lse = self._forward(query, key, value, causal, scale)
        lse = lse.masked_fill(lse.isinf(), torch.inf)
        rng = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
        return out, lse, None, None, query.shape[2], key.shape[2], *rng, query.new_empty(0)

    def _scaled_dot_product_flash_attention_backward(
        self, grad_out: Tensor, *arguments: Any, scale: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append(f"{FLASH}_backward")
        query, key, value, out, lse, *_, causal, _, _ = arguments
        return self._backward(grad_out, query, key, value, out, lse, causal, scale)

    def _scaled_dot_product_cudnn_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        compute_lse: bool,
        dropout_p: float = 0.0,
        causal: bool = False,
        debug: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        self.calls.append(CUDNN)
        out, lse = self._forward(query, key, value, causal, scale)
        rng = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
        return out, lse[..., None], None, None, query.shape[2], key.shape[2], *rng, None

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad_out: Tensor, *arguments: Any, scale: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append(f"{CUDNN}_backward")
        query, key, value, out, lse, *_, causal = arguments
        return self._backward(grad_out, query, key, value, out, lse.squeeze(-1), causal, scale)


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stock]:
    """What runs where nothing is installed, or what is installed declines."""
    adapters = ROUTED_OPS["cuda"].adapters
    monkeypatch.setattr(router, "ROUTED_OPS", {"cuda": RoutedOps("CPU", adapters)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is overridden, which is said once
        made = Stock()
    yield made
    made.library._destroy()


class Switch:
    """Installs the kernels, with the native ones above them or alone, and puts stock back."""

    def __init__(self, kernels: CudaKernels, native: NativeOps, on_cpu: ctypes.CDLL) -> None:
        self.kernels, self.native, self.on_cpu = kernels, native, on_cpu
        self.handle: InstalledKernels | None = None

    def to_native(self) -> None:
        self._install(self.native)

    def to_python(self) -> None:
        self._install(None)

    def to_stock(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle = None

    def _install(self, native: NativeOps | None) -> None:
        with warnings.catch_warnings():
            # That the stand-in for torch's kernels is a Python kernel.
            warnings.filterwarnings("ignore", ".*already overridden from Python")
            self.handle = install(self.kernels, native=native)
        self.on_cpu.pretend(0)  # anew: torch's functions have been looked up


@pytest.fixture
def switch(
    stock: Stock,
    anywhere: CudaKernels,
    native: NativeOps,
    on_cpu: ctypes.CDLL,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Switch]:
    """On stock at first."""
    monkeypatch.setattr(native, "_dispatch_key", "CPU")
    reset_dispatch_counts()
    made = Switch(anywhere, native, on_cpu)
    yield made
    made.to_stock()
    uninstall("cuda")
    reset_dispatch_counts()


@pytest.fixture
def natively(switch: Switch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernels are installed, and the kernel set below them fails."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("served through Python")

    for direction in ("forward", "backward"):
        monkeypatch.setattr(CudaKernels, direction, fail)
    switch.to_native()


@pytest.fixture
def sent_to(stock: Stock) -> Iterator[Callable[[str], None]]:
    """Let `F.scaled_dot_product_attention` call an op, as it does with tensors of a GPU."""
    chosen = [FLASH]

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        between = (None, True) if chosen[0] == CUDNN else ()
        op = getattr(torch.ops.aten, chosen[0])
        out, lse, *_ = op(query, key, value, *between, dropout_p, is_causal, scale=scale)
        return out, lse

    make_library: Any = torch.library.Library
    library = make_library("aten", "IMPL")
    library.impl(ON_CPU, call, "AutogradCPU")
    yield lambda op: chosen.__setitem__(0, op)
    library._destroy()


def leaves(rows: int = 9, keys: int = 9, heads_kv: int = 2) -> list[Tensor]:
    """Query, key and value `[B, H, S, D]`, rows outside of heads in memory."""
    generator = torch.Generator().manual_seed(rows + keys)
    made = []
    for length, heads in ((rows, 4), (keys, heads_kv), (keys, heads_kv)):
        numbers = torch.randn(2, length, heads, 64, generator=generator).bfloat16()
        made.append(numbers.transpose(1, 2).requires_grad_())
    return made


def grad_like(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)


def attend(op: str, tensors: list[Tensor], causal: bool = True, dropout_p: float = 0.0) -> Tensor:
    between = (None, True) if op == CUDNN else ()
    out: Tensor = getattr(torch.ops.aten, op)(*tensors, *between, dropout_p, causal)[0]
    return out


def assert_right(
    out: Tensor, grads: tuple[Tensor, ...], tensors: list[Tensor], grad_out: Tensor, **options: Any
) -> None:
    """Compare `[B, H, S, D]` results with the references."""
    __tracebackhide__ = True
    plain = [tensor.detach().transpose(1, 2) for tensor in (*tensors, grad_out, out, *grads)]
    query, key, value, gradient, result, *found = plain
    assert_sdpa_parity(
        options, SdpaResult(result, None, *found), query, key, value, grad_out=gradient, **options
    )


def python_run_by(call: Callable[[], object]) -> set[str]:
    """Names of the Python functions of ours that run while `call` does."""
    seen = set()

    def note(frame: Any, event: str, _argument: object) -> None:
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.startswith(("fa4_cuda", "flash_attention_registry")):
            seen.add(f"{name}.{frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


BOTH = pytest.mark.parametrize("op", [FLASH, CUDNN])


@BOTH
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_trains_without_python(
    natively: None, stock: Stock, sent_to: Callable[[str], None], op: str, causal: bool
) -> None:
    sent_to(op)
    tensors = leaves()
    out = F.scaled_dot_product_attention(*tensors, is_causal=causal, enable_gqa=True)
    grad_out = grad_like(out)
    grads: list[tuple[Tensor, ...]] = []
    ran = python_run_by(lambda: grads.append(torch.autograd.grad(out, tensors, grad_out)))
    assert ran == set()
    assert stock.calls == []
    assert str(dispatch_counts()) == "\n".join(
        f"{name}: 1 served, 0 on stock" for name in (op, f"{op}_backward")
    )
    assert_right(out, grads[0], tensors, grad_out, causal=causal)


@BOTH
def test_gradients_lie_as_torchs_do(natively: None, op: str) -> None:
    tensors = leaves()
    out = attend(op, tensors)
    for grad, tensor in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True):
        assert grad.stride() == torch.empty_like(tensor).stride()


@pytest.mark.parametrize("window", [(-1, -1), (2, 0), (3, 1)])
def test_packed_sequences_train_without_python(natively: None, window: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(10, 4, 64, generator=generator).bfloat16().requires_grad_() for _ in "qkv"
    ]
    # At the top it would import Triton, before other tests have chosen its interpreter.
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(*tensors, OFFSETS, OFFSETS, 6, 6, window_size=window)
    assert isinstance(out, Tensor)
    grad_out = grad_like(out)
    grads: list[tuple[Tensor, ...]] = []
    ran = python_run_by(lambda: grads.append(torch.autograd.grad(out, tensors, grad_out)))
    assert ran == set()
    counts = dispatch_counts()
    assert (counts[GENERAL].served, counts[GENERAL_BACKWARD].served) == (1, 1)
    left, right = (None if bound < 0 else bound for bound in window)
    assert_sdpa_parity(
        window,
        SdpaResult(out.detach(), None, *grads[0]),
        *(tensor.detach() for tensor in tensors),
        grad_out=grad_out,
        window_left=left,
        window_right=right,
        cu_seqlens_query=OFFSETS,
        cu_seqlens_key=OFFSETS,
    )


@BOTH
def test_a_backward_may_run_twice_and_for_one_tensor_alone(natively: None, op: str) -> None:
    tensors = leaves()
    out = attend(op, tensors)
    grad_out = grad_like(out)
    first = torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
    second = torch.autograd.grad(out, tensors, grad_out)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    query, key, value = (tensor.detach() for tensor in tensors)
    alone = attend(op, [query, key, value.requires_grad_()])
    assert torch.equal(torch.autograd.grad(alone, value, grad_out)[0], first[2])


@BOTH
@pytest.mark.parametrize("asked", [False, True])
def test_determinism_is_asked_for_of_torch(
    natively: None, on_cpu: ctypes.CDLL, op: str, asked: bool
) -> None:
    out = attend(op, leaves())
    torch.use_deterministic_algorithms(asked)
    try:
        out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert on_cpu.was_deterministic() == asked


@BOTH
def test_a_compiled_step_is_served(natively: None, stock: Stock, op: str) -> None:
    def step(*tensors: Tensor) -> Tensor:
        return attend(op, [tensors[0] * 2, *tensors[1:]]).sin()

    tensors = leaves()
    expected = step(*tensors)
    grad_out = grad_like(expected)
    expected_grads = torch.autograd.grad(expected, tensors, grad_out)
    torch._dynamo.reset()
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors)
    assert torch.equal(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, tensors, grad_out), expected_grads, strict=True
    ):
        assert torch.equal(one, other)
    assert stock.calls == []
    assert dispatch_counts()[f"{op}_backward"].served == 2


@BOTH
def test_dropout_is_stocks_and_counted(
    natively: None, stock: Stock, sent_to: Callable[[str], None], op: str
) -> None:
    sent_to(op)
    tensors = leaves()
    out = attend(op, tensors, dropout_p=0.25)
    torch.autograd.grad(out, tensors, grad_like(out))
    assert stock.calls == [op, f"{op}_backward"]
    counts = dispatch_counts()
    assert counts[op].declined == {"dropout_p > 0 is not supported": 1}
    # Of cuDNN's backward it is known before that that cuDNN ran the forward.
    because = "forward was run by cuDNN" if op == CUDNN else "dropout_p > 0 is not supported"
    assert counts[f"{op}_backward"].declined == {because: 1}


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), ValueError("no such ünits")],
    ids=["out of memory", "value"],
)
@BOTH
def test_an_error_of_stocks_backward_keeps_type_and_text(
    natively: None, stock: Stock, op: str, error: Exception
) -> None:
    tensors = leaves()
    out = attend(op, tensors, dropout_p=0.25)
    stock.error = error
    with pytest.raises(type(error), match=str(error)) as caught:
        torch.autograd.grad(out, tensors, grad_like(out))
    assert caught.type is type(error)


@BOTH
def test_a_backward_without_memory_or_launch_is_stocks(
    switch: Switch, stock: Stock, on_cpu: ctypes.CDLL, op: str
) -> None:
    """It fails natively, then through Python, which warns, and then stock computes it."""
    switch.to_native()
    tensors = leaves()
    out = attend(op, tensors)
    grad_out = grad_like(out)
    on_cpu.pretend(-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grads = torch.autograd.grad(out, tensors, grad_out)
    assert stock.calls == [f"{op}_backward"]
    assert dispatch_counts()[f"{op}_backward"].declined == {"kernel raised RuntimeError": 1}
    assert all("backward kernel was not launched" in str(each.message) for each in caught)
    assert_right(out, grads, tensors, grad_out, causal=True)


def grads_after_switch(
    op: str,
    switch_first: Callable[[], None],
    switch_then: Callable[[], None],
    *,
    rows: int = 9,
    keys: int = 9,
) -> None:
    """Let one run the forward and another the backward, and check what comes of it."""
    tensors = leaves(rows, keys)
    switch_first()
    out = attend(op, tensors)
    switch_then()
    grad_out = grad_like(out)
    assert_right(out, torch.autograd.grad(out, tensors, grad_out), tensors, grad_out, causal=True)


@BOTH
def test_stocks_backward_follows_a_served_forward(switch: Switch, stock: Stock, op: str) -> None:
    grads_after_switch(op, switch.to_native, switch.to_stock)
    assert stock.calls == [f"{op}_backward"]
    assert dispatch_counts()[op].served == 1


def test_flash_backward_is_served_after_stocks_forward(switch: Switch, stock: Stock) -> None:
    grads_after_switch(FLASH, switch.to_stock, switch.to_native)
    assert stock.calls == [FLASH]
    assert dispatch_counts()[f"{FLASH}_backward"].served == 1


def test_cudnns_backward_follows_cudnns_forward(switch: Switch, stock: Stock) -> None:
    grads_after_switch(CUDNN, switch.to_stock, switch.to_native)
    assert stock.calls == [CUDNN, f"{CUDNN}_backward"]
    reasons = dispatch_counts()[f"{CUDNN}_backward"].declined
    assert reasons == {"forward was run by cuDNN": 1}


@pytest.mark.parametrize("first", ["stock", "native", "python"])
@pytest.mark.parametrize("then", ["stock", "native", "python"])
def test_rows_without_keys_survive_any_switch(switch: Switch, first: str, then: str) -> None:
    """lse is infinite in the first three rows."""
    ways = {"stock": switch.to_stock, "native": switch.to_native, "python": switch.to_python}
    grads_after_switch(FLASH, ways[first], ways[then], rows=9, keys=6)


@BOTH
@pytest.mark.parametrize("native_first", [False, True])
def test_native_kernels_and_the_kernel_set_run_one_anothers_backwards(
    switch: Switch, stock: Stock, op: str, native_first: bool
) -> None:
    ways = switch.to_native, switch.to_python
    grads_after_switch(op, ways[not native_first], ways[native_first])
    assert stock.calls == []
    assert dispatch_counts()[f"{op}_backward"].served == 1


def test_what_asked_for_cudnn_itself_stays_there_in_the_backward(
    switch: Switch, stock: Stock
) -> None:
    switch.to_native()
    tensors = leaves()
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        out = attend(CUDNN, tensors)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    torch.autograd.grad(out, tensors, grad_like(out))
    assert stock.calls == [CUDNN, f"{CUDNN}_backward"]
