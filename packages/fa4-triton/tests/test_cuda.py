"""What only a CUDA device can show: repetition at size, large tensors, streams and graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from fa4_triton import flash_attn_func, flash_attn_varlen_func, warmup
from fa4_triton.kernel_set import TritonKernels
from flash_attention_registry.sdpa import (
    AttentionCall,
    dispatch_counts,
    reset_dispatch_counts,
)
from flash_attention_testkit import SdpaResult, assert_sdpa_parity

pytestmark = pytest.mark.gpu

FIELDS = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture
def device() -> str:
    return "cuda"


def attend(inputs: Any) -> list[Tensor]:
    """Out and gradients of a causal call, by the functional API."""
    leaves = inputs.requiring_grad()
    if inputs.lengths is None:
        out = flash_attn_func(*leaves, causal=True)
    else:
        longest = (max(one) for one in inputs.lengths)
        out = flash_attn_varlen_func(*leaves, *inputs.offsets(), *longest, causal=True)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad_out)]


@pytest.mark.parametrize(
    "shape",
    [
        {"lengths": (1000, 1023), "heads": (8, 2), "head_dim": 128},
        {"lengths": (1023, 1000), "heads": (3, 3), "head_dim": 64, "dtype": "fp16"},
        {"lengths": ([17, 1000, 0], [1023, 113, 5]), "heads": (8, 1), "head_dim": 256},
    ],
    ids=["gqa", "mha", "packed"],
)
def test_a_thousand_deterministic_repeats_give_the_same_bits(
    inputs: Callable[..., Any], run: Callable[..., SdpaResult], shape: dict[str, Any]
) -> None:
    assert_repeats(run, inputs(**shape), causal=True)


def assert_repeats(run: Callable[..., SdpaResult], given: Any, **mask: Any) -> None:
    first = run(given, deterministic=True, **mask)
    for _ in range(1000):
        again = run(given, deterministic=True, **mask)
        for name in FIELDS:
            assert torch.equal(getattr(first, name), getattr(again, name)), name


MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (200, 30)},
}
# More tiles than programs; rows from which on a causal tile of head dim 64 is another one.
DENSE = {"lengths": (1000, 1023), "heads": (8, 2), "batch": 3}
PACKED = {"lengths": ([17, 1000, 0, 1300], [1023, 113, 5, 1100]), "heads": (16, 4)}
LONG = {"lengths": (4200, 4223), "heads": (8, 2)}
HOPPER = [
    pytest.param(head_dim, mask, shape, id=f"{head_dim}-{mask}-{name}")
    for name, shape in (("dense", DENSE), ("packed", PACKED))
    for head_dim in (64, 128, 256)
    for mask in MASKS
] + [pytest.param(64, "causal", LONG, id="64-causal-long")]


@pytest.mark.parametrize(("head_dim", "mask", "shape"), HOPPER)
def test_a_thousand_repeats_by_the_hopper_kernels_give_the_same_bits(
    inputs: Callable[..., Any],
    run: Callable[..., SdpaResult],
    asking_for: Callable[[str], AbstractContextManager[None]],
    head_dim: int,
    mask: str,
    shape: dict[str, Any],
) -> None:
    """Every forward; of the backwards the one that repeats, the others being the portable ones."""
    with asking_for("hopper"):
        reset_dispatch_counts()
        assert_repeats(run, inputs(**shape, head_dim=head_dim), **MASKS[mask])
        ran = dispatch_counts().kernels
    assert ran["fa4-triton's Hopper forward"] == 1001
    own_backward = head_dim == 256 and shape is DENSE and mask != "window"
    assert ran.get("fa4-triton's Hopper backward", 0) == (1001 if own_backward else 0)


def assert_same(one: Tensor, two: Tensor) -> None:
    """But for the order of sums, which Hopper's backward leaves open."""
    assert (one - two).float().norm() < 0.01 * two.float().norm()


@pytest.fixture
def free_memory() -> Callable[[int], None]:
    """Skips the test where the GPU has less free memory than it needs, in GiB."""

    def check(gibibytes: int) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] >> 30
        if free < gibibytes:
            pytest.skip(f"needs {gibibytes} GiB of GPU memory, {free} are free")

    return check


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_tensors_may_have_more_than_2_31_elements(
    free_memory: Callable[[int], None], packed: bool
) -> None:
    """The first and the last sequences are right, each of which stands for itself."""
    free_memory(48)
    rows, head_dim, sequences = 128, 128, (1 << 17) + 8
    shape = (sequences, rows, 1, head_dim)
    assert math.prod(shape) > 1 << 31
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value, grad_out = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(4)
    )
    call = AttentionCall(query, key, value, head_dim**-0.5, True)
    if packed:
        offsets = torch.arange(sequences + 1, dtype=torch.int32, device="cuda") * rows
        query, key, value, grad_out = (x.flatten(0, 1) for x in (query, key, value, grad_out))
        call = AttentionCall(query, key, value, call.scale, True, None, None, offsets, offsets)
        call = call._replace(max_seqlen_query=rows, max_seqlen_key=rows)
    kernels = TritonKernels()
    out, lse = kernels.forward(call)
    grads = kernels.backward(call, grad_out, out, lse)
    if packed:
        lse = lse.unflatten(1, (sequences, rows)).transpose(0, 1)
    tensors = [x.view(shape) for x in (query, key, value, grad_out, out, *grads)]
    for part in (slice(None, 4), slice(-4, None)):
        query, key, value, grad_out, out, *grads = (x[part] for x in tensors)
        result = SdpaResult(out, lse[part], *grads)
        assert_sdpa_parity(part, result, query, key, value, grad_out=grad_out, causal=True)


