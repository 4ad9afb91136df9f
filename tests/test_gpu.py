"""From F.scaled_dot_product_attention to the Triton kernels and back, on a CUDA device."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attention_registry as registry
from flash_attention_registry.sdpa import dispatch_counts, reset_dispatch_counts
from flash_attention_testkit import SdpaResult, assert_sdpa_parity

IMPL = "fa4-triton"
FLASH = "_scaled_dot_product_flash_attention"
CUDNN = "_scaled_dot_product_cudnn_attention"
GENERAL = "_flash_attention_forward"

pytestmark = pytest.mark.gpu
aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _clean(flash_attention_registry_reset: Any) -> None:
    torch.manual_seed(0)
    reset_dispatch_counts()


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=grad)


def qkv(*shape: int, grad: bool = False) -> list[Tensor]:
    return [randn(*shape, grad=grad) for _ in range(3)]


def _grad_of(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)


def step(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """Out and gradients of plain SDPA."""
    out = F.scaled_dot_product_attention(*tensors, **options)
    grads = torch.autograd.grad(out, tensors, _grad_of(out))
    return [out.detach(), *grads]


def test_plain_sdpa_is_served_forward_and_backward_and_restored_bitwise() -> None:
    tensors = qkv(2, 8, 300, 64, grad=True)
    stock = step(tensors, is_causal=True)
    registry.activate_flash_attention_impl(IMPL)
    served = step(tensors, is_causal=True)
    counts = dispatch_counts()
    assert counts.served == 2
    assert counts.declined == 0
    for mine, theirs in zip(served, stock, strict=True):
        assert mine.stride() == theirs.stride()
        torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=2e-2)
    registry.restore_flash_attention_impl()
    for again, theirs in zip(step(tensors, is_causal=True), stock, strict=True):
        assert torch.equal(again, theirs)
    assert dispatch_counts().served == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_fresh_process_is_served_wherever_it_activates(when: str) -> None:
    """torch sets its order of backends at the first CUDA call of SDPA; that must not matter."""
    script = f"""
        import torch, torch.nn.functional as F
        import flash_attention_registry as registry
        x = torch.randn(1, 4, 128, 64, device="cuda", dtype=torch.bfloat16)
        if {when!r} == "after":
            F.scaled_dot_product_attention(x, x, x)
        registry.activate_flash_attention_impl({IMPL!r})
        F.scaled_dot_product_attention(x, x, x)
        from flash_attention_registry.sdpa import dispatch_counts
        counts = dispatch_counts()
        assert counts.served == 1 and counts.declined == 0, str(counts)
        print("served on", torch._fused_sdp_choice(x, x, x))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "served on" in done.stdout


def test_explicit_cudnn_stays_on_cudnn_its_backward_too() -> None:
    tensors = qkv(1, 4, 128, 64, grad=True)

    def explicit() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*tensors, is_causal=True)
        return [out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))]

    stock = explicit()
    registry.activate_flash_attention_impl(IMPL)
    for mine, theirs in zip(explicit(), stock, strict=True):
        assert torch.equal(mine, theirs)
    counts = dispatch_counts()
    assert counts.served == 0
    assert any("cuDNN" in reason for reason in counts[CUDNN].declined)
    assert any("cuDNN" in reason for reason in counts[f"{CUDNN}_backward"].declined)


def flash_dropout(tensors: list[Tensor]) -> Any:
    torch.manual_seed(7)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return step(tensors, dropout_p=0.1)


def cudnn_mask(tensors: list[Tensor]) -> Any:
    mask = torch.ones(256, 256, device="cuda", dtype=torch.bool).tril(3)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        return step(tensors, attn_mask=mask)


def debug_mask(tensors: list[Tensor]) -> Any:
    torch.manual_seed(7)
    return aten._scaled_dot_product_flash_attention(*tensors, 0.1, False, True)


def _rows_first(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().transpose(1, 2) for tensor in tensors]


def alibi(tensors: list[Tensor]) -> Any:
    slopes = torch.linspace(0.1, 0.5, 4, device="cuda")
    bshd = _rows_first(tensors)
    return aten._flash_attention_forward(
        *bshd, None, None, 256, 256, 0.0, True, False, alibi_slopes=slopes
    )


