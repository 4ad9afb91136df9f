"""Programs that know nothing of the registry, run as they are under its environment variable."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any, NamedTuple

import pytest

TESTS = Path(__file__).resolve().parent
PROGRAMS = TESTS / "programs"
RUN_AND_COUNT = TESTS / "run_and_count.py"
TRAINING = ["encoder", "llama"]
STEPS = 24
# Two of torch's own: how far apart they are is how far rounding alone moves a loss curve.
BACKENDS = {
    "cpu": ("FLASH_ATTENTION", "MATH"),
    "gpu": ("CUDNN_ATTENTION", "FLASH_ATTENTION"),
}
# On a GPU stock's sums do not repeat, so one pair of curves is a matter of luck there; and where a
# loss jumps, its gaps are ten times the others', so the mean of several is geometric.
SEEDS = {"cpu": (0,), "gpu": (0, 1, 2)}
NEGATED_GRADIENTS = """
import runpy, sys
import flash_attention_registry
from fa4_triton.kernel_set import TritonKernels
backward = TritonKernels.backward
TritonKernels.backward = lambda self, *given: tuple(-grad for grad in backward(self, *given))
flash_attention_registry.activate_flash_attention_impl("fa4-triton")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Training(NamedTuple):
    """What a program printed, and the calls that were counted while it ran."""

    losses: list[float]
    calls: int
    counts: dict[str, Any] | None


Train = Callable[..., Training]


def average_gap(one: Sequence[float], other: Sequence[float]) -> float:
    """How far two loss curves are apart in the mean over all steps, in nats per byte.

    Not where they are farthest: that is a matter of one step, and jumps.
    """
    return mean(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something to learn: the licence, which does not change, and so neither do the losses."""
    file = tmp_path_factory.mktemp("text") / "text"
    file.write_text((TESTS.parent / "LICENSE").read_text(encoding="utf-8") * 4, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def train(run_python: Callable[..., str], text: Path, where: str) -> Train:
    """Trains with a program, as it is; the same arguments give the same training."""

    @cache
    def train(
        program: str, environment: tuple[tuple[str, str], ...], *before: str, seed: int
    ) -> Training:
        arguments = [PROGRAMS / f"{program}.py", text, "--size", where, "--steps", STEPS]
        given = [*before, *arguments, "--seed", seed]
        printed = run_python(RUN_AND_COUNT, *given, **dict(environment))
        result, counts = map(json.loads, printed.splitlines()[-2:])
        return Training(result["losses"], STEPS * result["attention_calls_per_step"], counts)

    return lambda program, environment, *before, seed=0: train(
        program, tuple(environment.items()), *before, seed=seed
    )


@pytest.mark.parametrize("file", sorted(PROGRAMS.glob("*.py")), ids=lambda file: file.stem)
def test_programs_know_nothing_of_the_registry(file: Path) -> None:
    source = file.read_text(encoding="utf-8")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    known = {"__future__", "argparse", "dataclasses", "json", "pathlib", "torch", "transformers"}
    assert imported <= known
    for word in ("FLASH_ATTENTION", "flash_attention_impl", "sdpa_kernel"):
        assert word not in source


@pytest.mark.parametrize("program", TRAINING)
def test_every_call_of_a_program_is_served(
    program: str, train: Train, asks_for_fa4_triton: dict[str, str]
) -> None:
    training = train(program, asks_for_fa4_triton)
    assert training.counts is not None, "the registry was not loaded"
    assert training.counts["active"] == "fa4-triton"
    assert training.counts["declined"] == {}
    served = training.counts["served"]
    backward = sum(count for op, count in served.items() if op.endswith("_backward"))
    assert (sum(served.values()) - backward, backward) == (training.calls, training.calls)


@pytest.mark.parametrize("program", TRAINING)
def test_a_served_program_learns_as_on_torchs_own_kernels(
    program: str,
    train: Train,
    where: str,
    stock: dict[str, str],
    asks_for_fa4_triton: dict[str, str],
) -> None:
    gaps, yardsticks, quarter = [], [], STEPS // 4
    for seed in SEEDS[where]:
        own = train(program, stock, seed=seed).losses
        served = train(program, asks_for_fa4_triton, seed=seed).losses
        one, other = (
            train(program, stock, "--backend", backend, seed=seed).losses
            for backend in BACKENDS[where]
        )
        gaps.append(average_gap(own, served))
        yardsticks.append(average_gap(one, other))
        assert mean(served[-quarter:]) < mean(served[:quarter]) - 0.3  # something was learnt
    assert min(gaps) > 0
    assert geometric_mean(gaps) <= 2 * geometric_mean(yardsticks), f"{gaps} against {yardsticks}"


@pytest.mark.parametrize("program", TRAINING)
def test_a_program_that_asks_for_nothing_is_left_alone(
    program: str,
    train: Train,
    where: str,
    stock: dict[str, str],
    asks_for_nothing: dict[str, str],
) -> None:
    untouched, beside_us = train(program, stock), train(program, asks_for_nothing)
    assert beside_us.counts is None
    if where == "cpu":  # stock's sums on a GPU do not repeat
        assert beside_us.losses == untouched.losses


@pytest.mark.parametrize("program", TRAINING)
def test_the_variable_alone_activates(
    program: str,
    train: Train,
    run_python: Callable[..., str],
    text: Path,
    where: str,
    stock: dict[str, str],
    asks_for_fa4_triton: dict[str, str],
) -> None:
    """Nothing stands before the program here; that it is served shows in the last bits."""
    if where == "gpu":
        pytest.skip("stock's sums on a GPU do not repeat, so bits cannot tell who computed them")
    arguments = [PROGRAMS / f"{program}.py", text, "--steps", 4]
    losses = json.loads(run_python(*arguments, **asks_for_fa4_triton))["losses"]
    assert losses == train(program, asks_for_fa4_triton).losses[:4]
    assert losses != train(program, stock).losses[:4]


def test_the_yardstick_notices_wrong_gradients(
    train: Train,
    run_python: Callable[..., str],
    text: Path,
    where: str,
    stock: dict[str, str],
    asks_for_fa4_triton: dict[str, str],
) -> None:
    arguments = [PROGRAMS / "encoder.py", text, "--size", where, "--steps", STEPS]
    environment = asks_for_fa4_triton | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    printed = run_python("-c", NEGATED_GRADIENTS, *arguments, **environment)
    wrong = json.loads(printed)["losses"]
    one, other = (
        train("encoder", stock, "--backend", backend).losses for backend in BACKENDS[where]
    )
    own = train("encoder", stock).losses
    assert average_gap(own, wrong) > 2 * average_gap(one, other)
