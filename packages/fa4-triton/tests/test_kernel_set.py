"""What the router relies on in a kernel set, beside right numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fa4_triton import kernel_set
from fa4_triton.kernel_set import TritonKernels
from fa4_triton.plan import Device, Request
from flash_attention_registry.sdpa import (
    AttentionCall,
    KernelSet,
    dispatch_counts,
    reset_dispatch_counts,
)
from flash_attention_registry.sdpa.allocation import empty_lse


def test_the_kernel_set_has_every_part_of_one() -> None:
    assert isinstance(TritonKernels(), KernelSet)


def test_output_goes_where_the_call_says(device: str, inputs: Any, run: Any) -> None:
    given = inputs(lengths=(30, 30), heads=(2, 1))
    expected = run(given)
    buffer = torch.full((1, 30, 4, 64), math.nan, dtype=torch.bfloat16, device=device)
    call = AttentionCall(
        given.query, given.key, given.value, 64**-0.5, False, out=buffer[:, :, 1:3]
    )
    out, _ = TritonKernels().forward(call)
    assert out is call.out
    assert torch.equal(buffer[:, :, 1:3], expected.out)
    assert buffer[:, :, [0, 3]].isnan().all()


@pytest.mark.parametrize("value", [0.0, -math.inf])
def test_lse_of_empty_rows_is_what_the_op_asks(inputs: Any, value: float) -> None:
    given = inputs(lengths=(30, 10))
    call = AttentionCall(given.query, given.key, given.value, 0.1, True, lse_of_empty_rows=value)
    kernels = TritonKernels()
    out, lse = kernels.forward(call)
    assert (lse[..., :20] == value).all()
    assert lse[..., 20:].isfinite().all()
    assert (out[:, :20] == 0).all()
    dq, _, _ = kernels.backward(call, given.grad_out, out, lse)
    assert (dq[:, :20] == 0).all()
    assert dq.isfinite().all()


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=["mha", "gqa"])
def test_repeats_give_the_same_bits(inputs: Any, run: Any, heads: tuple[int, int]) -> None:
    given = inputs(lengths=(70, 130), heads=heads)
    first = run(given, causal=True, deterministic=True)
    for _ in range(3):
        again = run(given, causal=True, deterministic=True)
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(getattr(first, name), getattr(again, name)), name


def test_memory_of_these_tests_is_nan_until_written(
    inputs: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests above would not see an element that nobody wrote."""
    from fa4_triton.hopper_backward_launch import HopperBackwardVariant
    from fa4_triton.hopper_launch import HopperForward
    from fa4_triton.launch import Variant

    monkeypatch.setattr(Variant, "launch", lambda *_: None)
    monkeypatch.setattr(HopperBackwardVariant, "launch", lambda *_: None)
    monkeypatch.setattr(HopperForward, "launch", lambda *_: None)
    result = run(inputs())
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert getattr(result, name).isnan().all(), name