def seqused_k(tensors: list[Tensor]) -> Any:
    packed = [tensor.detach().transpose(1, 2).reshape(-1, 4, 64) for tensor in tensors]
    offsets = torch.tensor([0, 256, 512], device="cuda", dtype=torch.int32)
    used = torch.tensor([100, 200], device="cuda", dtype=torch.int32)
    return aten._flash_attention_forward(
        *packed, offsets, offsets, 256, 256, 0.0, False, False, seqused_k=used
    )


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the type and first line of what it raises."""
    try:
        return call()
    except (RuntimeError, ValueError, TypeError) as error:
        return type(error), str(error).splitlines()[0]


@pytest.mark.parametrize(
    ("call", "op", "reason"),
    [
        (flash_dropout, FLASH, "dropout"),
        (flash_dropout, f"{FLASH}_backward", "dropout"),
        (cudnn_mask, CUDNN, "attn_bias"),
        (cudnn_mask, f"{CUDNN}_backward", "cuDNN"),
        (debug_mask, FLASH, "dropout"),
        (alibi, GENERAL, "alibi_slopes"),
        (seqused_k, GENERAL, "seqused_key"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_declined_call_gives_stocks_bits_and_counts_why(
    call: Callable[[list[Tensor]], Any], op: str, reason: str
) -> None:
    tensors = qkv(2, 4, 256, 64, grad=True)
    stock = outcome(lambda: call(tensors))
    if call is alibi and stock[0] is RuntimeError:  # left out of this build of torch
        assert "does not support alibi" in stock[1]
    else:
        assert isinstance(stock[0], Tensor), stock
    registry.activate_flash_attention_impl(IMPL)
    mine = outcome(lambda: call(tensors))
    assert len(mine) == len(stock)
    for ours, theirs in zip(mine, stock, strict=True):
        if isinstance(theirs, Tensor) and theirs.is_floating_point():
            assert torch.equal(ours, theirs)
        elif isinstance(theirs, Tensor):
            assert ours.shape == theirs.shape
        else:
            assert ours == theirs
    counts = dispatch_counts()
    assert counts.served == 0
    assert any(reason in text for text in counts[op].declined), str(counts)


def test_a_debug_mask_without_dropout_is_declined() -> None:
    tensors = [tensor.detach() for tensor in qkv(1, 2, 128, 64)]
    registry.activate_flash_attention_impl(IMPL)
    with pytest.raises(RuntimeError, match="dropout"):  # stock's own rule
        aten._scaled_dot_product_flash_attention(*tensors, 0.0, False, True)
    assert any("debug" in text for text in dispatch_counts()[FLASH].declined)


def test_a_last_dimension_with_gaps_raises_stocks_error() -> None:
    q, k, v = (randn(1, 2, 128, 128)[..., ::2] for _ in range(3))

    def call() -> str:
        with pytest.raises(RuntimeError) as caught:
            aten._scaled_dot_product_flash_attention(q, k, v)
        return str(caught.value)

    stock = call()
    registry.activate_flash_attention_impl(IMPL)
    assert call() == stock
    assert dispatch_counts()[FLASH].total_declined == 1


def test_misaligned_rows_are_served_right() -> None:
    """Stock's kernels fault on rows that do not start at 16 bytes; ours read them."""
    q, k, v = (randn(1, 100, 2, 65)[..., 1:] for _ in range(3))
    registry.activate_flash_attention_impl(IMPL)
    out, lse, *_ = aten._flash_attention_forward(q, k, v, None, None, 100, 100, 0.0, True, False)
    assert dispatch_counts()[GENERAL].served == 1
    assert_sdpa_parity("misaligned rows", SdpaResult(out, lse), q, k, v, causal=True)


