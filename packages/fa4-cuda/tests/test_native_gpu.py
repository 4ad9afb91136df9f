"""Served without Python: torch's attention on a Hopper GPU with fa4-cuda, and back to stock.

    pytest -m gpu packages/fa4-cuda/tests/test_native_gpu.py -s

`-s` shows the host's time of a call beside that of torch's FlashAttention-2.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa4_cuda
import flash_attention_registry as registry
from fa4_cuda.kernel_set import CudaKernels
from flash_attention_registry.sdpa import dispatch_counts, reset_dispatch_counts
from flash_attention_testkit import SdpaResult, assert_sdpa_parity

IMPL = "fa4-cuda"
FLASH = "_scaled_dot_product_flash_attention"
CUDNN = "_scaled_dot_product_cudnn_attention"
GENERAL = "_flash_attention_forward"

pytestmark = pytest.mark.gpu
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _clean(flash_attention_registry_reset: Any) -> None:
    if IMPL not in registry.list_flash_attention_impls():
        fa4_cuda.register()
    torch.manual_seed(0)
    reset_dispatch_counts()


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The implementation is active, and a call that comes to it through Python is not served."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("served through Python")

    # Before it is installed, which looks its methods up.
    for direction in ("forward", "backward"):
        monkeypatch.setattr(CudaKernels, direction, fail)
    registry.activate_flash_attention_impl(IMPL)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=grad)


def qkv(*shape: int, grad: bool = False) -> list[Tensor]:
    return [randn(*shape, grad=grad) for _ in range(3)]


def sdpa(tensors: list[Tensor], backend: SDPBackend | None = None, **options: Any) -> Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(*tensors, **options)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*tensors, **options)


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


def heads_last(*tensors: Tensor) -> list[Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


BACKENDS = pytest.mark.parametrize(
    ("backend", "op"),
    [(None, CUDNN), (SDPBackend.FLASH_ATTENTION, FLASH)],
    ids=["as torch chooses", "flash"],
)


@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_is_served_without_python_and_right(
    native: None, backend: SDPBackend | None, op: str, causal: bool
) -> None:
    tensors = qkv(2, 8, 300, 128)
    out = sdpa(tensors, backend, is_causal=causal)  # the first call, with no warm-up
    assert python_run_by(lambda: sdpa(tensors, backend, is_causal=causal)) == set()
    assert str(dispatch_counts()) == f"{op}: 2 served, 0 on stock"
    result = SdpaResult(out.transpose(1, 2), None)
    assert_sdpa_parity(op, result, *heads_last(*tensors), causal=causal)


@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_grouped_heads_of_a_packed_projection_keep_their_layout(
    native: None, head_dim: int, dtype: torch.dtype
) -> None:
    rows = randn(2, 200, (8 + 2 + 2) * head_dim, dtype=dtype)
    q, k, v = (
        part.unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for part in rows.split([8 * head_dim, 2 * head_dim, 2 * head_dim], dim=-1)
    )
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
    assert out.stride() == torch.empty_like(q).stride()
    assert dispatch_counts()[FLASH].served == 1
    result = SdpaResult(out.transpose(1, 2), lse)
    assert_sdpa_parity("projection", result, *heads_last(q, k, v), causal=True)


@pytest.mark.parametrize("op", [FLASH, CUDNN])
def test_results_have_the_form_of_stocks(op: str) -> None:
    tensors = qkv(2, 4, 100, 64)
    arguments = (*tensors, None, True) if op == CUDNN else tensors
    call = getattr(aten, op)
    stock = call(*arguments)
    registry.activate_flash_attention_impl(IMPL)
    mine = call(*arguments)
    assert dispatch_counts()[op].served == 1
    for ours, theirs in zip(mine, stock, strict=True):
        if not isinstance(theirs, Tensor) or not isinstance(ours, Tensor):
            assert ours == theirs
            continue
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("window", [(None, None), (64, 0), (20, 30), (-1, -1)])
@pytest.mark.parametrize("packed", [False, True])
def test_the_general_op_is_served(native: None, window: tuple[Any, Any], packed: bool) -> None:
    offsets = torch.tensor([0, 100, 100, 417], device="cuda", dtype=torch.int32)
    tensors = [randn(417, 4, 64) for _ in range(3)] if packed else qkv(2, 150, 4, 64)
    cu = (offsets, offsets, 317, 317) if packed else (None, None, 150, 150)
    windows = {"window_size_left": window[0], "window_size_right": window[1]}
    out, lse, *_ = aten._flash_attention_forward(*tensors, *cu, 0.0, False, False, **windows)
    assert dispatch_counts()[GENERAL].served == 1
    left, right = (None if bound in (None, -1) else bound for bound in window)
    lengths = {"cu_seqlens_query": offsets, "cu_seqlens_key": offsets} if packed else {}
    assert_sdpa_parity(
        "general",
        SdpaResult(out, lse),
        *tensors,
        window_left=left,
        window_right=right,
        empty_lse=float("inf"),
        **lengths,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_keys_that_are_not_in_use_are_not_read(native: None, causal: bool) -> None:
    starts, used = [0, 100, 100, 417], [37, 0, 300]
    offsets = torch.tensor(starts, device="cuda", dtype=torch.int32)
    query, key, value = (randn(417, 4, 64) for _ in range(3))
    places = [start + at for start, n in zip(starts, used, strict=False) for at in range(n)]
    unused = torch.ones(417, dtype=torch.bool)
    unused[places] = False
    for tensor in (key, value):
        tensor[unused.cuda()] = torch.nan
    out, lse, *_ = aten._flash_attention_forward(
        *(query, key, value, offsets, offsets, 317, 317, 0.0, causal, False),
        seqused_k=torch.tensor(used, device="cuda", dtype=torch.int32),
    )
    assert dispatch_counts()[GENERAL].served == 1
    edges = torch.tensor([0, *used], device="cuda", dtype=torch.int32)
    assert_sdpa_parity(
        "seqused",
        SdpaResult(out, lse),
        *(query, key[places], value[places]),
        causal=causal,
        empty_lse=float("inf"),
        cu_seqlens_query=offsets,
        cu_seqlens_key=edges.cumsum(0, dtype=torch.int32),
    )


def test_rows_without_keys_read_as_stocks() -> None:
    tensors = [randn(1, 12, 2, 64), *(randn(1, 8, 2, 64) for _ in "kv")]

    def call() -> tuple[Tensor, Tensor]:
        found = aten._flash_attention_forward(*tensors, None, None, 12, 8, 0.0, True, False)
        return found[0], found[1]

    stock = call()
    registry.activate_flash_attention_impl(IMPL)
    mine = call()
    assert dispatch_counts()[GENERAL].served == 1
    for ours, theirs in zip(mine, stock, strict=True):
        assert torch.equal(ours.isinf(), theirs.isinf())
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


DECLINED: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"dropout_p": 0.1}, "dropout_p > 0"),
    "mask": ({"attn_mask": "tril"}, "attn_bias"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_a_declined_call_gives_stocks_bits_and_counts_why(case: str) -> None:
    options, reason = DECLINED[case]
    tensors = qkv(2, 4, 256, 64)
    if "attn_mask" in options:
        options = {"attn_mask": torch.ones(256, 256, device="cuda", dtype=torch.bool).tril(3)}
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]

    def call() -> Tensor:
        torch.manual_seed(7)
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(*tensors, **options)

    stock = call()
    registry.activate_flash_attention_impl(IMPL)
    assert torch.equal(call(), stock)
    counts = dispatch_counts()
    assert counts.served == 0
    assert counts.declined == 1
    assert reason in str(counts)


def test_explicit_cudnn_stays_on_cudnn() -> None:
    tensors = qkv(1, 4, 128, 64)
    stock = sdpa(tensors, SDPBackend.CUDNN_ATTENTION)
    registry.activate_flash_attention_impl(IMPL)
    assert torch.equal(sdpa(tensors, SDPBackend.CUDNN_ATTENTION), stock)
    assert any("cuDNN itself" in reason for reason in dispatch_counts()[CUDNN].declined)


@BACKENDS
def test_stock_is_back_bitwise(backend: SDPBackend | None, op: str) -> None:
    tensors = qkv(2, 8, 300, 64)
    stock = sdpa(tensors, backend)
    registry.activate_flash_attention_impl(IMPL)
    sdpa(tensors, backend)
    registry.restore_flash_attention_impl()
    assert torch.equal(sdpa(tensors, backend), stock)
    assert dispatch_counts()[op].served == 1


def error_of(call: Callable[[], object]) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever stock raises
        call()
    return caught.type, str(caught.value).splitlines()[0]


def test_stocks_errors_keep_type_and_text() -> None:
    tensors = [randn(1, 2, 128, 128)[..., ::2] for _ in range(3)]
    call: Callable[[], object] = lambda: aten._scaled_dot_product_flash_attention(*tensors)  # noqa: E731
    stock = error_of(call)
    registry.activate_flash_attention_impl(IMPL)
    assert error_of(call) == stock


@pytest.fixture
def little_memory() -> Iterator[Callable[[], None]]:
    """Gives a function after which hardly any memory can be allocated."""

    def leave_little() -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(
            (torch.cuda.memory_reserved() + (4 << 20)) / total
        )

    yield leave_little
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["served", "declined"])
@pytest.mark.filterwarnings("ignore:fa4-cuda raised OutOfMemoryError:RuntimeWarning")
def test_running_out_of_memory_is_an_out_of_memory_error(
    little_memory: Callable[[], None], dropout_p: float
) -> None:
    tensors = qkv(8, 16, 2048, 128)
    registry.activate_flash_attention_impl(IMPL)
    little_memory()
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        sdpa(tensors, SDPBackend.FLASH_ATTENTION, dropout_p=dropout_p)


def test_a_strict_environment_raises_through_the_native_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASH_ATTENTION_IMPL_STRICT", "1")
    registry.activate_flash_attention_impl(IMPL)
    with pytest.raises(registry.CallDeclinedError, match="dropout_p > 0 is not supported"):
        sdpa(qkv(1, 2, 128, 64), SDPBackend.FLASH_ATTENTION, dropout_p=0.1)


def test_the_family_takes_it_on_hopper() -> None:
    registry.activate_flash_attention_impl("FA4")
    assert registry.current_flash_attention_impl() == IMPL


def test_it_serves_on_the_current_stream_and_in_a_cuda_graph(native: None) -> None:
    tensors = qkv(2, 8, 512, 128)
    eager = sdpa(tensors, is_causal=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(sdpa(tensors, is_causal=True), eager)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sdpa(tensors, is_causal=True)
    for tensor in tensors:
        tensor.copy_(randn(*tensor.shape))
    for _ in range(3):
        graph.replay()
    assert torch.equal(captured, sdpa(tensors, is_causal=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_call_runs_on_the_device_of_its_tensors(native: None) -> None:
    tensors = [tensor.to("cuda:1") for tensor in qkv(2, 8, 256, 64)]
    out = sdpa(tensors)
    assert torch.cuda.current_device() == 0
    assert out.device == tensors[0].device
    assert_sdpa_parity("second GPU", SdpaResult(out.transpose(1, 2)), *heads_last(*tensors))


def test_compiled_graphs_are_served(native: None) -> None:
    tensors = qkv(2, 8, 256, 64)
    compiled = torch.compile(lambda *t: F.scaled_dot_product_attention(*t).sin(), fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), sdpa(tensors).sin())
    assert dispatch_counts().served == 2


def test_direct_calls_are_right_also_compiled() -> None:
    tensors = qkv(2, 300, 8, 128)
    for call in (fa4_cuda.flash_attn_func, torch.compile(fa4_cuda.flash_attn_func, fullgraph=True)):
        out, lse, _ = call(*tensors, causal=True, window_size=(100, -1), return_attn_probs=True)
        result = SdpaResult(out, lse)
        assert_sdpa_parity("direct", result, *tensors, causal=True, window_left=100)
    offsets = torch.tensor([0, 100, 417], device="cuda", dtype=torch.int32)
    packed = [randn(417, 4, 64) for _ in range(3)]
    out = fa4_cuda.flash_attn_varlen_func(*packed, offsets, offsets, 317, 317)
    assert_sdpa_parity(
        "packed",
        SdpaResult(out, None),
        *packed,
        cu_seqlens_query=offsets,
        cu_seqlens_key=offsets,
    )


def test_switching_under_load_loses_no_call() -> None:
    tensors = qkv(2, 4, 256, 64)
    expected = sdpa(tensors)
    stop, wrong, calls = threading.Event(), [], [0, 0]

    def attend(number: int) -> None:
        try:
            while not stop.is_set():
                if not torch.allclose(sdpa(tensors), expected, atol=2e-2, rtol=2e-2):
                    wrong.append("a result is not attention's")
                calls[number] += 1
        except BaseException as error:
            wrong.append(repr(error))

    registry.activate_flash_attention_impl(IMPL)
    threads = [threading.Thread(target=attend, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        registry.restore_flash_attention_impl()
        registry.activate_flash_attention_impl(IMPL)
    stop.set()
    for thread in threads:
        thread.join()
    counts = dispatch_counts()
    assert wrong == []
    assert counts.declined == 0
    assert 0 < counts.served < sum(calls)


def host_microseconds(call: Callable[[], object], times: int = 2000) -> float:
    """The host's time of a call, the GPU being busy with something shorter."""
    for _ in range(200):
        call()
    rounds = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times // 5):
            call()
        rounds.append((time.perf_counter() - start) / (times // 5))
    torch.cuda.synchronize()
    return min(rounds) * 1e6


def test_the_hosts_time_of_a_served_call_is_not_above_flash_attention_2s() -> None:
    tensors = qkv(1, 2, 128, 64)
    times = {}
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for causal in (False, True):
            call: Callable[[], object] = lambda causal=causal: F.scaled_dot_product_attention(  # noqa: E731
                *tensors, is_causal=causal
            )
            times[causal, "stock, before"] = host_microseconds(call)
            registry.activate_flash_attention_impl(IMPL)
            times[causal, "served"] = host_microseconds(call)
            registry.restore_flash_attention_impl()
            times[causal, "stock, behind the router"] = host_microseconds(call)
    for (causal, what), microseconds in times.items():
        print(f"{'causal' if causal else 'full':7}{microseconds:7.1f} us  {what}")
    assert dispatch_counts().declined == 0
    for causal in (False, True):
        assert times[causal, "served"] <= 1.1 * times[causal, "stock, before"]
