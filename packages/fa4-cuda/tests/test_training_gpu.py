"""Training on a Hopper GPU with fa4-cuda: gradients, determinism, memory, switches.

    pytest -m gpu packages/fa4-cuda/tests/test_training_gpu.py

A backward runs on a thread of torch's. That no Python runs in it shows in the counts: the kernel
set fails there, and a call that it fails in is stock's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa4_cuda
import flash_attention_registry as registry
from fa4_cuda import kernel_set
from fa4_cuda.kernel_set import CudaKernels
from flash_attention_registry.sdpa import dispatch_counts, reset_dispatch_counts
from flash_attention_testkit import SdpaResult, assert_sdpa_parity

IMPL = "fa4-cuda"
FLASH = "_scaled_dot_product_flash_attention"
CUDNN = "_scaled_dot_product_cudnn_attention"
GENERAL = "_flash_attention_forward"
GENERAL_BACKWARD = "_flash_attention_backward"

pytestmark = pytest.mark.gpu
aten = torch.ops.aten

Grads = tuple[Tensor, ...]


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


@contextmanager
def asking_for_determinism() -> Iterator[None]:
    """Torch fills memory that it allocates with NaN then."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def leaves(
    batch: int = 2,
    heads: int = 8,
    heads_kv: int = 2,
    rows: int = 300,
    keys: int | None = None,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """Query, key and value `[B, S, H, D]`."""
    keys = rows if keys is None else keys
    shapes = (batch, rows, heads, head_dim), *((batch, keys, heads_kv, head_dim),) * 2
    return [randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def sdpa(tensors: list[Tensor], backend: SDPBackend | None = None, **options: Any) -> Tensor:
    """Torch's attention of `[B, S, H, D]` tensors."""
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)


def general(tensors: list[Tensor], causal: bool, window: tuple[int, int] = (-1, -1)) -> Tensor:
    """Torch's general op, dense, which alone has causal masks of unequal lengths."""
    rows, keys = tensors[0].shape[1], tensors[1].shape[1]
    left, right = window
    out: Tensor = aten._flash_attention_forward(
        *(*tensors, None, None, rows, keys, 0.0, causal, False),
        window_size_left=left,
        window_size_right=right,
    )[0]
    return out


def assert_right(
    label: object,
    out: Tensor,
    grads: Grads,
    tensors: list[Tensor],
    grad_out: Tensor,
    **options: Any,
) -> None:
    __tracebackhide__ = True
    plain = [tensor.detach() for tensor in tensors]
    result = SdpaResult(out.detach(), None, *grads)
    assert_sdpa_parity(label, result, *plain, grad_out=grad_out, **options)


def assert_both_served(op: str, backward: str | None = None) -> None:
    __tracebackhide__ = True
    names = op, backward or f"{op}_backward"
    served = "\n".join(f"{name}: 1 served, 0 on stock" for name in names)
    assert str(dispatch_counts()) == served


BACKENDS = pytest.mark.parametrize(
    ("backend", "op"),
    [(None, CUDNN), (SDPBackend.FLASH_ATTENTION, FLASH)],
    ids=["as torch chooses", "flash"],
)


@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_kv", [8, 2])
def test_sdpa_trains_without_python_and_right(
    native: None, backend: SDPBackend | None, op: str, causal: bool, heads_kv: int
) -> None:
    if backend is None and heads_kv != 8:
        pytest.skip("which backend torch chooses for grouped heads differs between versions")
    tensors = leaves(heads_kv=heads_kv)
    out = sdpa(tensors, backend, is_causal=causal)
    grad_out = randn(*out.shape)
    grads = torch.autograd.grad(out, tensors, grad_out)
    assert_both_served(op)
    assert_right(op, out, grads, tensors, grad_out, causal=causal)


