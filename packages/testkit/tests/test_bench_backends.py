"""Each name runs on the kernels it means, and what does not is not measured as if it did."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flash_attention_registry.sdpa import Capabilities, install
from flash_attention_testkit.bench.backends import (
    NotMeasuredError,
    StaysInstalledError,
    make_inputs,
    mode_of,
    operation,
    running_on,
    why,
)
from flash_attention_testkit.bench.grids import Cell
from flash_attention_testkit.bench.measure import measure_cell
from flash_attention_testkit.bench.timing import HostClock

CELL = Cell("forward", 32, 16, True, 1, 2, 2)
BACKWARD = Cell("backward", 32, 16, True, 1, 2, 2)


class Zeros:
    """Serves head dim 32 with zeros, by which its work is known."""

    name = "zeros"
    capabilities = Capabilities(
        device_types=frozenset({"cpu"}),
        dtypes=frozenset({torch.bfloat16}),
        head_dims=(32,),
        features=frozenset({"backward", "causal"}),
        deterministic="always",
    )

    def supports(self, call):
        return self.capabilities.reason_to_decline(call)

    def forward(self, call):
        batch, rows, heads, _ = call.query.shape
        return torch.zeros_like(call.query), torch.zeros(batch, heads, rows)

    def backward(self, call, grad_out, out, lse):
        return tuple(torch.zeros_like(tensor) for tensor in (call.query, call.key, call.value))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other take long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def zeros(flash_attention_registry_reset):
    flash_attention_registry_reset.register("zeros", register_fn=lambda: install(Zeros(), "cpu"))
    return flash_attention_registry_reset


def result(cell: Cell, name: str) -> torch.Tensor:
    with running_on(name, "cpu"):
        out = operation(cell, make_inputs(cell, "cpu"), name)()
    return out if cell.direction == "forward" else torch.stack([*out])


@pytest.mark.parametrize("cell", [CELL, BACKWARD], ids=["forward", "backward"])
def test_native_is_torchs_own_kernel_whatever_is_active(zeros, cell: Cell) -> None:
    native = result(cell, "native")
    zeros.activate("zeros")
    assert torch.equal(result(cell, "native"), native)
    assert torch.equal(result(cell, "torch:flash"), native)
    assert zeros.current() == "zeros"
    assert not result(cell, "zeros").any()
    assert native.any()


def test_every_contestant_gets_figures_or_a_reason(zeros) -> None:
    names = ["native", "torch:flash", "torch:cudnn", "zeros", "missing"]
    found = measure_cell(CELL, names, 0.0, "cpu", HostClock())
    assert set(found.measured) == {"native", "torch:flash", "zeros"}
    assert "No viable backend" in found.skipped["torch:cudnn"]
    assert "Unknown flash attention impl 'missing'" in found.skipped["missing"]
    assert zeros.current() is None


def test_a_call_that_torchs_kernel_runs_instead_is_not_measured(zeros) -> None:
    wide = Cell("forward", 64, 16, True, 1, 2, 2)
    found = measure_cell(wide, ["native", "zeros"], 0.0, "cpu", HostClock())
    assert set(found.measured) == {"native"}
    assert "runs on torch's own kernel: " in found.skipped["zeros"]
    assert "head" in found.skipped["zeros"]


class Tiring(Zeros):
    """Serves a few calls, and fails from then on: torch's kernels run in its place."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def forward(self, call):
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("tired")
        return super().forward(call)


def test_who_fails_in_the_middle_is_not_measured_as_if_it_had_run(
    flash_attention_registry_reset,
) -> None:
    kernels = Tiring(5)
    flash_attention_registry_reset.register("tiring", register_fn=lambda: install(kernels, "cpu"))
    with pytest.warns(RuntimeWarning, match="tired"):
        found = measure_cell(CELL, ["native", "tiring"], 0.0, "cpu", HostClock())
    assert set(found.measured) == {"native"}
    assert "kernel raised RuntimeError" in found.skipped["tiring"]


def test_a_call_that_reaches_no_kernel_of_an_implementation_is_told(zeros) -> None:
    with pytest.raises(NotMeasuredError, match="a backend that no implementation"):  # noqa: SIM117
        with running_on("zeros", "cpu"):
            torch.zeros(1)


