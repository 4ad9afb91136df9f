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
GENERAL_BACKWARD = "_flash_attention_backward"
INPLACE = "_flash_attention_forward_no_dropout_inplace"

Op = Callable[..., Any]


class ReferenceKernels:
    """The kernel set below the native kernels: float64 attention, and a list of its calls.

    Its gradients are those of the query, key and value; what a forward left it does not read.
    """

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

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append(call)
        result = reference_sdpa(
            call.query,
            call.key,
            call.value,
            grad_out=grad_out,
            causal=call.causal,
            window_left=call.window_left,
            window_right=call.window_right,
            scale=call.scale,
            cu_seqlens_query=call.cu_seqlens_query,
            cu_seqlens_key=call.cu_seqlens_key,
        )
        assert result.dq is not None
        assert result.dk is not None
        assert result.dv is not None
        dtype = call.query.dtype
        return result.dq.to(dtype), result.dk.to(dtype), result.dv.to(dtype)


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


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 1000 * seed)
    return torch.randn(shape, generator=generator).to(dtype)


def assert_alike(mine: Any, theirs: Any) -> None:
    """Results of one call, in everything that an op promises."""
    assert len(mine) == len(theirs)
    computed = 3 if len(theirs) == 3 else 2  # gradients, or out and lse; nobody reads the others
    for number, (ours, other) in enumerate(zip(mine, theirs, strict=True)):
        if not isinstance(other, Tensor):
            assert ours == other, number
            continue
        assert (ours.shape, ours.dtype) == (other.shape, other.dtype), number
        assert ours.stride() == other.stride(), number
        assert ours.storage_offset() == other.storage_offset(), number
        if number < computed:
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


def heads_first(batch: int, heads: int, rows: int, width: int, seed: int = 0) -> Tensor:
    return normal(batch, heads, rows, width, seed=seed)


def rows_first(batch: int, heads: int, rows: int, width: int, seed: int = 0) -> Tensor:
    return normal(batch, rows, heads, width, seed=seed).transpose(1, 2)


def of_a_projection(batch: int, heads: int, rows: int, width: int, seed: int = 0) -> Tensor:
    return normal(batch, rows, 3, heads, width, seed=seed)[:, :, 1].transpose(1, 2)


def shared_by_heads(batch: int, heads: int, rows: int, width: int, seed: int = 0) -> Tensor:
    return normal(batch, 1, rows, width, seed=seed).expand(batch, heads, rows, width)


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


Three = tuple[Tensor, Tensor, Tensor]


def backward_arguments(
    op: str, tensors: Three, causal: bool = False, grad_out: Tensor | None = None
) -> tuple[Any, ...]:
    """What autograd gives the backward of an SDPA op, up to the scale."""
    bias = (None, True) if op == CUDNN else ()
    left = at_cuda(op, *tensors, *bias, 0.0, causal)
    out, lse, cu_q, cu_k, max_q, max_k, seed, offset, _ = left
    if grad_out is None:
        grad_out = normal(*out.shape, seed=3) / 2
    read = grad_out, *tensors, out, lse
    if op == CUDNN:
        return *read, seed, offset, None, cu_q, cu_k, max_q, max_k, 0.0, causal
    return *read, cu_q, cu_k, max_q, max_k, 0.0, causal, seed, offset


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", [FLASH, CUDNN])
@pytest.mark.parametrize("causal", [False, True])
def test_backwards_of_sdpa(served: Op, op: str, layout: Op, causal: bool) -> None:
    tensors = layout(2, 4, 9, 64), layout(2, 2, 9, 64, seed=1), layout(2, 2, 9, 64, seed=2)
    served(f"{op}_backward", *backward_arguments(op, tensors, causal))


@pytest.mark.parametrize("op", [FLASH, CUDNN])
def test_float16_is_served_in_both_directions(served: Op, op: str) -> None:
    query, key, value = (
        normal(2, heads, 9, 64, dtype=torch.float16, seed=seed)
        for seed, heads in enumerate((4, 2, 2))
    )
    grad_out = normal(2, 4, 9, 64, dtype=torch.float16, seed=3) / 2
    served(f"{op}_backward", *backward_arguments(op, (query, key, value), True, grad_out))