def test_rows_without_keys_read_as_stocks_dense_and_packed() -> None:
    dense = (randn(1, 12, 2, 64), *(randn(1, 8, 2, 64) for _ in "kv"))
    packed = (randn(10, 2, 64), *(randn(7, 2, 64) for _ in "kv"))
    offsets_q = torch.tensor([0, 5, 10], device="cuda", dtype=torch.int32)
    offsets_k = torch.tensor([0, 0, 7], device="cuda", dtype=torch.int32)

    def results() -> list[Tensor]:
        one = aten._flash_attention_forward(*dense, None, None, 12, 8, 0.0, True, False)
        other = aten._flash_attention_forward(
            *packed, offsets_q, offsets_k, 5, 7, 0.0, False, False
        )
        return [*one[:2], *other[:2]]

    stock = results()
    registry.activate_flash_attention_impl(IMPL)
    mine = results()
    assert dispatch_counts()[GENERAL].served == 2
    for ours, theirs in zip(mine, stock, strict=True):
        assert torch.equal(ours.isinf(), theirs.isinf())
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
    assert (mine[0][:, :4] == 0).all()
    assert (mine[1][..., :4] == torch.inf).all()
    assert (mine[3][:, :5] == torch.inf).all()


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, None], ids=["flash", "plain"])
@pytest.mark.parametrize("first", ["ours", "stock"])
def test_a_backward_after_a_switch_is_right(backend: SDPBackend | None, first: str) -> None:
    tensors = qkv(1, 4, 200, 64, grad=True)
    stock = step(tensors, is_causal=True)

    def forward() -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(*tensors, is_causal=True)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*tensors, is_causal=True)

    if first == "ours":
        with registry.use_flash_attention_impl(IMPL):
            out = forward()
        grads = torch.autograd.grad(out, tensors, _grad_of(out))
    else:
        out = forward()
        with registry.use_flash_attention_impl(IMPL):
            grads = torch.autograd.grad(out, tensors, _grad_of(out))
    for mine, theirs in zip(grads, stock[1:], strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=2e-2)