def test_what_cannot_be_taken_away_again_ends_the_run(flash_attention_registry_reset) -> None:
    flash_attention_registry_reset.register("stays", register_fn=lambda: None)
    with pytest.raises(StaysInstalledError, match="stays cannot be compared with anything"):
        measure_cell(CELL, ["native", "stays"], 0.0, "cpu", HostClock())


def test_packed_sequences_say_why_the_cpu_cannot_run_them() -> None:
    packed = Cell("forward", 32, 16, True, 2, 2, 2, seq_lens=(4, 16))
    found = measure_cell(packed, ["native"], 0.0, "cpu", HostClock())
    assert found.skipped == {"native": "torch has no attention for packed sequences on the CPU"}


def test_inputs_that_do_not_fit_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")

    monkeypatch.setattr(torch, "randn", full)
    found = measure_cell(CELL, ["native"], 0.0, "cpu", HostClock())
    (reason,) = found.skipped.values()
    assert reason.startswith("its inputs cannot be made: out of memory")
    assert "Tried to allocate 9 GiB" in reason


def test_a_reason_is_one_line_and_names_the_error() -> None:
    assert why(RuntimeError("two\nlines")) == "RuntimeError: two lines"
    assert why(NotMeasuredError("a reason")) == "a reason"


@pytest.mark.parametrize(
    ("layout", "strides"),
    [("bshd", (16 * 2 * 32, 2 * 32, 32, 1)), ("bhsd", (2 * 16 * 32, 32, 16 * 32, 1))],
)
def test_the_gradient_of_out_lies_as_asked(
    layout: str, strides: tuple[int, ...], flash_attention_registry_reset
) -> None:
    class Looks(Zeros):
        def backward(self, call, grad_out, out, lse):
            found.append(grad_out.stride())  # of [B, S, H, D]
            return super().backward(call, grad_out, out, lse)

    found: list[tuple[int, ...]] = []
    flash_attention_registry_reset.register("looks", register_fn=lambda: install(Looks(), "cpu"))
    result(dataclasses.replace(BACKWARD, grad_layout=layout), "looks")
    assert found == [strides]


def modes() -> tuple[Any, ...]:
    """What torch is asked for, as far as determinism is concerned."""
    from torch._inductor import config

    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        config.deterministic,
    )


def test_only_the_backward_of_deterministic_cells_is_asked_to_repeat(
    flash_attention_registry_reset,
) -> None:
    class Notes(Zeros):
        def forward(self, call):
            forwards.add(modes())
            return super().forward(call)

        def backward(self, call, grad_out, out, lse):
            backwards.append(modes())
            return super().backward(call, grad_out, out, lse)

    forwards: set[tuple[Any, ...]] = set()
    backwards: list[tuple[Any, ...]] = []
    flash_attention_registry_reset.register("notes", register_fn=lambda: install(Notes(), "cpu"))
    before = modes()
    for cell, mode in (
        (BACKWARD, before),
        (dataclasses.replace(BACKWARD, deterministic=True), (True, True, False, True)),
    ):
        backwards.clear()
        found = measure_cell(cell, ["native", "notes"], 0.0, "cpu", HostClock())
        assert not found.skipped
        assert len(backwards) > 1  # to see that it runs, and in its turns
        assert set(backwards) == {mode}
    assert forwards == {before}
    assert modes() == before


def test_no_mode_is_set_in_the_time_of_a_call(zeros, monkeypatch: pytest.MonkeyPatch) -> None:
    def set_in_a_call(*_: object, **__: object) -> None:
        pytest.fail("the call that is timed sets the mode")

    cell = dataclasses.replace(BACKWARD, deterministic=True)
    with running_on("zeros", "cpu"):
        run = operation(cell, make_inputs(cell, "cpu"), "zeros")
        monkeypatch.setattr(torch, "use_deterministic_algorithms", set_in_a_call)
        run()


def test_what_the_user_has_set_is_set_again_after_deterministic_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config, "deterministic", True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    before = modes()
    with contextlib.suppress(KeyError), mode_of(dataclasses.replace(BACKWARD, deterministic=True)):
        raise KeyError
    assert modes() == before == (False, False, False, True)