GRADIENTS_OF_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "one number": lambda grad: grad[0, 0, 0, 0].expand(grad.shape),
    "one head": lambda grad: grad[:, :1].expand(grad.shape),
    "columns outside": lambda grad: grad.mT.contiguous().mT,
    "every second column": lambda grad: grad.repeat_interleave(2, -1)[..., ::2],
    "rows first": lambda grad: grad.transpose(1, 2).contiguous().transpose(1, 2),
    "misaligned": lambda grad: torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(grad.shape),
    "odd rows": lambda grad: torch.cat([grad, grad[..., :4]], -1)[..., :64],
}


@pytest.mark.parametrize("name", GRADIENTS_OF_OUT)
@pytest.mark.parametrize("op", [FLASH, CUDNN])
def test_the_gradient_of_out_may_lie_anyhow(served: Op, op: str, name: str) -> None:
    tensors = normal(2, 4, 9, 64), normal(2, 2, 9, 64), normal(2, 2, 9, 64, seed=2)
    grad_out = GRADIENTS_OF_OUT[name](normal(2, 4, 9, 64, seed=3) / 2)
    served(f"{op}_backward", *backward_arguments(op, tensors, True, grad_out))


@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0])
def test_the_scale_of_a_backward_is_the_callers(served: Op, scale: float) -> None:
    query, key, value, grad_out = (normal(1, 2, 5, 40, seed=seed) for seed in range(4))
    out, lse, *_ = at_cuda(FLASH, query, key, value, scale=scale)
    rest = (None, None, 5, 5, 0.0, False, *(torch.zeros(2),) * 2)
    served(f"{FLASH}_backward", grad_out / 2, query, key, value, out, lse, *rest, scale=scale)


@pytest.mark.parametrize("left", [torch.inf, -torch.inf], ids=["torch", "flash-attn"])
def test_rows_without_keys_have_gradients_of_zero(served: Op, left: float) -> None:
    tensors = normal(1, 2, 9, 64), normal(1, 2, 5, 64), normal(1, 2, 5, 64, seed=2)
    arguments = backward_arguments(FLASH, tensors, True)
    lse = arguments[5]
    assert lse.isinf().sum() == 2 * 4
    lse[lse.isinf()] = left
    dq, *_ = served(f"{FLASH}_backward", *arguments)
    assert (dq[:, :, :4] == 0).all()


def general_arguments(
    tensors: Three, cu: tuple[Any, ...], causal: bool, **keywords: Any
) -> tuple[Any, ...]:
    """What autograd gives the backward of the general op."""
    out, lse, rng, unused, _ = at_cuda(GENERAL, *tensors, *cu, 0.0, causal, False, **keywords)
    grad_out = normal(*out.shape, seed=3) / 2
    return grad_out, *tensors, out, lse, *cu, 0.0, causal, rng, unused


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_backward_of_the_general_op(served: Op, window: tuple[Any, Any], causal: bool) -> None:
    windows = {"window_size_left": window[0], "window_size_right": window[1]}
    tensors = normal(2, 11, 4, 64), normal(2, 13, 2, 64), normal(2, 13, 2, 64, seed=2)
    arguments = general_arguments(tensors, (None, None, 11, 13), causal, **windows)
    served(GENERAL_BACKWARD, *arguments, **windows)


@pytest.mark.parametrize("window", [(None, None), (2, 1)])
def test_the_backward_of_packed_sequences(served: Op, window: tuple[Any, Any]) -> None:
    windows = {"window_size_left": window[0], "window_size_right": window[1]}
    tensors = normal(10, 4, 64), normal(10, 2, 64), normal(10, 2, 64, seed=2)
    arguments = general_arguments(tensors, (OFFSETS, OFFSETS, 6, 6), True, **windows)
    served(GENERAL_BACKWARD, *arguments, **windows)


def test_sequences_without_keys_or_without_queries_have_gradients_of_zero(served: Op) -> None:
    keys = torch.tensor([0, 0, 3, 10], dtype=torch.int32)
    tensors = normal(10, 4, 64), normal(10, 2, 64), normal(10, 2, 64, seed=2)
    arguments = general_arguments(tensors, (OFFSETS, keys, 6, 7), False)
    dq, dk, dv = served(GENERAL_BACKWARD, *arguments)
    assert (dq[:4] == 0).all()
    for grad in (dk, dv):
        assert (grad[:3] == 0).all()
        assert (grad[3:] != 0).any()