def test_the_interpreter_searches_the_language_once_a_module_and_launch(
    inputs: Any, run: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each call of a device function, of which this takes hundreds, it cost 40% of the time."""
    if device == "cuda":
        pytest.skip("is about the interpreter")
    from triton.runtime import interpreter

    searched: list[str] = []
    search = interpreter._patch_lang

    def counted(function: Any) -> Any:
        searched.append(function.__module__)
        return search(function)

    monkeypatch.setattr(interpreter, "_patch_lang", counted)
    run(inputs(lengths=(70, 130), heads=(2, 1)), causal=True)
    launches = 3
    assert len(set(searched)) >= 3  # two files of kernels, what they share, and Triton's own
    # Once for the kernel itself, and once for the device functions of each module.
    assert len(searched) <= launches * (1 + len(set(searched)))


def forget_plans() -> None:
    kernel_set._forward_of.cache_clear()
    kernel_set._backward_of.cache_clear()
    kernel_set._looks.clear()


class Launches(list[Any]):
    """Stands for compiled Hopper kernels, and writes nothing."""

    def launch(self, *arguments: Any) -> None:
        self.append(arguments)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch, device: str) -> Iterator[Launches]:
    """Kernel sets take this device for a Hopper GPU; what would be launched there."""
    if device == "cuda":
        pytest.skip("pretends on the CPU")
    launches = Launches()
    hopper = Device("hopper", l2_bytes=50 << 20, multiprocessors=132)
    monkeypatch.setattr(kernel_set, "_device", lambda index: hopper)
    monkeypatch.setattr(kernel_set, "_hopper_variant", lambda config, dtype: launches)
    monkeypatch.setattr(kernel_set.triton, "__version__", "3.6.0")
    monkeypatch.setattr(kernel_set, "ASKED", "hopper")  # for calls as small as these
    reset_dispatch_counts()
    forget_plans()
    yield launches
    forget_plans()
    reset_dispatch_counts()


def test_a_hopper_gpu_runs_the_hopper_forward(inputs: Any, on_hopper: Launches) -> None:
    given = inputs(lengths=(100, 130), heads=(4, 2))
    call = AttentionCall(given.query, given.key, given.value, 0.5, True, lse_of_empty_rows=7.0)
    out, lse = TritonKernels().forward(call)
    ((index, plan, tensors, pointers, floats),) = on_hopper
    assert (index, plan.mask, plan.programs) == (-1, "causal", 4)
    assert pointers[:5] == [one.data_ptr() for one in (*given_tensors(given), out, lse)]
    assert [one.data_ptr() for one in tensors[:5]] == pointers[:5]
    assert floats == (pytest.approx(0.5 / math.log(2)), 7.0)
    assert dispatch_counts().kernels == {"fa4-triton's Hopper forward": 1}


def given_tensors(given: Any) -> tuple[Any, Any, Any]:
    return given.query, given.key, given.value


@pytest.mark.parametrize(
    ("shape", "changes", "reason"),
    [
        ({"lengths": (100, 130), "layout": "odd strides"}, {}, "no multiples of 16 bytes"),
        ({"lengths": (100, 130)}, {"scale": -0.5}, "or negative"),
        ({"lengths": (100, 130)}, {"scale": 0.0}, "a scale that is zero"),
        ({"lengths": (100, 130), "head_dim": 16}, {}, "head_dim 16"),
    ],
)
def test_what_the_hopper_forward_does_not_serve_is_counted_with_the_reason(
    inputs: Any, on_hopper: Launches, shape: Any, changes: Any, reason: str
) -> None:
    given = inputs(**shape)
    call = AttentionCall(*given_tensors(given), 0.5, False)._replace(**changes)
    out, _ = TritonKernels().forward(call)
    assert on_hopper == []
    assert out.isfinite().all()
    ((kernel, times),) = dispatch_counts().kernels.items()
    assert reason in kernel
    assert kernel.startswith("fa4-triton's portable forward: ")
    assert times == 1


def test_an_untested_triton_gets_the_portable_kernels(
    inputs: Any, on_hopper: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_set.triton, "__version__", "3.9.0")
    given = inputs(lengths=(100, 130))
    TritonKernels().forward(AttentionCall(*given_tensors(given), 0.5, False))
    assert on_hopper == []
    assert "1 by fa4-triton's portable forward: the Hopper kernels were tested" in str(
        dispatch_counts()
    )


def test_a_small_call_gets_the_portable_kernels(
    inputs: Any, on_hopper: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_set, "ASKED", "fastest")
    given = inputs(lengths=(100, 130))
    TritonKernels().forward(AttentionCall(*given_tensors(given), 0.5, True))
    assert on_hopper == []
    assert "less than 16384 pairs" in str(dispatch_counts())


def test_packed_sequences_and_windows_go_to_the_hopper_forward(
    inputs: Any, on_hopper: Launches
) -> None:
    given = inputs(lengths=([70, 30], [20, 80]), heads=(4, 2))
    offsets = given.offsets()
    call = AttentionCall(*given_tensors(given), 0.5, False, 7, None, *offsets, 70, 80)
    TritonKernels().forward(call)
    ((_, plan, tensors, pointers, _),) = on_hopper
    assert (plan.mask, plan.varlen) == ("window", True)
    assert tensors[5:] == offsets
    assert pointers[5:] == [one.data_ptr() for one in offsets]


@pytest.mark.parametrize("head_dim", [64, 16], ids=["Hopper", "portable"])
@pytest.mark.parametrize("fails", [False, True])
def test_what_was_launched_is_counted_and_a_launch_that_fails_is_not(
    inputs: Any, on_hopper: Launches, monkeypatch: pytest.MonkeyPatch, head_dim: int, fails: bool
) -> None:
    from fa4_triton import hopper_backward_launch
    from fa4_triton.launch import Variant

    def launch(*_: Any) -> None:
        if fails:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(Launches, "launch", launch)
    monkeypatch.setattr(Variant, "launch", launch)
    monkeypatch.setattr(hopper_backward_launch, "launch_backward", launch)
    given = inputs(lengths=(100, 130), head_dim=head_dim)
    call = AttentionCall(*given_tensors(given), 0.5, False)
    lse = empty_lse(given.query)
    kernels = TritonKernels()
    for run_one in (
        lambda: kernels.forward(call),
        lambda: kernels.backward(call, given.grad_out, given.query, lse),
    ):
        with pytest.raises(torch.OutOfMemoryError) if fails else nullcontext():
            run_one()
    counted = dispatch_counts().kernels
    assert list(counted.values()) == ([] if fails else [1, 1])
    kind = "Hopper" if head_dim == 64 else "portable"
    assert all(kernel.startswith(f"fa4-triton's {kind} ") for kernel in counted)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_what_is_compiled_ahead_is_what_a_deterministic_backward_takes(
    on_hopper: Launches, monkeypatch: pytest.MonkeyPatch, head_dim: int
) -> None:
    from fa4_triton.hopper_backward_launch import HopperBackwardVariant

    shape = (1, 4096, 8, head_dim)
    request = Request(shape, shape, False, None, None, None)

    def hopper() -> bool:
        (kind,) = set(map(type, kernel_set.variants_of("backward", -1, torch.bfloat16, request)))
        return kind is HopperBackwardVariant

    assert hopper()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert hopper() is (head_dim == 256)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.2, 0.0, -0.2])
def test_heads_first_gives_the_same_bits(inputs: Any, causal: bool, scale: float) -> None:
    given = inputs(lengths=(70, 90), heads=(4, 2), batch=2)
    call = AttentionCall(*given_tensors(given), scale, causal, lse_of_empty_rows=3.0)
    kernels = TritonKernels()
    out, lse = kernels.forward(call)
    views = [one.transpose(1, 2) for one in given_tensors(given)]
    for _ in range(2):  # looked up, then found
        target = torch.full_like(views[0], math.nan)
        stats = lse.new_full((*lse.shape, 1), math.nan)
        assert kernels.forward_heads_first(*views, target, stats, scale, causal, 3.0) is None
        assert torch.equal(target.transpose(1, 2), out)
        assert torch.equal(stats[..., 0], lse)


def test_heads_first_remembers_nothing_of_a_subclass(
    inputs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it remembers serves all kernel sets."""
    from fa4_triton.launch import Variant

    monkeypatch.setattr(Variant, "launch", lambda *_: None)

    class Declining(TritonKernels):
        def supports(self, call: AttentionCall) -> str | None:
            return "never"

    given = inputs(lengths=(7, 9))
    views = [one.transpose(1, 2) for one in given_tensors(given)]
    rest = (torch.empty_like(views[0]), views[0].new_empty(1, 1, 7, dtype=torch.float32))
    forget_plans()
    Declining().forward_heads_first(*views, *rest, 1.0, False, 0.0)
    assert TritonKernels().forward_heads_first(*views, *rest, 1.0, False, 0.0) is None


def test_heads_first_declines_what_supports_declines(inputs: Any) -> None:
    given = inputs(lengths=(7, 9))
    views = [one.transpose(1, 2).float() for one in given_tensors(given)]
    for _ in range(2):
        reason = TritonKernels().forward_heads_first(
            *views, views[0].clone(), torch.empty(1, 1, 7), 1.0, False, 0.0
        )
        assert reason == "dtype torch.float32 is not supported"