@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128, 136, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_every_head_dim_has_gradients_in_the_layout_of_its_projection(
    native: None, head_dim: int, dtype: torch.dtype
) -> None:
    rows = randn(2, 200, (8 + 2 + 2) * head_dim, dtype=dtype)
    parts = rows.split([8 * head_dim, 2 * head_dim, 2 * head_dim], dim=-1)
    tensors = [part.unflatten(-1, (-1, head_dim)).detach().requires_grad_() for part in parts]
    out = sdpa(tensors, SDPBackend.FLASH_ATTENTION, is_causal=True)
    grad_out = randn(*out.shape, dtype=dtype)
    grads = torch.autograd.grad(out, tensors, grad_out)
    assert_both_served(FLASH)
    for grad, tensor in zip(grads, tensors, strict=True):
        assert grad.stride() == torch.empty_like(tensor).stride()
    assert_right(head_dim, out, grads, tensors, grad_out, causal=True)


@pytest.mark.parametrize("window", [(-1, -1), (64, 0), (20, 30)])
@pytest.mark.parametrize("lengths", [(150, 150), (100, 333), (333, 100)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_windows_and_unequal_lengths(
    native: None, window: tuple[int, int], lengths: tuple[int, int], causal: bool
) -> None:
    tensors = leaves(rows=lengths[0], keys=lengths[1], head_dim=64)
    out = general(tensors, causal, window)
    grad_out = randn(*out.shape)
    grads = torch.autograd.grad(out, tensors, grad_out)
    assert_both_served(GENERAL, GENERAL_BACKWARD)
    left, right = (None if bound < 0 else bound for bound in window)
    options = {"causal": causal, "window_left": left, "window_right": right}
    assert_right(window, out, grads, tensors, grad_out, **options)
    empty = max(lengths[0] - lengths[1], 0) if causal or window == (64, 0) else 0
    assert (grads[0][:, :empty] == 0).all()


@pytest.mark.parametrize("window", [(-1, -1), (64, 0)])
def test_packed_sequences_train(native: None, window: tuple[int, int]) -> None:
    queries, keys = (
        torch.tensor(offsets, device="cuda", dtype=torch.int32)
        for offsets in ([0, 100, 100, 417, 430], [0, 200, 230, 500, 500])
    )
    tensors = [randn(rows, 4, 64).requires_grad_() for rows in (430, 500, 500)]
    out = aten._flash_attention_forward(
        *(*tensors, queries, keys, 317, 270, 0.0, False, False),
        window_size_left=window[0],
        window_size_right=window[1],
    )[0]
    grad_out = randn(*out.shape)
    grads = torch.autograd.grad(out, tensors, grad_out)
    assert_both_served(GENERAL, GENERAL_BACKWARD)
    left, right = (None if bound < 0 else bound for bound in window)
    options = {"window_left": left, "window_right": right}
    offsets = {"cu_seqlens_query": queries, "cu_seqlens_key": keys}
    assert_right("packed", out, grads, tensors, grad_out, **options, **offsets)
    assert (grads[0][417:] == 0).all()
    for grad in grads[1:]:
        assert (grad[200:230] == 0).all()


MANY: dict[str, int] = {"batch": 40, "heads_kv": 4, "rows": 513}
"""More tiles than thread blocks, by far: 800 of 128 keys. Sums of the last heads are zeroed by the
main kernel up to head dim 128, from about 200 tiles on."""


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are NaN before they are written, and all bits of the workspace are set."""
    new_empty = Tensor.new_empty

    def poisoned(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        made = new_empty(tensor, *args, **options)
        return made.fill_(255 if made.dtype == torch.uint8 else float("nan"))

    def poisoned_like(tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, float("nan"))

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    monkeypatch.setattr(kernel_set, "empty_like", poisoned_like)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("lengths", [(513, 513), (130, 700), (700, 130)], ids=str)
@pytest.mark.parametrize("window", [(-1, -1), (100, 7)])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_more_tiles_than_there_is_room_for(
    native: None,
    head_dim: int,
    lengths: tuple[int, int],
    window: tuple[int, int],
    causal: bool,
) -> None:
    """Thread blocks go from one to the next, each with sums of its own."""
    rows, keys = lengths
    tensors = leaves(**{**MANY, "rows": rows}, keys=keys, head_dim=head_dim)
    out = general(tensors, causal, window)
    grad_out = randn(*out.shape)
    grads = torch.autograd.grad(out, tensors, grad_out)
    assert_both_served(GENERAL, GENERAL_BACKWARD)
    left, right = (None if bound < 0 else bound for bound in window)
    assert_right(
        lengths,
        out,
        grads,
        tensors,
        grad_out,
        causal=causal,
        window_left=left,
        window_right=None if causal else right,
    )


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_packed_sequences_of_more_tiles_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, head_dim: int
) -> None:
    """Most are far shorter than the longest, and some have no rows or no keys."""
    lengths = [(0, 0), *((37 * i % 300, 53 * i % 500) for i in range(60))]
    edges = torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    rows, keys = edges[-1].tolist()
    queries_at, keys_at = edges.T.contiguous().cuda()
    shapes = (rows, 8, head_dim), *((keys, 4, head_dim),) * 2
    tensors = [randn(*shape).requires_grad_() for shape in shapes]
    out = fa4_cuda.flash_attn_varlen_func(*tensors, queries_at, keys_at, 300, 500, causal=True)
    assert isinstance(out, Tensor)
    grad_out = randn(*out.shape)
    with monkeypatch.context() as patch:
        poison_new_memory(patch)
        grads = torch.autograd.grad(out, tensors, grad_out)
    offsets = {"cu_seqlens_query": queries_at, "cu_seqlens_key": keys_at}
    assert_right("packed", out, grads, tensors, grad_out, causal=True, **offsets)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_keys_that_no_query_sees_have_gradients_of_zero(head_dim: int, deterministic: bool) -> None:
    none = torch.zeros(3, device="cuda", dtype=torch.int32)
    keys = torch.tensor([0, 200, 500], device="cuda", dtype=torch.int32)
    tensors = [randn(rows, 4, head_dim).requires_grad_() for rows in (0, 500, 500)]
    out = fa4_cuda.flash_attn_varlen_func(*tensors, none, keys, 0, 300)
    assert isinstance(out, Tensor)
    with asking_for_determinism() if deterministic else nullcontext():
        grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
    torch.cuda.synchronize()
    assert all((grad == 0).all() for grad in grads)


GRADIENTS_OF_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "one number": lambda grad: grad[:1, :1, :1, :1].expand(grad.shape),
    "one head": lambda grad: grad[:, :, :1].expand(grad.shape),
    "columns outside": lambda grad: grad.mT.contiguous().mT,
    "odd rows": lambda grad: torch.cat([grad, grad[..., :4]], -1)[..., :128],
    "misaligned": lambda grad: torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view(grad.shape),
}


@BACKENDS
@pytest.mark.parametrize("name", GRADIENTS_OF_OUT)
def test_the_gradient_of_out_may_lie_anyhow(
    native: None, backend: SDPBackend | None, op: str, name: str
) -> None:
    tensors = leaves(heads_kv=8)
    out = sdpa(tensors, backend)
    grad_out = GRADIENTS_OF_OUT[name](randn(*out.shape))
    with asking_for_determinism():
        found = torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
        expected = torch.autograd.grad(out, tensors, grad_out.contiguous())
    assert dispatch_counts()[f"{op}_backward"].served == 2
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads_kv", "head_dim"), [(8, 128), (1, 128), (2, 64), (2, 256)])
def test_deterministic_gradients_repeat_bit_for_bit(
    native: None, causal: bool, heads_kv: int, head_dim: int
) -> None:
    tensors = leaves(batch=4, rows=1111, heads_kv=heads_kv, head_dim=head_dim)
    out = sdpa(tensors, SDPBackend.FLASH_ATTENTION, is_causal=causal)
    grad_out = randn(*out.shape)
    with asking_for_determinism():
        first = torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
        for _ in range(1000):
            again = torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
            for one, other in zip(again, first, strict=True):
                assert torch.equal(one, other)
    assert dispatch_counts()[f"{FLASH}_backward"].served == 1001
    assert_right("deterministic", out, first, tensors, grad_out, causal=causal)


def test_direct_calls_are_deterministic_if_they_are_to_be() -> None:
    tensors = leaves(batch=4, rows=1111)
    out = fa4_cuda.flash_attn_func(*tensors, causal=True, deterministic=True)
    grad_out = randn(*out.shape)
    first = torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
    for _ in range(100):
        again = torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
        for one, other in zip(again, first, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_other_gradients_are_whole_and_differ_by_less_than_they_may_be_off(
    monkeypatch: pytest.MonkeyPatch, head_dim: int, causal: bool
) -> None:
    """The order of sums differs from run to run; a race would show as more, or as a NaN."""
    tensors = leaves(**MANY, head_dim=head_dim)
    out = fa4_cuda.flash_attn_func(*tensors, causal=causal)
    assert isinstance(out, Tensor)
    grad_out = randn(*out.shape)
    poison_new_memory(monkeypatch)
    again = torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
    least, most = ([grad.clone() for grad in again] for _ in range(2))
    for _ in range(1000):
        again = torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
        for low, high, grad in zip(least, most, again, strict=True):  # NaN stays in both
            torch.minimum(low, grad, out=low)
            torch.maximum(high, grad, out=high)
    plain = [tensor.detach() for tensor in tensors]
    result = SdpaResult(out.detach(), None, *again)
    report = assert_sdpa_parity("default", result, *plain, grad_out=grad_out, causal=causal)
    limits = {found.name: found.max_limit for found in report.tensors}
    for name, low, high in zip(("dq", "dk", "dv"), least, most, strict=True):
        distance = float((high.float() - low.float()).max())
        assert distance <= limits[name], (
            f"{name} differs by {distance:.2e} (limit {limits[name]:.2e})"
        )


@pytest.mark.parametrize("lengths", [(300, 77), (77, 300), (1, 1000)], ids=str)
def test_gradients_are_written_whole(native: None, lengths: tuple[int, int]) -> None:
    """In memory that is NaN before, the workspace too."""
    tensors = leaves(rows=lengths[0], keys=lengths[1])
    with asking_for_determinism():
        out = general(tensors, causal=True, window=(20, 0))
        grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert_both_served(GENERAL, GENERAL_BACKWARD)
    assert all(grad.isfinite().all() for grad in grads)


PLACES = (5, 70, 127, 128, 199)
"""Rows and keys that are not finite: in first, middle and last tiles, and at their edges."""

SPOILT = pytest.mark.parametrize("name", ["query", "key", "value", "grad_out"])


def visible(rows: int, keys: int, causal: bool, window: tuple[int, int]) -> Tensor:
    distance = torch.arange(keys).sub(keys - rows) - torch.arange(rows)[:, None]
    left, right = window[0], 0 if causal else window[1]
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return seen.cuda()


@SPOILT
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("causal", "window"), [(True, (-1, -1)), (False, (10, 4)), (True, (90, -1))]
)
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_what_is_not_finite_reaches_who_sees_it_and_nobody_else(
    native: None,
    name: str,
    poison: float,
    causal: bool,
    window: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    rows, keys = 200, 300
    tensors = leaves(1, 4, 2, rows, keys, head_dim, dtype)
    names = ("query", "key", "value")
    grad_out = randn(1, rows, 4, head_dim, dtype=dtype)

    def gradients() -> Grads:
        out = general(tensors, causal, window)
        return torch.autograd.grad(out, tensors, grad_out)

    expected = gradients()
    spoilt = {**dict(zip(names, tensors, strict=True)), "grad_out": grad_out}[name]
    with torch.no_grad():
        spoilt[0, list(PLACES), 1] = poison  # of head 1
    found = gradients()

    # By head of the group: which rows have scores, an output, a gradient that is not finite.
    seen = visible(rows, keys, causal, window)
    scores, out, grad = torch.zeros(3, 4, rows, dtype=torch.bool, device="cuda")
    reached = seen[:, list(PLACES)].any(1)
    if name == "query":
        scores[1, list(PLACES)] = True
    elif name == "key":
        scores[2:] = reached
    elif name == "value":
        out[2:] = reached
    else:
        grad[1, list(PLACES)] = True
    has_keys = seen.any(1)
    spoilt_dq = (scores | out | grad) & has_keys

    def of_keys(spoilt_rows: Tensor) -> Tensor:
        by_head = (spoilt_rows[:, :, None] & seen).any(1)
        return by_head.unflatten(0, (2, 2)).any(1)

    spoilt_dk, spoilt_dv = of_keys(scores | out | grad), of_keys(scores | grad)
    assert dispatch_counts()[GENERAL_BACKWARD].served == 2
    for label, one, other, lost in zip(
        ("dq", "dk", "dv"), found, expected, (spoilt_dq, spoilt_dk, spoilt_dv), strict=True
    ):
        lost = lost.T[None]
        assert not lost.all(), "nothing is left to look at"
        size = float(other.float().square().mean().sqrt())
        torch.testing.assert_close(one[~lost], other[~lost], rtol=0.03, atol=0.1 * size, msg=label)
        if poison != poison:
            assert one[lost].isnan().any(-1).all(), f"{label} hides a NaN"


@SPOILT
@pytest.mark.parametrize("head_dim", [128, 256])
def test_a_packed_sequence_that_is_not_finite_spoils_no_other(
    native: None, name: str, head_dim: int
) -> None:
    lengths = [(100, 37), (130, 200), (0, 5), (3, 0), (60, 70)]
    edges = torch.tensor(lengths).cumsum(0, dtype=torch.int32)
    offsets = F.pad(edges.T, (1, 0)).contiguous().cuda()
    rows, keys = edges[-1].tolist()
    tensors = [randn(n, 4, head_dim).requires_grad_() for n in (rows, keys, keys)]
    grad_out = randn(rows, 4, head_dim)

    def gradients() -> Grads:
        out = aten._flash_attention_forward(
            *(*tensors, *offsets, 130, 200, 0.0, True, False), window_size_left=-1
        )[0]
        return torch.autograd.grad(out, tensors, grad_out)

    expected = gradients()
    with torch.no_grad():
        spoilt = {"query": tensors[0], "key": tensors[1], "value": tensors[2]}.get(name, grad_out)
        start, end = edges[:2, 0 if name in ("query", "grad_out") else 1].tolist()
        spoilt[start:end] = float("nan")
    found = gradients()
    assert dispatch_counts()[GENERAL_BACKWARD].served == 2
    for side, one, other in zip((0, 1, 1), found, expected, strict=True):
        start, end = edges[:2, side].tolist()
        for part in (slice(start), slice(end, None)):
            size = float(other.float().square().mean().sqrt())
            torch.testing.assert_close(one[part], other[part], rtol=0.03, atol=0.1 * size)
    assert found[0][edges[0, 0] : edges[1, 0]].isnan().any()


def test_a_step_that_has_overflown_is_not_slow(native: None) -> None:
    """As loss scaling has them: what cannot be mended is not computed again.

    Thirty usual steps take longer, also where processes share the GPU.
    """
    tensors = leaves(2, 16, 16, 4096)
    out = sdpa(tensors, SDPBackend.FLASH_ATTENTION, is_causal=True)

    def milliseconds(grad_out: Tensor, steps: int) -> float:
        times = []
        for _ in range(3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(steps):
                torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return min(times)

    grad_out = randn(*out.shape)
    usual = milliseconds(grad_out, steps=30)
    for rows in (slice(None), slice(2048, 2049), slice(4095, None)):
        overflown = grad_out.clone()
        overflown[:, rows] = float("inf")
        assert milliseconds(overflown, steps=1) < usual


def test_memory_is_one_float32_dq_and_two_numbers_a_row(native: None) -> None:
    tensors = leaves(batch=4, heads=16, heads_kv=2, rows=2048)
    out = sdpa(tensors, SDPBackend.FLASH_ATTENTION, is_causal=True)
    grad_out = randn(*out.shape)
    torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(out, tensors, grad_out)
    peak = torch.cuda.max_memory_allocated() - before
    results = sum(grad.nbytes for grad in grads)
    rows = 4 * 16 * 2048
    assert peak <= results + rows * (128 + 2) * 4 + (1 << 20)
    assert dispatch_counts()[f"{FLASH}_backward"].served == 2


def assert_alike(found: Grads, expected: Grads) -> None:
    """Of two implementations: they mean the same by out and lse."""
    __tracebackhide__ = True
    for one, other in zip(found, expected, strict=True):
        distance = (one.double() - other.double()).square().mean().sqrt()
        assert distance <= 0.02 * other.double().square().mean().sqrt()


@BACKENDS
@pytest.mark.parametrize("causal", [False, True])
def test_stocks_backward_follows_a_served_forward(
    backend: SDPBackend | None, op: str, causal: bool
) -> None:
    tensors = leaves(heads_kv=8)
    registry.activate_flash_attention_impl(IMPL)
    out = sdpa(tensors, backend, is_causal=causal)
    assert dispatch_counts()[op].served == 1
    registry.restore_flash_attention_impl()
    grad_out = randn(*out.shape)
    grads = torch.autograd.grad(out, tensors, grad_out)
    assert dispatch_counts()[f"{op}_backward"].served == 0
    assert_right(op, out, grads, tensors, grad_out, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_backward_is_served_after_stocks_forward(native: None, causal: bool) -> None:
    registry.restore_flash_attention_impl()
    tensors = leaves(rows=300)
    out = sdpa(tensors, SDPBackend.FLASH_ATTENTION, is_causal=causal)
    registry.activate_flash_attention_impl(IMPL)
    grad_out = randn(*out.shape)
    grads = torch.autograd.grad(out, tensors, grad_out)
    assert dispatch_counts()[f"{FLASH}_backward"].served == 1
    assert_right("after stock", out, grads, tensors, grad_out, causal=causal)


def test_rows_without_keys_of_stocks_forward_have_gradients_of_zero(native: None) -> None:
    registry.restore_flash_attention_impl()
    tensors = leaves(rows=300, keys=170)
    out = general(tensors, causal=True)
    registry.activate_flash_attention_impl(IMPL)
    grad_out = randn(*out.shape)
    grads = torch.autograd.grad(out, tensors, grad_out)
    assert dispatch_counts()[GENERAL_BACKWARD].served == 1
    assert (grads[0][:, :130] == 0).all()
    assert_right("after stock", out, grads, tensors, grad_out, causal=True)


def test_cudnns_backward_follows_cudnns_forward() -> None:
    tensors = leaves(heads_kv=8)
    out = sdpa(tensors)
    grad_out = randn(*out.shape)
    expected = torch.autograd.grad(out, tensors, grad_out, retain_graph=True)
    registry.activate_flash_attention_impl(IMPL)
    assert_alike(torch.autograd.grad(out, tensors, grad_out), expected)
    reasons = dispatch_counts()[f"{CUDNN}_backward"].declined
    assert reasons == {"forward was run by cuDNN": 1}


def test_what_asked_for_cudnn_itself_stays_there_in_the_backward() -> None:
    tensors = leaves(heads_kv=8)
    registry.activate_flash_attention_impl(IMPL)
    out = sdpa(tensors, SDPBackend.CUDNN_ATTENTION)
    torch.autograd.grad(out, tensors, randn(*out.shape))
    counts = dispatch_counts()
    assert (counts[CUDNN].served, counts[f"{CUDNN}_backward"].served) == (0, 0)


@pytest.mark.parametrize("backend", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION])
def test_dropout_is_stocks_in_both_directions(backend: SDPBackend) -> None:
    tensors = leaves(heads_kv=8)

    def step() -> list[Tensor]:
        torch.manual_seed(7)
        out = sdpa(tensors, backend, dropout_p=0.25)
        return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]

    stock = step()
    registry.activate_flash_attention_impl(IMPL)
    found = step()
    assert torch.equal(found[0], stock[0])
    assert_alike(tuple(found[1:]), tuple(stock[1:]))
    counts = dispatch_counts()
    assert counts.served == 0
    assert counts.declined == 2


def captured(step: Callable[[], Grads]) -> tuple[torch.cuda.CUDAGraph, Grads]:
    """A graph of a step that has been warmed up, and what replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, step()


def test_a_training_step_in_a_cuda_graph(native: None) -> None:
    tensors = leaves(rows=512)
    grad_out = randn(2, 512, 8, 128)

    def step() -> Grads:
        out = sdpa(tensors, SDPBackend.FLASH_ATTENTION, is_causal=True)
        return torch.autograd.grad(out, tensors, grad_out)

    with asking_for_determinism():
        graph, grads = captured(step)
        with torch.no_grad():
            for tensor in tensors:
                tensor.copy_(randn(*tensor.shape))
        for _ in range(3):
            graph.replay()
        for one, other in zip(grads, step(), strict=True):
            assert torch.equal(one, other)


def test_a_graph_of_more_tiles_than_there_is_room_for_begins_with_zero_each_time() -> None:
    tensors = leaves(**MANY)
    grad_out = randn(*tensors[0].shape)

    def step() -> Grads:
        out = fa4_cuda.flash_attn_func(*tensors, causal=True)
        assert isinstance(out, Tensor)
        return (out.detach(), *torch.autograd.grad(out, tensors, grad_out))

    graph, (out, *grads) = captured(step)
    for _ in range(3):
        grad_out.copy_(randn(*grad_out.shape))
        for result in (out, *grads):
            result.fill_(float("nan"))
        graph.replay()
        assert_right("replayed", out, tuple(grads), tensors, grad_out, causal=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_backward_runs_on_the_device_of_its_tensors(native: None) -> None:
    tensors = [tensor.detach().to("cuda:1").requires_grad_() for tensor in leaves()]
    out = sdpa(tensors, SDPBackend.FLASH_ATTENTION)
    grad_out = randn(*out.shape).to("cuda:1")
    grads = torch.autograd.grad(out, tensors, grad_out)
    assert_both_served(FLASH)
    assert_right("second GPU", out, grads, tensors, grad_out)


@BACKENDS
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_compiled_step_is_served(
    native: None, backend: SDPBackend | None, op: str, deterministic: bool
) -> None:
    def step(*tensors: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in tensors))
        return out.sin()

    tensors = leaves(heads_kv=8)
    torch._dynamo.reset()
    # Around both: a compiled backward insists on what its forward was told.
    with asking_for_determinism() if deterministic else nullcontext():
        with nullcontext() if backend is None else sdpa_kernel(backend):
            found = torch.compile(step, fullgraph=True)(*tensors)
            expected = step(*tensors)
        grad_out = randn(*found.shape)
        grads = torch.autograd.grad(found, tensors, grad_out)
        assert_alike(grads, torch.autograd.grad(expected, tensors, grad_out))
    # The compiled step may have been given the other backend's op.
    counts = dispatch_counts()
    assert counts[f"{op}_backward"].served >= 1
    assert sum(counts[f"{each}_backward"].served for each in (FLASH, CUDNN)) == 2


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_direct_calls_have_gradients(compiled: bool) -> None:
    options: dict[str, Any] = {"causal": True, "window_size": (100, -1)}

    def dense(*tensors: Tensor) -> Tensor:
        out = fa4_cuda.flash_attn_func(*tensors, **options)
        assert isinstance(out, Tensor)
        return out

    offsets = torch.tensor([0, 100, 100, 417], device="cuda", dtype=torch.int32)

    def packed(*tensors: Tensor) -> Tensor:
        out = fa4_cuda.flash_attn_varlen_func(*tensors, offsets, offsets, 317, 317, **options)
        assert isinstance(out, Tensor)
        return out

    wrap: Callable[[Any], Any] = lambda f: torch.compile(f, fullgraph=True) if compiled else f  # noqa: E731
    torch._dynamo.reset()
    tensors = leaves()
    out = wrap(dense)(*tensors)
    grad_out = randn(*out.shape)
    grads = torch.autograd.grad(out, tensors, grad_out)
    assert_right("dense", out, grads, tensors, grad_out, causal=True, window_left=100)
    tensors = [randn(417, heads, 96).requires_grad_() for heads in (8, 2, 2)]
    out = wrap(packed)(*tensors)
    grad_out = randn(*out.shape)
    grads = torch.autograd.grad(out, tensors, grad_out)
    lengths = {"cu_seqlens_query": offsets, "cu_seqlens_key": offsets}
    masks = {"causal": True, "window_left": 100}
    assert_right("packed", out, grads, tensors, grad_out, **masks, **lengths)


@pytest.mark.filterwarnings("ignore:fa4-cuda raised OutOfMemoryError:RuntimeWarning")
def test_running_out_of_memory_in_a_backward_is_an_out_of_memory_error() -> None:
    registry.activate_flash_attention_impl(IMPL)
    tensors = leaves(batch=8, heads=16, heads_kv=16, rows=2048)
    out = sdpa(tensors, SDPBackend.FLASH_ATTENTION)
    grad_out = torch.ones_like(out)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (4 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.autograd.grad(out, tensors, grad_out)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
