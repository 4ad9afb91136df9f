"""The kernels on a device of the test's own, with memory that is NaN until somebody writes it.

Tests that take `device` run twice: on the CPU in Triton's interpreter, and on a GPU with
`pytest -m gpu`, each in a process of its own.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention_testkit import SdpaResult, assert_sdpa_parity

sys.path.append(str(Path(__file__).parent))  # packages' tests are no packages themselves

from compilation import Compilation

HERE = Path(__file__).parent

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def pytest_configure(config: pytest.Config) -> None:
    """Interpret kernels, unless GPU tests were asked for; Triton is imported by later modules."""
    selection = config.getoption("markexpr")
    if "gpu" not in selection or "not gpu" in selection:
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Interpret a third of each standard test's parameters, and all if a grid is asked for.

    All of them take the interpreter five minutes. On a GPU all run.
    """
    if config.getoption("flash_attention_grid") is not None:
        return
    left: list[pytest.Item] = []
    seen: set[str] = set()
    for item in items:
        name, _, parameters = item.nodeid.partition("[")
        # By the parameters alone: what several tests look at is computed once.
        unlucky = zlib.crc32(parameters.encode()) % 3 != 0
        if "::TestInterpreted::" in name and name in seen and unlucky:
            left.append(item)
        seen.add(name)
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)


COMPILATION = pytest.StashKey[Compilation]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to compile what the tests of this run look at."""
    if session.config.option.collectonly:
        return
    wanted = {
        _compiled_for(item.path)
        for item in session.items
        if item.path.parent == HERE and "records" in getattr(item, "fixturenames", ())
    }
    if wanted:
        session.config.stash[COMPILATION] = Compilation(sorted(wanted))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave nothing running."""
    if COMPILATION in config.stash:
        config.stash[COMPILATION].stop()


def _compiled_for(path: Path) -> str:
    """The module whose cases a test module looks at."""
    return path.stem.removeprefix("test_")


@pytest.fixture(scope="module")
def records(request: pytest.FixtureRequest) -> list[Any]:
    """What the compiler made of the cases that the test module is about."""
    return request.config.stash[COMPILATION].records(_compiled_for(request.path))


@dataclass(frozen=True)
class Inputs:
    """One attention problem: `[B, S, H, D]`, or `[T, H, D]` with `lengths` of its sequences."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    lengths: tuple[list[int], list[int]] | None = None

    def offsets(self) -> tuple[Tensor | None, Tensor | None]:
        """cu_seqlens of queries and keys."""
        if self.lengths is None:
            return None, None
        query, key = (
            torch.tensor([0, *accumulate(one)], dtype=torch.int32, device=self.query.device)
            for one in self.lengths
        )
        return query, key

    def requiring_grad(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(x.detach().requires_grad_() for x in (self.query, self.key, self.value))


def _as_slice_of(tensor: Tensor, *, more: int, offset: int) -> Tensor:
    """The same values in rows that are `more` elements longer, `offset` elements into a buffer."""
    *rows, width = tensor.shape
    size = tensor.numel() // width * (width + more)
    buffer = tensor.new_full((size + offset,), float("nan"))
    view = buffer[offset:].view(*rows, width + more)[..., :width]
    view.copy_(tensor)
    return view


def _as_one_projection(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """The same values as slices of one `[B, S, Hq + 2 Hkv, D]` tensor."""
    heads, heads_kv = query.shape[2], key.shape[2]
    return list(torch.cat([query, key, value], 2).split([heads, heads_kv, heads_kv], 2))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows first": lambda x: x,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch last": lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "padded rows": lambda x: _as_slice_of(x, more=8, offset=8),
    "odd strides": lambda x: _as_slice_of(x, more=3, offset=0),
    "misaligned": lambda x: _as_slice_of(x, more=0, offset=1),
    "one head for all": lambda x: x[:, :, :1].expand(-1, -1, x.shape[2], -1),
    "one batch for all": lambda x: x[:1].expand(x.shape[0], -1, -1, -1),
    "one row for all": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1),
}


def make_inputs(
    device: str,
    *,
    lengths: Any = (64, 64),
    heads: tuple[int, int] = (1, 1),
    head_dim: int = 64,
    dtype: str = "bf16",
    batch: int = 1,
    std: float = 1.0,
    layout: str = "rows first",
    seed: int = 0,
) -> Inputs:
    """Random inputs; query and key scaled by `std`.

    Args:
        device: Where.
        lengths: Rows of query and of key; two lists for packed sequences.
        heads: Of query and of key.
        head_dim: D.
        dtype: A key of `DTYPES`.
        batch: B of dense inputs.
        std: Standard deviation of query and key.
        layout: A key of `LAYOUTS`, or "one projection".
        seed: Of the values.
    """
    generator = torch.Generator(device).manual_seed(seed)
    packed = isinstance(lengths[0], list)
    rows, rows_kv = map(sum, lengths) if packed else lengths

    def normal(length: int, count: int, factor: float) -> Tensor:
        shape = (batch, length, count, head_dim)
        return torch.randn(shape, device=device, generator=generator).mul(factor).to(DTYPES[dtype])

    tensors = [
        normal(rows, heads[0], std),
        normal(rows_kv, heads[1], std),
        normal(rows_kv, heads[1], 1.0),
        normal(rows, heads[0], 1.0),
    ]
    if layout == "one projection":
        tensors[:3] = _as_one_projection(*tensors[:3])
    else:
        tensors = [LAYOUTS[layout](tensor) for tensor in tensors]
    if packed:
        return Inputs(*(tensor[0] for tensor in tensors), lengths)
    return Inputs(*tensors)


@contextmanager
def nan_memory() -> Iterator[None]:
    """Let torch fill what it allocates with NaN, so that nothing unwritten goes unseen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def call_of(inputs: Inputs, *, causal: bool, window: Any, scale: float | None) -> Any:
    """The `AttentionCall` that a router would make."""
    from flash_attention_registry.sdpa import AttentionCall

    call = AttentionCall(
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.query.shape[-1] ** -0.5 if scale is None else scale,
        causal,
        *window,
    )
    if inputs.lengths is None:
        return call
    offsets = inputs.offsets()
    longest = [max(one) for one in inputs.lengths]
    return call._replace(
        cu_seqlens_query=offsets[0],
        cu_seqlens_key=offsets[1],
        max_seqlen_query=longest[0],
        max_seqlen_key=longest[1],
    )


