"""The way of a served call, from an op's arguments to its results, with a CPU in the GPU's place.

Glue and planner are the real ones; only what asks and launches on a GPU is replaced
(`cpu_device.cpp`). Each call is compared with what the registry's own adapters, in Python, make of
the same call and the same attention.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fa4_cuda import kernel_set
from fa4_cuda.native import NativeOps
from flash_attention_registry.sdpa import (
    AttentionCall,
    Capabilities,
    dispatch_counts,
    install,
    reset_dispatch_counts,
    uninstall,
)
from flash_attention_testkit import reference_sdpa

FLASH = "_scaled_dot_product_flash_attention"
CUDNN = "_scaled_dot_product_cudnn_attention"
GENERAL = "_flash_attention_forward"
INPLACE = "_flash_attention_forward_no_dropout_inplace"

Op = Callable[..., Any]


class ReferenceKernels:
    """The kernel set below the native kernels: float64 attention, and a list of its calls."""

    name = "reference"
    capabilities = Capabilities(
        device_types=frozenset({"cuda", "cpu"}),
        dtypes=kernel_set.CAPABILITIES.dtypes,
        head_dims=kernel_set.CAPABILITIES.head_dims,
        features=kernel_set.CAPABILITIES.features,
        deterministic="always",
    )

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []

    def supports(self, call: AttentionCall) -> str | None:
        return self.capabilities.reason_to_decline(call)

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        self.calls.append(call)
        if call.seqused_key is not None:
            call = with_used_keys_alone(call)
        result = reference_sdpa(
            call.query,
            call.key,
            call.value,
            causal=call.causal,
            window_left=call.window_left,
            window_right=call.window_right,
            scale=call.scale,
            cu_seqlens_query=call.cu_seqlens_query,
            cu_seqlens_key=call.cu_seqlens_key,
        )
        assert call.out is not None
        assert result.lse is not None
        empty = result.lse == -torch.inf
        call.out.copy_(result.out)
        return call.out, result.lse.float().masked_fill(empty, call.lse_of_empty_rows).contiguous()

    def backward(self, *_: Any) -> Any:
        raise NotImplementedError


def with_used_keys_alone(call: AttentionCall) -> AttentionCall:
    """The same call without the keys that are not in use."""
    assert call.cu_seqlens_key is not None
    assert call.seqused_key is not None
    starts, used = call.cu_seqlens_key[:-1].tolist(), call.seqused_key.tolist()
    places = [start + at for start, count in zip(starts, used, strict=True) for at in range(count)]
    edges = torch.tensor([0, *used], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return call._replace(
        key=call.key[places], value=call.value[places], cu_seqlens_key=edges, seqused_key=None
    )


@pytest.fixture
def below(native: NativeOps, on_cpu: ctypes.CDLL) -> Iterator[ReferenceKernels]:
    """What is installed below the native kernels, which serve at the CUDA key."""
    kernels = ReferenceKernels()
    reset_dispatch_counts()
    install(kernels, native=native)
    on_cpu.pretend(0)
    yield kernels
    install(kernels).remove()
    uninstall("cuda")
    reset_dispatch_counts()


def at_cuda(op: str, *arguments: Any, **keywords: Any) -> Any:
    """Call what stands at the CUDA key, every argument given."""
    schema = getattr(torch.ops.aten, op).default._schema
    positional = [each for each in schema.arguments if not each.kwarg_only]
    filled = [*arguments, *(each.default_value for each in positional[len(arguments) :])]
    named = {
        each.name: keywords.get(each.name, each.default_value)
        for each in schema.arguments
        if each.kwarg_only
    }
    keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with torch.no_grad():
        kernel = torch.library.get_kernel(f"aten::{op}", "CUDA")
        return kernel.call_boxed(keyset, *filled, **named)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_alike(mine: Any, theirs: Any) -> None:
    """Results of one call, in everything that an op promises."""
    assert len(mine) == len(theirs)
    for number, (ours, other) in enumerate(zip(mine, theirs, strict=True)):
        if not isinstance(other, Tensor):
            assert ours == other, number
            continue
        assert (ours.shape, ours.dtype) == (other.shape, other.dtype), number
        assert ours.stride() == other.stride(), number
        assert ours.storage_offset() == other.storage_offset(), number
        if other.is_floating_point() and number < 2:
            torch.testing.assert_close(ours, other, atol=2e-2, rtol=2e-2)


@pytest.fixture
def served(below: ReferenceKernels, on_cpu: ctypes.CDLL) -> Op:
    """Make a call natively, which must be served, and compare it with the adapters' results."""

    def call(op: str, *arguments: Any, **keywords: Any) -> Any:
        mine = at_cuda(op, *arguments, **keywords)
        assert below.calls == [], "it went on to the router"
        assert dispatch_counts()[op].served == 1
        on_cpu.fa4_torch_switch(0)
        theirs = at_cuda(op, *arguments, **keywords)
        assert len(below.calls) == 1
        assert_alike(*((each,) if isinstance(each, Tensor) else each for each in (mine, theirs)))
        return mine

    return call


