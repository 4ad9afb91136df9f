"""Each name runs on the kernels it means, and what does not is not measured as if it did."""

from __future__ import annotations

import pytest
import torch

from flash_attention_registry.sdpa import Capabilities, install
from flash_attention_testkit.bench.backends import operation, running_on
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


@pytest.fixture
def zeros(flash_attention_registry_reset):
    flash_attention_registry_reset.register("zeros", register_fn=lambda: install(Zeros(), "cpu"))
    return flash_attention_registry_reset


def result(cell: Cell, name: str) -> torch.Tensor:
    with running_on(name):
        out = operation(cell, name, "cpu")()
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
    found = measure_cell(CELL, names, 2, "cpu", HostClock())
    assert set(found.measured) == {"native", "torch:flash", "zeros"}
    assert "No viable backend" in found.skipped["torch:cudnn"]
    assert "Unknown flash attention impl 'missing'" in found.skipped["missing"]
    assert zeros.current() is None


def test_a_call_that_torchs_kernel_runs_instead_is_not_measured(zeros) -> None:
    wide = Cell("forward", 64, 16, True, 1, 2, 2)
    found = measure_cell(wide, ["native", "zeros"], 1, "cpu", HostClock())
    assert set(found.measured) == {"native"}
    assert "runs on torch's own kernel: " in found.skipped["zeros"]
    assert "head" in found.skipped["zeros"]


def test_packed_sequences_say_why_the_cpu_cannot_run_them() -> None:
    packed = Cell("forward", 32, 16, True, 2, 2, 2, seq_lens=(4, 16))
    found = measure_cell(packed, ["native"], 1, "cpu", HostClock())
    assert found.skipped == {"native": "torch has no attention for packed sequences on the CPU"}