def run_kernels(
    inputs: Inputs,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    deterministic: bool = False,
) -> SdpaResult:
    """Forward and backward on memory full of NaN."""
    from fa4_triton import interpreter
    from fa4_triton.kernel_set import TritonKernels

    interpreter.repair()
    kernels = TritonKernels()
    call = call_of(inputs, causal=causal, window=window, scale=scale)
    assert kernels.supports(call) is None
    with nan_memory(), pytest.MonkeyPatch.context() as patch:
        if not deterministic:
            # What fills memory asks for determinism, for which there may be other kernels.
            patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
        out, lse = kernels.forward(call)
        return SdpaResult(out, lse, *kernels.backward(call, inputs.grad_out, out, lse))


def check_parity(
    device: str,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    **shape: Any,
) -> None:
    """Compare out, lse and the gradients of one case with the testkit's references."""
    __tracebackhide__ = True
    inputs = make_inputs(device, **shape)
    offsets = inputs.offsets()
    assert_sdpa_parity(
        {"causal": causal, "window": window, "scale": scale, **shape},
        run_kernels(inputs, causal=causal, window=window, scale=scale),
        inputs.query,
        inputs.key,
        inputs.value,
        grad_out=inputs.grad_out,
        causal=causal,
        window_left=window[0],
        window_right=window[1],
        scale=scale,
        cu_seqlens_query=offsets[0],
        cu_seqlens_key=offsets[1],
    )


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device that the kernels run on in this process."""
    return "cpu" if request.param == "interpreter" else "cuda"


@pytest.fixture
def inputs(device: str) -> Callable[..., Inputs]:
    """Makes inputs on `device`: `make_inputs` without its first argument."""
    return lambda **shape: make_inputs(device, **shape)


@contextmanager
def _asking_for(kernels: str) -> Iterator[None]:
    """As where the environment asks for one kind of kernels, also in processes that tests start."""
    from fa4_triton import hopper, kernel_set

    def forget() -> None:
        kernel_set._forward_of.cache_clear()
        kernel_set._backward_of.cache_clear()
        kernel_set._looks.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(hopper.KERNELS, kernels)
        patch.setattr(kernel_set, "ASKED", hopper.asked_for())
        forget()
        yield
    forget()


@pytest.fixture(scope="session")
def asking_for() -> Callable[[str], AbstractContextManager[None]]:
    """A scope in which "hopper" or "portable" kernels serve all that they can, on a Hopper GPU."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("other GPUs have no other kernels")
    return _asking_for


@pytest.fixture
def run() -> Callable[..., SdpaResult]:
    """`run_kernels`."""
    return run_kernels


@pytest.fixture
def parity(device: str) -> Callable[..., None]:
    """`check_parity` on `device`."""

    def check(**case: Any) -> None:
        __tracebackhide__ = True
        check_parity(device, **case)

    return check
