"""The native kernels in the dispatcher, as far as that can be seen without a GPU.

CPU tensors are not served, so every call goes on: to a route that stands in for the registry's
router, or to the router itself.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fa4_cuda.kernel_set import CudaKernels
from fa4_cuda.native import NativeOps, signature_of
from flash_attention_registry.sdpa import dispatch_counts, install, reset_dispatch_counts, uninstall

FLASH = "_scaled_dot_product_flash_attention"
CUDNN = "_scaled_dot_product_cudnn_attention"
GENERAL = "_flash_attention_forward"
INPLACE = "_flash_attention_forward_no_dropout_inplace"
BACKWARDS = (f"{FLASH}_backward", f"{CUDNN}_backward", "_flash_attention_backward")
OPS_H = Path(__file__).parents[1] / "src/fa4_cuda/csrc/glue/ops.h"

SCHEMAS = {
    "torch 2.11": "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, "
    "Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, bool return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None) "
    "-> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor mask)",
    "torch 2.12": "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, "
    "Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, bool return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None, "
    "Tensor? block_table=None, int? num_splits=None) "
    "-> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor mask)",
}


def query() -> Tensor:
    return torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture
def put_in(on_cpu: ctypes.CDLL) -> Iterator[Callable[[str, Callable[..., Any]], None]]:
    """Put the native kernel of an op at the CPU key, above a route of the test's."""
    put_in = []

    def put(op: str, route: Callable[..., Any]) -> None:
        native = NativeOps("CPU", lambda: on_cpu)
        put_in.append(native)
        assert native.put_in({op: route}) == [op]
        native.switch(True)

    yield put
    for native in put_in:
        native.take_out()


@pytest.fixture
def installed(native: NativeOps) -> Iterator[NativeOps]:
    """The kernel set and its native kernels at the CUDA key, on a torch without CUDA."""
    reset_dispatch_counts()
    handle = install(CudaKernels(), native=native)
    yield native
    handle.remove()
    uninstall("cuda")
    reset_dispatch_counts()


def cuda_kernel(op: str, *arguments: Any, **keywords: Any) -> Any:
    """Call what stands at the CUDA key with CPU tensors."""
    keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    kernel = torch.library.get_kernel(f"aten::{op}", "CUDA")
    return kernel.call_boxed(keyset, *arguments, **keywords)


def flash_results(query: Tensor) -> tuple[Any, ...]:
    lse, state = query.new_zeros(query.shape[:3]).float(), torch.zeros(2, dtype=torch.uint64)
    return query + 1, lse, None, None, 7, 9, state, state[0], query.new_empty(0)


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_schemas_of_every_supported_torch_are_known(schema: str) -> None:
    assert f'"{signature_of(torch._C.parse_schema(schema))}"' in OPS_H.read_text(encoding="utf-8")


@pytest.mark.parametrize("op", [FLASH, CUDNN, GENERAL, INPLACE, *BACKWARDS])
def test_ops_of_this_torch_are_known(op: str) -> None:
    packet = getattr(torch.ops.aten, op, None)
    if packet is None:
        assert op == INPLACE, f"torch {torch.__version__} has no aten::{op}"
        return
    row = f'{{"{op}", "{signature_of(packet.default._schema)}"'
    assert row in OPS_H.read_text(encoding="utf-8").replace(",\n     ", ", ")


def test_an_op_with_another_schema_gets_no_native_kernel(on_cpu: ctypes.CDLL) -> None:
    native = NativeOps("CPU", lambda: on_cpu)
    try:
        assert native.put_in({"_scaled_dot_product_efficient_attention": lambda *_: None}) == []
    finally:
        native.take_out()


def test_results_of_a_call_that_goes_on_are_those_of_the_route(put_in: Any) -> None:
    seen = []

    def route(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return flash_results(args[0])

    put_in(FLASH, route)
    q = query()
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.0, True, scale=0.25)
    assert torch.equal(found[0], q + 1)
    assert found[2] is found[3] is None
    assert found[4:6] == (7, 9)
    assert [type(result) for result in found[6:]] == [Tensor] * 3
    ((args, kwargs),) = seen
    assert args[4] is True
    assert kwargs["scale"] == 0.25


