"""The sums of dQ begin with zero, whoever zeroes them.

`backward_zeros.cuh` itself, by the host compiler, under random schedules (zeros_ahead.cpp).
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "src/fa4_cuda/csrc"
PROGRAM = Path(__file__).with_name("zeros_ahead.cpp")
PTX = Path(__file__).with_name("zeros_ahead_ptx.h")
HEADERS = (
    *("backward_params.h", "backward_tiles.h", "backward_work.cuh", "backward_zeros.cuh"),
    *("element.h", "forward_params.h", "tiles.h"),
)

Compile = Callable[..., Path]


@pytest.fixture(scope="module")
def compile_program(
    compile_host: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Compile:
    """Compile the program, with a change of what it proves if one is given."""

    def compiled(change: tuple[str, str] | None = None) -> Path:
        folder = tmp_path_factory.mktemp("zeros")
        for name in HEADERS:
            text = (CSRC / name).read_text()
            if change is not None and name == "backward_zeros.cuh":
                assert text.count(change[0]) == 1, change[0]
                text = text.replace(*change)
            (folder / name).write_text(text)
        (folder / "ptx.cuh").write_text(PTX.read_text())
        return compile_host(PROGRAM, folder, "-O1")

    return compiled


def random_call(seed: int) -> str:
    """A line of the program's input."""
    chance = random.Random(seed)
    heads_k = chance.choice([1, 3, 6])
    heads_q = heads_k * chance.choice([1, 1, 2])
    batch = chance.choice([1, 2, 4])
    sequences = [(chance.randint(1, 300), chance.randint(1, 700))]
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
    numbers = [seed, head_dim, batch, heads_q, heads_k, left, right, int(mask == "window")]
    numbers += [blocks, section, lead, len(sequences)]
    return " ".join(map(str, [*numbers, *(rows for pair in sequences for rows in pair)]))


def verdicts(program: Path, seeds: range) -> list[str]:
    """What the program says of random calls."""
    calls = "\n".join(map(random_call, seeds))
    done = subprocess.run(
        [str(program)], input=calls, capture_output=True, text=True, check=False, timeout=300
    )
    lines = done.stdout.splitlines()
    return lines + [f"ends with {done.returncode}"] * (len(seeds) - len(lines))


def test_sums_begin_with_zero(compile_program: Compile) -> None:
    seeds = range(100)
    lines = verdicts(compile_program(), seeds)
    assert {
        random_call(seed): line
        for seed, line in zip(seeds, lines, strict=True)
        if not line.startswith("right")
    } == {}
    ahead = sum(int(line.split()[1]) for line in lines)
    heads = sum(int(line.split()[2]) for line in lines)
    # The first heads are zeroed before: enough of the others that something is proved.
    assert ahead > heads / 3


FAULTS = {
    "does not wait for zeros": ("ptx::load_acquire(zeroed)", "(2 * params.n_blocks)"),
    "waits for half of them": ("kZeroingWarps * params.n_blocks)", "params.n_blocks)"),
    "waits for another head's": (
        "TilePlace(params, tile, params.heads_k).flat_head",
        "TilePlace(params, 0, params.heads_k).flat_head",
    ),
    "zeroes another tile's share": (
        "const int later = tile + params.zero_lead;",
        "const int later = tile + params.zero_lead + 1;",
    ),
    "leaves units to nobody": ("(warp ^ (tile & 1))", "(tile & 1)"),
    "takes one head of the group for all": (
        "      sums += params.workspace_rows * kTile.head_dim;\n",
        "",
    ),
    "zeroes a part of a unit": ("byte < kUnitBytes;", "byte < 4096;"),
    "zeroes behind the last unit": ("min(units, (place", "min(units + 1, (place"),
    "tells of zeros too early": ("    ptx::bulk_wait();\n", ""),
    "does not make a group of zeros": ("    ptx::bulk_commit();\n", ""),
    "waits for one warp's zeros only": ("if (begin < end)", "if (warp == 0)"),
    "tells its threads but not the copy engine": ("  ptx::fence_proxy_async_global();\n", ""),
}


def test_faults_are_found(compile_program: Compile) -> None:
    def is_found(fault: str) -> bool:
        program = compile_program(FAULTS[fault])
        return any(
            not line.startswith("right")
            for first in range(0, 100, 20)
            for line in verdicts(program, range(first, first + 20))
        )

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(FAULTS, pool.map(is_found, FAULTS), strict=True))
    assert [fault for fault, is_found in found.items() if not is_found] == []
