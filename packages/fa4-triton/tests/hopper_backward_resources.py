"""What the Hopper backward's kernels cost and how ptxas orders them, read off their machine code.

Nothing here needs a GPU. Run as a program it compiles every Gluon kernel of the table and writes
their costs into the kernel notebook; with `--json` it prints the records instead and changes
nothing, with `--few` it compiles what the tests do. Triton must not be in interpreter mode.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import hopper_resources
from hopper_resources import NOTEBOOK, SHARED_LIMIT, Loop, product_loops

from fa4_triton.hopper_backward import (
    OPERANDS,
    BackwardKernel,
    KernelPlan,
    plan_hopper_backward,
    tile_of,
)
from fa4_triton.plan import Device, Request

__all__ = [
    "NOTEBOOK",
    "SHARED_LIMIT",
    "exponents",
    "few_cases",
    "group_hazards",
    "record_of",
    "render",
    "section",
]

BEGIN, END = "<!-- backward resources:begin -->", "<!-- backward resources:end -->"

GLUON: tuple[BackwardKernel, ...] = ("fused", "dkdv", "dq")

MASKS = ("full", "tail", "causal")


@dataclass(frozen=True, slots=True)
class Case:
    """One Gluon kernel as it is compiled."""

    kernel: BackwardKernel
    head_dim: int
    mask: str  # of MASKS; "tail": the last block of keys is not full
    dtype: str  # Triton's name


@dataclass(frozen=True, slots=True)
class Record:
    """What the compiler made of a case."""

    case: Case
    block: tuple[int, int]  # query rows and keys
    registers: int  # a thread, when the program starts
    spilled_bytes: int  # a thread, stored or loaded, whichever is more
    shared_bytes: int  # a program
    advisories: tuple[str, ...]  # ptxas's codes C7500 to C7599: matrix products serialised
    loops: tuple[Loop, ...]  # that multiply, over blocks and over tiles
    register_operands: int  # products whose left operand is in registers
    hazards: tuple[str, ...]  # instructions that overwrite such an operand under way
    exponents: tuple[int, int]  # places where P is made, and those of them that hide the unseen


def cases() -> Iterator[Case]:
    """Every kernel of the table and every mask, one of them in fp16."""
    for head_dim, mask in product((64, 128, 256), MASKS):
        for kernel in (name for name in GLUON if name in plan_of(head_dim, mask)):
            yield Case(kernel, head_dim, mask, "fp16" if mask == "tail" else "bf16")


def few_cases() -> Iterator[Case]:
    """Half of them: every kernel with a mask, and the fused ones without."""
    for case in cases():
        if case.mask == "causal" or (case.mask == "full" and case.kernel == "fused"):
            yield case


def plan_of(head_dim: int, mask: str) -> dict[BackwardKernel, KernelPlan]:
    """Plans of the kernels of a backward, by name."""
    keys = 999 if mask == "tail" else 1024
    shapes = (2, 1024, 4, head_dim), (2, keys, 2, head_dim)
    like_q, like_k = (
        (rows * heads * head_dim, heads * head_dim, head_dim, 1) for _, rows, heads, _ in shapes
    )
    request = Request(*shapes, mask == "causal", None, None, None)
    tile = tile_of(head_dim)
    if tile is None:
        raise ValueError(f"there is no tile for head_dim {head_dim}")
    plan = plan_hopper_backward(
        Device("hopper", 50 << 20, 132),
        request,
        (like_q, like_k, like_k, like_q, like_q, like_q, like_k, like_k),
        tile,
    )
    return {kernel.kernel: kernel for kernel in plan.kernels}


def compile_case(case: Case) -> Record:
    """Compile one case.

    Raises:
        RuntimeError: It does not compile, or ptxas reports in a form that is not known here.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from fa4_triton.hopper_backward_launch import KERNELS, backward_config_of, layout_of

    plan = plan_of(case.head_dim, case.mask)[case.kernel]
    kernel = KERNELS[case.kernel]
    names = list(kernel.arg_names)
    floats = ("negative_lse", "delta", "sums")
    types = []
    for view in plan.views:
        dtype = "fp32" if OPERANDS[view.operand] in floats else case.dtype
        types.append(f"tensordesc<{dtype}{list(view.block)},{layout_of(view)!r}>")
    for operand in plan.addresses:
        types.append("*i32" if OPERANDS[operand] == "counters" else "*fp32")
    types += ["fp32"] * plan.floats + ["i32"] * len(plan.ints) + ["constexpr"]
    constants = plan.constants[0]
    source = GluonASTSource(
        kernel,
        dict(zip(names, types, strict=True)),
        {(names.index("config"),): backward_config_of(constants)},
        {},
    )
    knobs.compilation.disable_line_info = True  # saves time and changes no instruction
    with tempfile.TemporaryDirectory() as folder:
        knobs.cache.dir = folder
        try:
            compiled = triton.compile(
                source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}
            )
        except Exception as error:
            raise RuntimeError(f"{case} does not compile: {error}") from error
        report, code = hopper_resources._assemble(compiled.asm["ptx"], Path(folder))
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if registers is None or spills is None:
        raise RuntimeError(f"no registers or no spills in ptxas's report on {case}: {report!r}")
    operands, hazards = group_hazards(code)
    return Record(
        case,
        block=(constants.tile.m, constants.tile.n),
        registers=int(registers[1]),
        spilled_bytes=max(map(int, spills.groups())),
        shared_bytes=compiled.metadata.shared,
        advisories=tuple(sorted(set(re.findall(r"\bC75\d\d\b", report)))),
        loops=tuple(product_loops(code)),
        register_operands=operands,
        hazards=tuple(hazards),
        exponents=exponents(compiled.asm["ttgir"]),
    )