def test_optional_arguments_arrive(put_in: Any) -> None:
    seen = []

    def route(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return (*flash_results(args[0])[:2], *flash_results(args[0])[6:])

    put_in(GENERAL, route)
    rows, offsets = torch.ones(5, 2, 16).bfloat16(), torch.tensor([0, 5], dtype=torch.int32)
    torch.ops.aten._flash_attention_forward(
        *(rows,) * 3, offsets, offsets, 5, 5, 0.0, False, False, window_size_left=3, scale=-0.5
    )
    ((args, kwargs),) = seen
    assert torch.equal(args[3], offsets)
    assert args[5:7] == (5, 5)
    assert kwargs["window_size_left"] == 3
    assert kwargs["scale"] == -0.5
    assert kwargs.get("alibi_slopes") is None


@pytest.mark.skipif(not hasattr(torch.ops.aten, INPLACE), reason="this torch has no such op")
def test_the_op_that_writes_its_argument_writes_it(put_in: Any) -> None:
    def route(keyset: Any, out: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out.fill_(3)
        return torch.ones(1, 2, 8)

    put_in(INPLACE, route)
    out = torch.zeros(1, 8, 2, 16).bfloat16()
    call = torch.ops.aten._flash_attention_forward_no_dropout_inplace
    lse = call(out, *(out.clone(),) * 3, None, None, 8, 8, 0.0, False, False)
    assert (out == 3).all()
    assert (lse == 1).all()


class Peculiar(Exception):
    """Cannot be made of a text."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)


ERRORS = {
    "out of memory": (torch.OutOfMemoryError("CUDA out of memory. Tried"), torch.OutOfMemoryError),
    "not implemented": (NotImplementedError("not for these"), NotImplementedError),
    "value": (ValueError("wrong ünits"), ValueError),
    "interrupt": (KeyboardInterrupt("now"), KeyboardInterrupt),
    "peculiar": (Peculiar(1, "text"), RuntimeError),
}
WAYS: dict[str, Callable[..., Any]] = {
    "torch.ops": torch.ops.aten._scaled_dot_product_flash_attention,
    # As every function of torch's that is bound in C++, F.scaled_dot_product_attention among them.
    "binding": torch._scaled_dot_product_flash_attention,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ERRORS)
def test_an_error_keeps_its_type_and_text(put_in: Any, case: str, way: str) -> None:
    error, kind = ERRORS[case]

    def route(*_: Any, **__: Any) -> Any:
        raise error

    put_in(FLASH, route)
    q = query()
    with pytest.raises(BaseException, match=re.escape(str(error))) as caught:
        WAYS[way](q, q, q)
    assert caught.type is kind


def test_after_an_error_the_next_call_is_none(put_in: Any) -> None:
    outcomes = iter([ValueError("once"), None])

    def route(keyset: Any, query: Tensor, *_: Any, **__: Any) -> Any:
        error = next(outcomes)
        if error is not None:
            raise error
        return flash_results(query)

    put_in(FLASH, route)
    q = query()
    with pytest.raises(ValueError, match="once"):
        torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)
    assert torch.equal(torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)[0], q + 1)


@pytest.mark.parametrize("fails", [False, True])
def test_no_tensor_is_kept_alive(put_in: Any, fails: bool) -> None:
    made = []

    def route(keyset: Any, query: Tensor, *_: Any, **__: Any) -> Any:
        if fails:
            raise ValueError("no")
        made.append(torch.zeros(3))
        return (made[-1], *flash_results(query)[1:])

    put_in(FLASH, route)
    q = query()
    before = q._use_count()
    for _ in range(3):
        try:
            torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, scale=0.5)
        except ValueError:
            assert fails
    assert q._use_count() == before
    assert [tensor._use_count() for tensor in made] == [1] * len(made)


def test_on_a_torch_without_cuda_they_are_put_in_and_taken_out(native: NativeOps) -> None:
    ops = (FLASH, CUDNN, GENERAL, INPLACE, *BACKWARDS)
    ops = tuple(op for op in ops if hasattr(torch.ops.aten, op))

    def stands() -> list[bool]:
        return [torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", "CUDA") for op in ops]

    before = stands()
    handle = install(CudaKernels(), native=native)
    for op in ops:
        assert "fa4_cuda" in repr(torch.library.get_kernel(f"aten::{op}", "CUDA"))
    handle.remove()
    uninstall("cuda")
    assert stands() == before
    assert not hasattr(torch.ops.fa4_cuda_declined, FLASH)


def test_a_call_with_tensors_of_no_gpu_lands_where_the_router_sends_it(
    installed: NativeOps,
) -> None:
    q = query()
    with pytest.raises(RuntimeError, match=f"aten::{FLASH} was called for CUDA and no kernel set"):
        cuda_kernel(FLASH, q, q, q, 0.0, False, False, scale=None)
    counts = dispatch_counts()[FLASH]
    assert counts.served == 0
    assert counts.declined == {"device type cpu is not supported": 1}


def test_tensors_that_are_not_there_arrive_as_none(put_in: Any) -> None:
    seen = []

    def route(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return args[1] + 1, args[2] + 2, args[3] + 3

    op = f"{FLASH}_backward"
    put_in(op, route)
    q, lse, seed = query(), torch.ones(1, 2, 8), torch.zeros(2)
    grads = getattr(torch.ops.aten, op)(
        *(q,) * 5, lse, None, None, 8, 8, 0.25, True, seed, seed, scale=0.5
    )
    for number, grad in enumerate(grads, 1):
        assert torch.equal(grad, q + number)
    ((args, kwargs),) = seen
    assert args[6:12] == (None, None, 8, 8, 0.25, True)
    assert torch.equal(args[5], lse)
    assert kwargs["scale"] == 0.5


def test_installing_says_nothing_on_the_terminal(kernels: Path) -> None:
    program = """
        import torch
        from fa4_cuda.kernel_set import CudaKernels
        from fa4_cuda.native import NATIVE
        from flash_attention_registry.sdpa import install, uninstall
        for _ in range(2):
            install(CudaKernels(), native=NATIVE).remove()
            uninstall("cuda")
    """
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""
