"""What the Hopper backward's kernels cost and how ptxas orders them, read off their machine code.

Run as a program it compiles every Gluon kernel of the table and writes their costs into the kernel
notebook; see `compilation.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from compilation import NOTEBOOKS, MachineCode, Report, Table, compile_gluon, workers

from fa4_triton.hopper_backward import (
    OPERANDS,
    BackwardKernel,
    KernelPlan,
    plan_hopper_backward,
    tile_of,
)
from fa4_triton.plan import Device, Request

TABLE = Table(NOTEBOOKS / "fa4-triton.md", "backward resources")

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
    report: Report
    shared_bytes: int  # a program
    code: MachineCode
    exponents: tuple[int, int]  # places where P is made, and those of them that hide the unseen


def cases() -> Iterator[Case]:
    """Every kernel of the table and every mask, one of them in fp16."""
    for head_dim, mask in product((64, 128, 256), MASKS):
        for kernel in (name for name in GLUON if name in plan_of(head_dim, mask)):
            yield Case(kernel, head_dim, mask, "fp16" if mask == "tail" else "bf16")


def tested_cases() -> Iterator[Case]:
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
    """Compile one case."""
    from fa4_triton.hopper_backward_launch import KERNELS, backward_config_of, layout_of

    plan = plan_of(case.head_dim, case.mask)[case.kernel]
    kernel = KERNELS[case.kernel]
    floats = ("negative_lse", "delta", "sums")
    types = []
    for view in plan.views:
        dtype = "fp32" if OPERANDS[view.operand] in floats else case.dtype
        types.append(f"tensordesc<{dtype}{list(view.block)},{layout_of(view)!r}>")
    for operand in plan.addresses:
        types.append("*i32" if OPERANDS[operand] == "counters" else "*fp32")
    types += ["fp32"] * plan.floats + ["i32"] * len(plan.ints)
    constants = plan.constants[0]
    compiled, report, code = compile_gluon(
        case,
        kernel,
        dict(zip(kernel.arg_names[:-1], types, strict=True)),
        backward_config_of(constants),
    )
    return Record(
        case,
        (constants.tile.m, constants.tile.n),
        report,
        compiled.metadata.shared,
        code,
        exponents(compiled.asm["ttgir"]),
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


def render(records: Iterable[Record]) -> str:
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
            record.report.registers,
            record.report.spilled_bytes,
            record.shared_bytes,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with workers() as pool:
        TABLE.write(render(pool.map(compile_case, cases())))
