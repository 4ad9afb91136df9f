"""The sums of dQ begin with zero, and dQ that the main kernel makes of them is right.

`backward_upkeep.cuh` itself, by the host compiler, under random schedules (sums_upkeep.cpp).
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "src/fa4_cuda/csrc"
PROGRAM = Path(__file__).with_name("sums_upkeep.cpp")
PTX = Path(__file__).with_name("sums_upkeep_ptx.h")
HEADERS = (
    *("backward_params.h", "backward_tiles.h", "backward_upkeep.cuh", "backward_work.cuh"),
    *("element.h", "forward_params.h", "nan_watch.cuh", "quad.cuh", "tiles.h"),
)
BOTH = ("FA4_ZERO_DQ_AHEAD", "FA4_CONVERT_DQ_BEHIND")

Compile = Callable[..., Path]


@pytest.fixture(scope="module")
def compile_program(
    compile_host: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Compile:
    """Compile the program, with a change of what it proves if one is given."""

    def compiled(*defines: str, change: tuple[str, str] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("upkeep")
        for name in HEADERS:
            text = (CSRC / name).read_text()
            if change is not None and name == "backward_upkeep.cuh":
                assert text.count(change[0]) == 1, change[0]
                text = text.replace(*change)
            (folder / name).write_text(text)
        (folder / "ptx.cuh").write_text(PTX.read_text())
        return compile_host(PROGRAM, folder, "-O1", *(f"-D{name}" for name in defines))

    return compiled


def random_call(seed: int) -> str:
    """A line of the program's input."""
    chance = random.Random(seed)
    heads_k = chance.choice([1, 3, 6])
    heads_q = heads_k * chance.choice([1, 1, 2])
    batch = chance.choice([1, 2, 4])
    sequences = [(chance.choice([0, *[chance.randint(1, 300)] * 9]), chance.randint(1, 700))]
    if chance.random() < 0.4:  # packed
        batch = chance.randint(2, 5)
        lengths = [0, *(chance.randint(1, 300) for _ in range(5))]
        sequences = [(chance.choice(lengths), chance.choice(lengths)) for _ in range(batch)]
        sequences[0] = (sequences[0][0], max(1, sequences[0][1]))
    longest_q, longest_k = (max(pair[side] for pair in sequences) for side in (0, 1))
    left = right = longest_q + longest_k
    mask = chance.choice(["full", "causal", "window"])
    if mask != "full":
        right = chance.choice([0, chance.randint(0, longest_q + 1)])
    if mask == "window":
        left = chance.randint(0, longest_k + 1)
    head_dim = chance.choice([8, 40, 64, 64, 72, 96, 104, 128, 128])
    section = chance.choice([1, 2, 3])
    blocks = chance.choice([1, 2, 3])
    lead = chance.choice([1, 1, 2])
    section_tiles = section * -(-longest_k // 128)
    lag = chance.choice([0, 3, *[section_tiles + blocks] * 4])
    with_nan = int(chance.random() < 0.3)
    numbers = [seed, head_dim, batch, heads_q, heads_k, left, right, int(mask == "window")]
    numbers += [blocks, section, lead, lag, with_nan, len(sequences)]
    return " ".join(map(str, [*numbers, *(rows for pair in sequences for rows in pair)]))


def verdicts(program: Path, seeds: range) -> list[str]:
    """What the program says of random calls."""
    calls = "\n".join(map(random_call, seeds))
    done = subprocess.run(
        [str(program)], input=calls, capture_output=True, text=True, check=False, timeout=300
    )
    lines = done.stdout.splitlines()
    return lines + [f"ends with {done.returncode}"] * (len(seeds) - len(lines))


@pytest.mark.parametrize("defines", [BOTH, BOTH[:1], BOTH[1:]], ids="+".join)
def test_sums_are_looked_after(compile_program: Compile, defines: tuple[str, ...]) -> None:
    program = compile_program(*defines)
    seeds = range(60 if defines == BOTH else 20)
    lines = verdicts(program, seeds)
    assert {
        random_call(seed): line
        for seed, line in zip(seeds, lines, strict=True)
        if not line.startswith("right")
    } == {}
    converted = sum(int(line.split()[1]) for line in lines)
    units = sum(int(line.split()[2]) for line in lines)
    # Calls of a few tiles leave most of it to the kernel after: enough that something is proved.
    assert (converted > units / 10) if "FA4_CONVERT_DQ_BEHIND" in defines else converted == 0


FAULTS = {
    "looks after sums where there are none": ("return params_.added != nullptr;", "return true;"),
    "does not wait for zeros": ("while (!all_have(zeroed)) {", "while (false) {"),
    "zeroes another tile's share": (
        "          zero(tile + params_.zero_lead);\n          take_share",
        "          zero(tile + params_.zero_lead + 1);\n          take_share",
    ),
    "tells of zeros too early": ("          ptx::bulk_wait_but_one();", "          //"),
    "does not make a group of zeros": ("    ptx::bulk_commit();\n", ""),
    "does not wait for its own additions": ("          ptx::bulk_wait();\n", ""),
    "converts before all is added": (
        "if (noted(kIsComplete) || all_have(params_.added + head_index(place))) {",
        "if (true) {",
    ),
    "reads a slice of the round before": ("slice / kRingSlices & 1", "1"),
    "overwrites a slice": ("load_slice(slice + kRingSlices);", "load_slice(slice + 1);"),
    "lets a NaN through": ("if (has_nan) note(kIsClean, false);", ""),
    "writes rows of another sequence": (
        "if (row < rows && column < params_.head_dim) {",
        "if (column < params_.head_dim) {",
    ),
    "writes columns of another head": (
        "if (row < rows && column < params_.head_dim) {",
        "if (row < rows) {",
    ),
    "takes columns for others": (
        "8 * (lane & 3);\n    NanWatch",
        "8 * (~lane & 3);\n    NanWatch",
    ),
    "begins before all have looked": ("__syncwarp();  // all have seen", "// all have seen"),
    "goes on before all have looked": ("__syncwarp();  // all have looked", ""),
    "leaves before its copies are there": (
        "while (noted(kSlice) != kNone) convert_slice();",
        "",
    ),
}


def test_faults_are_found(compile_program: Compile) -> None:
    def is_found(fault: str) -> bool:
        program = compile_program(*BOTH, change=FAULTS[fault])
        return any(
            not line.startswith("right")
            for first in range(0, 60, 10)
            for line in verdicts(program, range(first, first + 10))
        )

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(FAULTS, pool.map(is_found, FAULTS), strict=True))
    assert [fault for fault, is_found in found.items() if not is_found] == []