_DEFINITION = re.compile(r"\s*(%\w+) = ([\w.]+) (%\w+)")
_RESHAPING = ("tt.reshape", "ttg.convert_layout")


def exponents(ttgir: str) -> tuple[int, int]:
    """(exponentials of tensors, those of an exponent that a mask was the last to touch)."""
    found, hidden = 0, 0
    made_by: dict[str, str] = {}
    for text in ttgir.splitlines():
        match = _DEFINITION.match(text)
        if match is None:
            continue
        name, operation, operand = match.groups()
        if operation in _RESHAPING:
            operation = made_by.get(operand, "")
        elif operation == "math.exp2" and "tensor" in text:
            found += 1
            hidden += made_by.get(operand) == "arith.select"
        made_by[name] = operation
    return found, hidden


def group_hazards(code: Iterable[str]) -> tuple[int, list[str]]:
    """(matrix products with a left operand in registers, instructions that spoil one under way).

    As `hopper_resources.operand_hazards`, but a wait that leaves groups under way retires the
    others: a group ends with a product that is marked gsb0. No product of these kernels is under
    way where a loop turns, so the order of the code will do.
    """
    groups: list[set[int]] = []
    last: set[int] = set()
    found, hazards = 0, []
    for text in code:
        wait = hopper_resources._WAIT.search(text)
        match = hopper_resources._INSTRUCTION.match(text)
        if wait:
            left = int(wait[1], 16)
            groups = groups[len(groups) - left :] if left else []
        elif match is None:
            continue
        elif match[1].startswith("HGMMA"):
            operands = match[2].split(",")
            register = re.match(r"\s*R(\d+)\b", operands[1]) if len(operands) > 1 else None
            if register:
                found += 1
                last.update(range(int(register[1]), int(register[1]) + 4))
            if "gsb0" in text:
                groups.append(last)
                last = set()
        elif match[1].split(".")[0] not in hopper_resources._WRITE_NONE and last.union(
            *groups
        ) & hopper_resources._written(match[1], match[2].split(",")[0].strip()):
            hazards.append(text.strip())
    return found, hazards


def record_of(entry: dict[str, Any]) -> Record:
    """The record that `--json` printed as `entry`."""
    loops = tuple(
        Loop(tuple(loop["order"]), loop["local"], loop["length"]) for loop in entry["loops"]
    )
    lists = {name: tuple(entry[name]) for name in ("advisories", "hazards", "block", "exponents")}
    return Record(**{**entry, **lists, "loops": loops, "case": Case(**entry["case"])})


def compile_all(chosen: Iterable[Case]) -> list[Record]:
    """Compile cases in as many processes as there are cores."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return list(pool.map(compile_case, chosen))


def render(records: Sequence[Record]) -> str:
    """The notebook's table in Markdown."""
    lines = [
        "| head dim up to | kernel | mask | rows x keys | registers | spilled | shared |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        case = record.case
        cells = (
            case.head_dim,
            case.kernel,
            case.mask,
            f"{record.block[0]} x {record.block[1]}",
            record.registers,
            record.spilled_bytes,
            record.shared_bytes,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def section(page: str) -> tuple[int, int]:
    """Where the generated part of the notebook begins and ends, the markers not included."""
    begin, end = page.find(BEGIN), page.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"{NOTEBOOK} must have the line {BEGIN} and after it the line {END}")
    return begin + len(BEGIN), end


def main() -> None:
    """Write the table into the notebook, or with `--json` the records to standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the records, change no file")
    parser.add_argument("--few", action="store_true", help="compile half of the kernels")
    given = parser.parse_args()
    records = compile_all(few_cases() if given.few else cases())
    if given.json:
        print(json.dumps([asdict(record) for record in records]))
        return
    page = NOTEBOOK.read_text(encoding="utf-8")
    begin, end = section(page)
    NOTEBOOK.write_text(f"{page[:begin]}\n{render(records)}\n{page[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