def heads_first(batch: int, heads: int, rows: int, width: int) -> Tensor:
    return normal(batch, heads, rows, width)


def rows_first(batch: int, heads: int, rows: int, width: int) -> Tensor:
    return normal(batch, rows, heads, width).transpose(1, 2)


def of_a_projection(batch: int, heads: int, rows: int, width: int) -> Tensor:
    return normal(batch, rows, 3, heads, width)[:, :, 1].transpose(1, 2)


def shared_by_heads(batch: int, heads: int, rows: int, width: int) -> Tensor:
    return normal(batch, 1, rows, width).expand(batch, heads, rows, width)


LAYOUTS = [heads_first, rows_first, of_a_projection, shared_by_heads]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", [FLASH, CUDNN])
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_ops(served: Op, op: str, layout: Op, causal: bool) -> None:
    query, key, value = (layout(2, heads, 9, 64) for heads in (4, 2, 2))
    bias = (None, True) if op == CUDNN else ()
    served(op, query, key, value, *bias, 0.0, causal)


@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0])
def test_the_scale_is_the_callers(served: Op, scale: float) -> None:
    query = normal(1, 2, 5, 40)
    served(FLASH, query, query, query, scale=scale)


def test_causal_masks_of_unequal_lengths_are_aligned_at_the_end(served: Op) -> None:
    query, key = normal(1, 2, 9, 64), normal(1, 2, 5, 64)
    _, lse, *_ = served(FLASH, query, key, key, 0.0, True)
    assert (lse[..., :4] == torch.inf).all()


WINDOWS = [(None, None), (-1, -1), (3, 0), (2, 4), (0, None), (100, 100), (2**40, 2)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_general_op(served: Op, window: tuple[Any, Any], causal: bool) -> None:
    query, key = normal(2, 11, 4, 64), normal(2, 13, 2, 64)
    served(
        GENERAL,
        *(query, key, key, None, None, 11, 13, 0.0, causal, False),
        window_size_left=window[0],
        window_size_right=window[1],
    )


OFFSETS = torch.tensor([0, 4, 4, 10], dtype=torch.int32)


@pytest.mark.parametrize("window", [(None, None), (2, 1)])
def test_packed_sequences(served: Op, window: tuple[Any, Any]) -> None:
    query, key = normal(10, 4, 64), normal(10, 2, 64)
    served(
        GENERAL,
        *(query, key, key, OFFSETS, OFFSETS, 6, 6, 0.0, True, False),
        window_size_left=window[0],
        window_size_right=window[1],
    )


@pytest.mark.parametrize("causal", [False, True])
def test_keys_that_are_not_in_use(served: Op, causal: bool) -> None:
    query, key = normal(10, 4, 64), normal(10, 2, 64)
    offsets = torch.tensor([0, 4, 4, 10], dtype=torch.int32)
    used = torch.tensor([3, 0, 2], dtype=torch.int32)
    _, lse, *_ = served(
        GENERAL,
        *(query, key, key, offsets, offsets, 6, 6, 0.0, causal, False),
        seqused_k=used,
    )
    # Aligned at the end of what is used: of six rows and two keys four rows see none.
    assert lse.isinf().sum() == (4 * (1 + 4) if causal else 0)


@pytest.mark.skipif(not hasattr(torch.ops.aten, INPLACE), reason="this torch has no such op")
def test_the_op_that_writes_its_argument(served: Op) -> None:
    rows = normal(10, 2, 64)
    out = torch.zeros(10, 2, 64, dtype=torch.bfloat16)
    arguments = (rows, rows, rows, OFFSETS, OFFSETS, 6, 6, 0.0, False, False)
    served(INPLACE, out, *arguments)
    expected = at_cuda(GENERAL, *arguments)[0]
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)