def test_rows_may_be_so_far_apart_that_a_tile_spans_2_31_elements(
    free_memory: Callable[[int], None],
) -> None:
    free_memory(16)
    rows, head_dim, apart = 100, 64, (1 << 25) + 8
    buffer = torch.zeros(rows * apart, dtype=torch.float16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    views = []
    for number in range(5):
        view = buffer.as_strided((1, rows, 1, head_dim), (0, apart, 0, 1), number * head_dim)
        view.copy_(torch.randn(view.shape, device="cuda", generator=generator))
        views.append(view)
    query, key, value, grad_out, out = views
    out.fill_(math.nan)
    call = AttentionCall(query, key, value, head_dim**-0.5, True, out=out)
    kernels = TritonKernels()
    out, lse = kernels.forward(call)
    grads = kernels.backward(call._replace(out=None), grad_out, out, lse)
    dense = [x.contiguous() for x in (out, query, key, value, grad_out)]
    result = SdpaResult(dense[0], lse, *grads)
    assert_sdpa_parity("wide", result, *dense[1:4], grad_out=dense[4], causal=True)


@pytest.mark.parametrize(
    "lengths", [(1000, 1000), ([17, 983], [500, 500])], ids=["dense", "packed"]
)
def test_a_captured_graph_replays_with_changed_inputs(
    inputs: Callable[..., Any], lengths: Any
) -> None:
    shape = {"lengths": lengths, "heads": (8, 2), "head_dim": 128}
    static, other = inputs(**shape), inputs(**shape, seed=1)
    expected = attend(other)
    leaves = static.requiring_grad()
    # Offsets are made outside of the capture: it forbids copies from the host.
    rest = () if static.lengths is None else (*static.offsets(), *map(max, static.lengths))
    function = flash_attn_func if static.lengths is None else flash_attn_varlen_func

    def step() -> list[Tensor]:
        out = function(*leaves, *rest, causal=True)
        return [out, *torch.autograd.grad(out, leaves, static.grad_out)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf, new in zip(leaves, (other.query, other.key, other.value), strict=True):
            leaf.copy_(new)
        static.grad_out.copy_(other.grad_out)
    for _ in range(2):
        graph.replay()
        for one, two in zip(captured, expected, strict=True):
            assert_same(one, two)


def test_graphs_of_torch_compile_keep_nothing_of_a_warm_up(
    inputs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They warm up in the graph's memory, on a stream that Hopper's forward has not seen yet."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("other GPUs' kernels draw no tiles")
    from fa4_triton import hopper_launch

    standing: dict[tuple[int, int], Tensor] = {}
    monkeypatch.setattr(hopper_launch, "_standing_counters", standing)
    given = inputs(lengths=(2048, 2048), heads=(16, 4), head_dim=128)
    expected = attend(given)
    standing.clear()

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flash_attn_func(query, key, value, causal=True)

    leaves = given.requiring_grad()
    for _ in range(4):  # warmed up, captured, replayed
        torch.compiler.cudagraph_mark_step_begin()
        out = attention(*leaves)
        grads = torch.autograd.grad(out, leaves, given.grad_out)
        for one, two in zip((out.detach(), *grads), expected, strict=True):
            assert_same(one, two)
    assert standing, "no tiles were drawn outside of a capture"


def test_a_stream_tells_whether_torch_made_it() -> None:
    """By their ids, on which the Hopper kernels' counters rely."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("other GPUs' kernels draw no tiles")
    from fa4_triton.hopper_launch import _is_of_torch

    assert _is_of_torch(torch.cuda.default_stream())
    assert _is_of_torch(torch.cuda.Stream())
    assert _is_of_torch(torch.cuda.Stream(priority=-1))
    for handle in (2, 1 << 20):  # cudaStreamPerThread, and like an address
        assert not _is_of_torch(torch.cuda.ExternalStream(handle))


def test_two_streams_at_once_do_not_disturb_each_other(inputs: Callable[..., Any]) -> None:
    """Kernels run on the stream that is current, and share nothing."""
    shape = {"lengths": (1000, 1000), "heads": (8, 2), "head_dim": 64}
    problems = [inputs(**shape, seed=seed) for seed in range(2)]
    expected = [attend(problem) for problem in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(20):
        for stream, problem, results in zip(streams, problems, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(attend(problem))
    torch.cuda.synchronize()
    for results, right in zip(found, expected, strict=True):
        for result in results:
            for one, two in zip(result, right, strict=True):
                assert_same(one, two)


def test_kernels_wait_for_what_their_stream_waits_for(inputs: Callable[..., Any]) -> None:
    """On a stream that is busy with making the inputs; a launch elsewhere would overtake it."""
    given, other = (inputs(lengths=(128, 128), seed=seed) for seed in range(2))
    expected = flash_attn_func(other.query, other.key, other.value)
    flash_attn_func(given.query, given.key, given.value)  # compiled
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for tensor, new in ((given.query, other.query), (given.key, other.key)):
            tensor.copy_(new)
        given.value.copy_(other.value)
        found = flash_attn_func(given.query, given.key, given.value)
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [100, 4096], ids=["small", "large"])
def test_what_was_warmed_up_compiles_nothing(inputs: Callable[..., Any], rows: int) -> None:
    """In its first call, forward and backward."""
    from triton import knobs

    warmup(head_dims=(48,), dtypes=(torch.bfloat16,), masks=("causal",))
    given = inputs(lengths=(rows, rows), heads=(16, 16), head_dim=48)
    compiled: list[Any] = []
    before = knobs.compilation.listener
    knobs.compilation.listener = lambda *, src, **_: compiled.append(src)
    try:
        attend(given)
    finally:
        knobs.compilation.listener = before
    assert compiled == []
