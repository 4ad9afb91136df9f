"""On a GPU: the bench's times are the device's, of the kernels meant, and its record is whole."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flash_attention_registry import Registry
from flash_attention_registry.sdpa import dispatch_counts
from flash_attention_testkit.bench.backends import make_inputs, operation, running_on
from flash_attention_testkit.bench.cli import main
from flash_attention_testkit.bench.grids import GRIDS, Cell
from flash_attention_testkit.bench.measure import ceilings, host_times, measure_cell
from flash_attention_testkit.bench.timing import Contestant, CudaClock, interleaved

pytestmark = pytest.mark.gpu

STOCK = ["native", "torch:flash", "torch:efficient"]
CELL = Cell("forward", 64, 1024, True, 4, 8, 8)


@pytest.fixture
def clock() -> CudaClock:
    return CudaClock()


def test_the_hosts_time_is_no_part_of_a_devices(clock: CudaClock) -> None:
    tensor = torch.ones(1024, device="cuda")

    def slow_to_call() -> None:
        time.sleep(0.5e-3)
        tensor.add_(1.0)

    turns, failed = interleaved({"slow": Contestant(slow_to_call)}, clock, 0.0)
    assert failed == {}
    for turn in turns["slow"]:
        assert turn.host_us > 500
        assert turn.ms < 0.1


def test_a_time_is_that_of_all_kernels_of_a_call(clock: CudaClock) -> None:
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    tasks = {
        "once": Contestant(lambda: a @ a),
        "four times": Contestant(lambda: [a @ a for _ in range(4)]),
    }
    turns, _ = interleaved(tasks, clock, 0.2)
    once, four = (sorted(turn.ms for turn in turns[name])[2] for name in tasks)
    assert 2.5 < four / once < 5.0


@pytest.mark.parametrize("name", ["torch:flash", "torch:efficient"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_backend_asked_for_by_name_is_what_runs(name: str, direction: str) -> None:
    cell = Cell(direction, 64, 256, True, 2, 4, 4)
    with running_on(name, "cuda"):
        run = operation(cell, make_inputs(cell, "cuda"), name)
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
    called = {event.key for event in profile.key_averages()}
    op = f"aten::_scaled_dot_product_{name.removeprefix('torch:')}_attention"
    assert (f"{op}_backward" if direction == "backward" else op) in called


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_figures_of_torchs_kernels_are_plausible(clock: CudaClock, direction: str) -> None:
    cell = Cell(direction, 64, 1024, True, 4, 8, 8)
    found = measure_cell(cell, STOCK, 0.0, "cuda", clock)
    assert set(found.measured) == set(STOCK)
    for figures in found.measured.values():
        assert 0.005 < figures.ms.median < 5.0
        assert figures.ms.low <= figures.ms.median <= figures.ms.high
        assert figures.peak_mib is not None
        assert figures.peak_mib >= 4 * 8 * 1024 * 64 * 2 / 2**20  # one result at least


def test_no_memory_is_a_reason_and_the_others_go_on(clock: CudaClock) -> None:
    huge = Cell("forward", 128, 1 << 20, True, 256, 64, 64)  # 4 TiB a tensor
    found = measure_cell(huge, ["native"], 0.0, "cuda", clock)
    assert "out of memory" in found.skipped["native"]
    assert set(measure_cell(CELL, ["native"], 0.0, "cuda", clock).measured) == {"native"}


@pytest.mark.parametrize("grid", ["decode", "varlen", "gqa"])
def test_every_grid_has_cells_that_torch_can_run(clock: CudaClock, grid: str) -> None:
    for cell in list(GRIDS[grid]())[::5]:
        found = measure_cell(cell, ["torch:flash"], 0.0, "cuda", clock)
        assert set(found.measured) == {"torch:flash"}, found.skipped


def test_host_times_and_ceilings_are_there(clock: CudaClock) -> None:
    times = host_times(STOCK)
    assert {label.rpartition(" ")[2] for label in times} == set(STOCK)
    assert all(1 < value < 10_000 for value in times.values())
    found = ceilings(clock)
    assert found["matmul_tflops"] > 10
    assert found["copy_gbs"] > 100


def test_native_is_stock_while_an_implementation_is_active(
    clock: CudaClock, flash_attention_registry_reset: Registry
) -> None:
    register = pytest.importorskip("fa4_triton", reason="needs an implementation").register
    register()
    tensor = torch.randn(1, 8, 256, 64, device="cuda", dtype=torch.bfloat16)
    flash_attention_registry_reset.activate("fa4-triton")
    found = measure_cell(CELL, ["torch:flash", "fa4-triton"], 0.0, "cuda", clock)
    assert set(found.measured) == {"torch:flash", "fa4-triton"}, found.skipped
    before = dispatch_counts().served
    with running_on("native", "cuda"):
        F.scaled_dot_product_attention(tensor, tensor, tensor)
    assert dispatch_counts().served == before
    F.scaled_dot_product_attention(tensor, tensor, tensor)
    assert dispatch_counts().served == before + 1


def test_a_run_makes_a_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    words = ["--head-dim", "64", "--seq-len", "1024", "--batch", "2", "--causal", "yes"]
    asked = [*STOCK, "--only", "--budget", "0", "--commit", "abc", "--output", str(path)]
    assert main([*asked, *words]) == 0
    record = json.loads(path.read_text())
    assert record["finished"]
    assert record["environment"]["gpu"] == torch.cuda.get_device_name()
    assert {(row["impl"], row["direction"]) for row in record["rows"]} == {
        (name, direction) for name in STOCK for direction in ("forward", "backward")
    }
    for row in record["rows"]:
        assert row["ratio_to_flash"] > 0
        assert 0 < row["share_of_ceiling"] < 1.05