Q, R = normal(1, 2, 8, 64), normal(1, 8, 2, 64)
T = normal(10, 2, 64)
DENSE = (None, None, 8, 8, 0.0, False, False)
PACKED = (OFFSETS, OFFSETS, 6, 6, 0.0, False, False)
GOES_ON: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "dropout": (FLASH, (Q, Q, Q, 0.1), {}),
    "debug mask": (FLASH, (Q, Q, Q, 0.0, False, True), {}),
    "float32": (FLASH, (Q.float(),) * 3, {}),
    "mixed dtypes": (FLASH, (Q, Q.half(), Q), {}),
    "head_dim 60": (FLASH, (Q[..., :60],) * 3, {}),
    "misaligned": (FLASH, (Q[..., 4:60],) * 3, {}),
    "gaps": (FLASH, (Q[..., ::2],) * 3, {}),
    "3 dimensions": (FLASH, (Q[0], Q[0], Q[0]), {}),
    "empty": (FLASH, (Q[:, :, :0], Q, Q), {}),
    "batches differ": (FLASH, (normal(2, 2, 8, 64), Q, Q), {}),
    "heads": (FLASH, (normal(1, 3, 8, 64), Q, Q), {}),
    "key and value differ": (FLASH, (Q, Q, Q[:, :, :7]), {}),
    "bias": (CUDNN, (Q, Q, Q, torch.zeros(8, 8).bfloat16(), True), {}),
    "cuDNN's own mask": (CUDNN, (Q[:, :, :4], Q, Q, None, True, 0.0, True), {}),
    "alibi": (GENERAL, (R, R, R, *DENSE), {"alibi_slopes": torch.ones(2)}),
    "seqused, dense": (GENERAL, (R, R, R, *DENSE), {"seqused_k": torch.ones(1).int()}),
    "int64 seqused": (GENERAL, (T, T, T, *PACKED), {"seqused_k": torch.ones(3).long()}),
    "too many seqused": (GENERAL, (T, T, T, *PACKED), {"seqused_k": torch.ones(4).int()}),
    "one offset": (GENERAL, (T, T, T, OFFSETS, None, 6, 6, 0.0, False, False), {}),
    "int64 offsets": (GENERAL, (T, T, T, *(OFFSETS.long(),) * 2, 6, 6, 0.0, False, False), {}),
    "other offsets": (GENERAL, (T, T, T, OFFSETS, OFFSETS[:3], 6, 6, 0.0, False, False), {}),
}
if "block_table" in str(torch.ops.aten._flash_attention_forward.default._schema):
    GOES_ON["pages"] = (GENERAL, (R, R, R, *DENSE), {"block_table": torch.zeros(1, 1).int()})
    GOES_ON["splits"] = (GENERAL, (R, R, R, *DENSE), {"num_splits": 2})


@pytest.mark.parametrize("case", GOES_ON)
def test_what_is_not_served_goes_on_to_the_router(below: ReferenceKernels, case: str) -> None:
    op, arguments, keywords = GOES_ON[case]
    # Served or not is the router's business, and what it says to "misaligned" is yes.
    if case == "misaligned":
        at_cuda(op, *arguments, **keywords)
        assert len(below.calls) == 1
    else:
        with pytest.raises(RuntimeError, match="no kernel set served it"):
            at_cuda(op, *arguments, **keywords)
        assert dispatch_counts()[op].total_declined == 1
    assert dispatch_counts()[op].served == len(below.calls)


def test_a_caller_that_disabled_flash_asked_for_cudnn(below: ReferenceKernels) -> None:
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        with pytest.raises(RuntimeError, match="no kernel set served it"):
            at_cuda(CUDNN, Q, Q, Q, None, True)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    (reason,) = dispatch_counts()[CUDNN].declined
    assert "asked for cuDNN itself" in reason


def test_a_launch_that_fails_is_done_again_where_it_can_be_told(
    below: ReferenceKernels, on_cpu: ctypes.CDLL
) -> None:
    on_cpu.pretend(-700)
    out, *_ = at_cuda(FLASH, Q, Q, Q)
    assert len(below.calls) == 1
    assert out.isfinite().all()


def test_a_kernel_that_calls_the_op_below_is_not_served_in_part(
    below: ReferenceKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's own kernel for SDPA calls the general one."""
    monkeypatch.setattr(below, "supports", lambda call: at_cuda(GENERAL, R, R, R, *DENSE) and "no")
    with pytest.raises(RuntimeError, match="no kernel set served it"):
        at_cuda(FLASH, Q, Q, Q, 0.0, False, True)
    assert dispatch_counts()[GENERAL].served == 0


def test_switching_under_load_loses_no_call(native: NativeOps, below: ReferenceKernels) -> None:
    expected, _, *_ = at_cuda(FLASH, Q, Q, Q)
    stop, wrong, calls = threading.Event(), [], [0, 0]

    def attend(number: int) -> None:
        try:
            while not stop.is_set():
                out, *_ = at_cuda(FLASH, Q, Q, Q)
                if not torch.allclose(out, expected, atol=2e-2, rtol=2e-2):
                    wrong.append("a result is not attention's")
                calls[number] += 1
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=attend, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline or min(calls) < 10:
        # Either kernel set serves; only the first has native kernels.
        install(ReferenceKernels())
        install(below, native=native)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    counts = dispatch_counts()[FLASH]
    assert (counts.served, counts.total_declined) == (1 + sum(calls), 0)


def test_no_tensor_is_kept_alive(below: ReferenceKernels) -> None:
    query = normal(1, 8, 2, 64)
    before = query._use_count(), OFFSETS._use_count()
    rows = query[0]
    for _ in range(3):
        out, *_ = at_cuda(GENERAL, rows, rows, rows, *(OFFSETS[:2],) * 2, 8, 8, 0.0, True, False)
    assert out._use_count() == 1
    del rows
    assert (query._use_count(), OFFSETS._use_count()) == before
