"""The kernels of wide heads go through every query and key that see each other, once."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "src/fa4_cuda/csrc"
PROGRAM = Path(__file__).with_name("backward_ranges.cpp")


@pytest.fixture(scope="module")
def program(compile_host: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranges")
    return compile_host(PROGRAM, folder, "-O2", f"-I{CSRC}")


def random_call(chance: random.Random) -> str:
    """A line of the program's input."""
    heads_k = chance.choice([1, 2])
    heads_q = heads_k * chance.choice([1, 2, 3])
    sequences = [(chance.randint(1, 300), chance.choice([0, chance.randint(1, 300)]))]
    batch = chance.choice([1, 2])
    if chance.random() < 0.4:  # packed
        batch = chance.randint(2, 4)
        lengths = [0, *(chance.randint(1, 260) for _ in range(5))]
        sequences = [(chance.choice(lengths), chance.choice(lengths)) for _ in range(batch)]
    longest_q, longest_k = (max(pair[side] for pair in sequences) for side in (0, 1))
    left = right = longest_q + longest_k
    mask = chance.choice(["full", "causal", "window"])
    if mask != "full":
        right = chance.choice([0, chance.randint(0, longest_q + 1)])
    if mask == "window":
        left = chance.randint(0, longest_k + 1)
    numbers = [batch, heads_q, heads_k, left, right, int(mask == "window"), len(sequences)]
    return " ".join(map(str, [*numbers, *(rows for pair in sequences for rows in pair)]))


def test_every_pair_that_sees_each_other_counts_once(program: Path) -> None:
    chance = random.Random(0)
    calls = [random_call(chance) for _ in range(400)]
    done = subprocess.run(
        [str(program)], input="\n".join(calls), capture_output=True, text=True, check=True
    )
    wrong = [int(line) for line in done.stdout.split()]
    assert len(wrong) == len(calls)
    assert [call for call, found in zip(calls, wrong, strict=True) if found] == []