class Attention(torch.nn.Module):
    """A layer that calls SDPA with grouped heads."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(256, 256 + 2 * 128, dtype=torch.bfloat16, device="cuda")

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).split([256, 128, 128], dim=-1)
        q, k, v = (t.unflatten(-1, (-1, 64)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("compiled", ["before activation", "after activation"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_graphs_are_served_without_a_break(compiled: str, mode: str) -> None:
    torch._dynamo.reset()
    layer = Attention()
    x = randn(2, 128, 256)
    graph = torch.compile(layer, fullgraph=True, mode=mode)

    def grads(module: torch.nn.Module) -> tuple[Tensor, Tensor]:
        layer.zero_grad()
        out = module(x)
        out.float().square().mean().backward()
        assert layer.project.weight.grad is not None
        return out.detach().clone(), layer.project.weight.grad.clone()

    stock = grads(layer)
    if compiled == "before activation":
        grads(graph)
        assert dispatch_counts().served == 0
    if compiled == "before activation" and mode == "reduce-overhead":
        pytest.skip("a captured CUDA graph keeps what it captured")
    registry.activate_flash_attention_impl(IMPL)
    for _ in range(3):  # warm-up, capture and replay of CUDA graphs
        mine = grads(graph)
    counts = dispatch_counts()
    assert counts.served >= 2
    assert counts.declined == 0
    for ours, theirs in zip(mine, stock, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=5e-2)


def test_varlen_attn_reaches_the_packed_kernels() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    offsets = torch.tensor([0, 100, 100, 417], device="cuda", dtype=torch.int32)
    q, k, v = (randn(417, 4, 64, grad=True) for _ in range(3))
    registry.activate_flash_attention_impl(IMPL)
    try:
        out = varlen.varlen_attn(q, k, v, offsets, offsets, 317, 317, is_causal=True)
    except TypeError:  # later torch says it as a window
        out = varlen.varlen_attn(q, k, v, offsets, offsets, 317, 317, window_size=(-1, 0))
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    counts = dispatch_counts()
    assert counts[GENERAL].served == 1
    assert counts["_flash_attention_backward"].served == 1
    assert_sdpa_parity(
        "varlen_attn",
        SdpaResult(out.detach(), None, *grads),
        q.detach(),
        k.detach(),
        v.detach(),
        grad_out=grad,
        causal=True,
        cu_seqlens_query=offsets,
        cu_seqlens_key=offsets,
    )


def test_jagged_nested_tensors_reach_the_packed_kernels() -> None:
    lengths = (30, 200, 1)
    q, k, v = (
        torch.nested.nested_tensor(
            [randn(length, 4, 64) for length in lengths], layout=torch.jagged
        ).transpose(1, 2)
        for _ in range(3)
    )
    registry.activate_flash_attention_impl(IMPL)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v)
    assert dispatch_counts()[GENERAL].served == 1
    for index, mine in enumerate(out.unbind()):
        parts = [tensor.unbind()[index].unsqueeze(0) for tensor in (q, k, v)]
        exact = F.scaled_dot_product_attention(*(part.double() for part in parts))
        torch.testing.assert_close(mine.unsqueeze(0).double(), exact, atol=2e-2, rtol=2e-2)


def test_a_captured_graph_replays_with_new_inputs() -> None:
    tensors = qkv(1, 4, 333, 64, grad=True)
    registry.activate_flash_attention_impl(IMPL)
    step(tensors, is_causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors, is_causal=True)
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))
    for result in captured:
        result.fill_(float("nan"))
    graph.replay()
    for replayed, eager in zip(captured, step(tensors, is_causal=True), strict=True):
        assert torch.equal(replayed, eager)


def test_streams_do_not_disturb_each_other() -> None:
    registry.activate_flash_attention_impl(IMPL)
    inputs = [qkv(2, 8, 1000, 128) for _ in range(2)]
    expected = [F.scaled_dot_product_attention(*tensors, is_causal=True) for tensors in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[index].append(
                    F.scaled_dot_product_attention(*inputs[index], is_causal=True)
                )
    torch.cuda.synchronize()
    for index in range(2):
        assert all(torch.equal(result, expected[index]) for result in results[index])


def _same_outcome(call: Callable[[], Any]) -> None:
    """A call ends the same with and without the implementation: same error, or same bits."""
    stock = outcome(call)
    with registry.use_flash_attention_impl(IMPL):
        mine = outcome(call)
    if isinstance(stock, Tensor):
        assert torch.equal(mine, stock)
    else:
        assert mine == stock
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(
            lambda: F.scaled_dot_product_attention(
                *(randn(1, 2, 64, 64, dtype=torch.float32) * 0 + 1 for _ in range(3))
            ),
            id="float32",
        ),
        pytest.param(
            lambda: F.scaled_dot_product_attention(
                randn(1, 2, 64, 64), randn(1, 2, 64, 64).half(), randn(1, 2, 64, 64)
            ),
            id="mixed dtypes",
        ),
        pytest.param(
            lambda: F.scaled_dot_product_attention(
                randn(1, 2, 64, 64), randn(1, 2, 64, 64).cpu(), randn(1, 2, 64, 64)
            ),
            id="mixed devices",
        ),
        pytest.param(
            lambda: aten._scaled_dot_product_flash_attention(
                randn(1, 4, 64, 64), randn(1, 3, 64, 64), randn(1, 3, 64, 64)
            )[0],
            id="mismatched heads",
        ),
        pytest.param(
            lambda: aten._scaled_dot_product_flash_attention(
                randn(1, 4, 64, 64), randn(1, 4, 64, 32), randn(1, 4, 64, 64)
            )[0],
            id="mismatched head dims",
        ),
        pytest.param(
            lambda: F.scaled_dot_product_attention(*(randn(1, 1, 64, 512) * 0 + 1 for _ in "qkv")),
            id="head_dim 512",
        ),
    ],
)
def test_what_is_not_served_ends_as_stock_ends_it(call: Callable[[], Any]) -> None:
    _same_outcome(call)


def test_an_unknown_implementation_changes_nothing() -> None:
    registry.activate_flash_attention_impl(IMPL)
    with pytest.raises(ValueError, match="Unknown flash attention impl 'fa4-tritn'"):
        registry.activate_flash_attention_impl("fa4-tritn")
    F.scaled_dot_product_attention(*qkv(1, 2, 64, 64))
    assert dispatch_counts().served == 1