@pytest.mark.parametrize("asked", [False, True])
def test_gradients_are_deterministic_if_torch_is_to_be(
    below: ReferenceKernels, on_cpu: ctypes.CDLL, asked: bool
) -> None:
    arguments = backward_arguments(FLASH, (Q, Q, Q))
    torch.use_deterministic_algorithms(asked)
    try:
        at_cuda(f"{FLASH}_backward", *arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert below.calls == []
    assert on_cpu.was_deterministic() == asked


def with_changes(op: str, changes: dict[int, Any]) -> tuple[Any, ...]:
    """Arguments of a backward, those at some places changed."""
    made = general_arguments((R, R, R), DENSE[:4], False) if op == GENERAL else None
    arguments = list(made or backward_arguments(op, (Q, Q, Q)))
    for place, value in changes.items():
        arguments[place] = value(arguments[place]) if callable(value) else value
    return tuple(arguments)


BACKWARD_GOES_ON: dict[str, tuple[str, dict[int, Any], str]] = {
    "dropout": (FLASH, {10: 0.1}, "dropout_p > 0"),
    "dropout, cuDNN": (CUDNN, {13: 0.1}, "dropout_p > 0"),
    "dropout, general": (GENERAL, {10: 0.1}, "dropout_p > 0"),
    "offsets": (FLASH, {6: torch.zeros(2).int()}, "cum_seq_q and cum_seq_k of a dense backward"),
    "bias": (CUDNN, {8: torch.zeros(8, 8).bfloat16()}, "attn_bias"),
    "cuDNN's forward": (CUDNN, {6: torch.zeros((), dtype=torch.int64)}, "forward was run by cuDNN"),
    "lse of another shape": (FLASH, {5: lambda lse: lse[..., :7]}, "logsumexp"),
    "lse without a column": (CUDNN, {5: lambda lse: lse.squeeze(-1)}, "logsumexp"),
    "lse of two columns": (CUDNN, {5: lambda lse: lse.expand(-1, -1, -1, 2)}, "logsumexp"),
    "lse in float64": (FLASH, {5: lambda lse: lse.double()}, "logsumexp"),
    "grad_out of another shape": (FLASH, {0: lambda grad: grad[..., :56]}, "shape"),
    "grad_out of another dtype": (FLASH, {0: lambda grad: grad.half()}, "dtype"),
    "out of another shape": (FLASH, {4: lambda out: out[:, :1]}, "shape"),
    "float32": (FLASH, dict.fromkeys(range(5), Q.float()), "float32"),
    "one offset": (GENERAL, {6: torch.tensor([0, 8]).int()}, "not given together"),
}


@pytest.mark.parametrize("case", BACKWARD_GOES_ON)
def test_a_backward_that_is_not_served_goes_on_and_says_why(
    below: ReferenceKernels, case: str
) -> None:
    op, changes, reason = BACKWARD_GOES_ON[case]
    arguments = with_changes(op, changes)
    name = GENERAL_BACKWARD if op == GENERAL else f"{op}_backward"
    with pytest.raises(RuntimeError, match="no kernel set served it"):
        at_cuda(name, *arguments)
    counts = dispatch_counts()[name]
    assert (counts.served, counts.total_declined) == (0, 1)
    assert reason in str(counts.declined)


def test_gaps_between_the_numbers_of_lse_are_closed_by_the_router(below: ReferenceKernels) -> None:
    arguments = with_changes(FLASH, {5: lambda lse: lse.repeat_interleave(2, -1)[..., ::2]})
    at_cuda(f"{FLASH}_backward", *arguments)
    assert len(below.calls) == 1


def test_a_backward_that_fails_is_done_again_where_it_can_be_told(
    below: ReferenceKernels, on_cpu: ctypes.CDLL
) -> None:
    arguments = backward_arguments(FLASH, (Q, Q, Q))
    on_cpu.pretend(-700)
    dq, *_ = at_cuda(f"{FLASH}_backward", *arguments)
    assert len(below.calls) == 1
    assert dq.isfinite().all()


def test_a_backward_keeps_no_tensor_alive(below: ReferenceKernels) -> None:
    query, grad_out = normal(1, 2, 8, 64), normal(1, 2, 1, 1).expand(1, 2, 8, 64)
    arguments = backward_arguments(CUDNN, (query, query, query), False, grad_out)
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    before = [tensor._use_count() for tensor in tensors]
    for _ in range(3):
        grads = at_cuda(f"{CUDNN}_backward", *arguments)
    assert below.calls == []
    assert [grad._use_count() for grad in grads] == [1, 1, 1]
    assert [tensor._use_count() for tensor in tensors] == before


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
