"""What the Hopper kernels cost and how ptxas orders them, read off their machine code.

Run as a program it compiles every variant of the table and writes their costs into the kernel
notebook; see `compilation.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from compilation import NOTEBOOKS, MachineCode, Report, Table, compile_gluon, workers

from fa4_triton.hopper import HopperTile, Mask, Situation, choose

TABLE = Table(NOTEBOOKS / "fa4-triton.md", "resources")

OPERANDS = ("q", "k", "v", "out")


@dataclass(frozen=True, slots=True)
class Case:
    """One variant of the forward."""

    tile: HopperTile
    mask: Mask
    varlen: bool
    tail: bool
    dtype: str  # Triton's name


@dataclass(frozen=True, slots=True)
class Record:
    """What the compiler made of a case."""

    case: Case
    report: Report
    shared_bytes: int  # a program
    code: MachineCode


def cases() -> Iterator[Case]:
    """Every tile of the table; a full mask with a tail too, and in fp16; all of them packed."""
    masks: tuple[Mask, ...] = ("none", "causal", "window")
    for width, mask, varlen in product((64, 128, 256), masks, (False, True)):
        situation = Situation("hopper", "3.6.0", None, width, "bf16", mask, "forward", varlen)
        for _, tile in choose(situation).tiles:
            yield Case(tile, mask, varlen, varlen and mask == "none", "bf16")
            if mask == "none" and not varlen:
                yield Case(tile, mask, False, True, "fp16")


def tested_cases() -> Iterator[Case]:
    """Half of them: each tile, each mask, and packed sequences with and without one."""
    packed = {(64, "none"), (128, "causal")}
    for case in cases():
        if case.varlen:
            taken = (case.tile.d, case.mask) in packed
        elif case.mask == "window":
            taken = case.tile.d == 128
        else:
            taken = case.dtype == "bf16" or case.tile.d == 64
        if taken:
            yield case


def compile_case(case: Case) -> Record:
    """Compile one case."""
    from fa4_triton.hopper_launch import LAYOUT, config_of
    from fa4_triton.kernels.hopper_forward import hopper_forward_kernel as kernel

    tile = case.tile
    rows = f"tensordesc<{case.dtype}[1, 1, 64, {tile.d}],{LAYOUT!r}>"
    keys = f"tensordesc<{case.dtype}[1, 1, {tile.n}, {tile.d}],{LAYOUT!r}>"
    types = {"q_desc": rows, "k_desc": keys, "v_desc": keys, "out_desc": rows, "lse": "*fp32"}
    types |= dict.fromkeys(OPERANDS, f"*{case.dtype}")
    types |= dict.fromkeys(("counter", "cu_seqlens_q", "cu_seqlens_k"), "*i32")
    types |= {"scale_log2": "fp32", "lse_of_empty": "fp32"}
    compiled, report, code = compile_gluon(
        case,
        kernel,
        {name: types.get(name, "i32") for name in kernel.arg_names},
        config_of(tile, case.mask, case.varlen, case.tail),
        OPERANDS,
    )
    return Record(case, report, compiled.metadata.shared, code)


def render(records: Iterable[Record]) -> str:
    """The notebook's table in Markdown."""
    rows: dict[tuple[HopperTile, Mask, bool], list[Record]] = {}
    for record in records:
        case = record.case
        rows.setdefault((case.tile, case.mask, case.varlen), []).append(record)
    lines = [
        "| head dim up to | mask | rows x keys | stages | registers | spilled | shared |",
        "|---|---|---|---|---|---|---|",
    ]
    names: dict[Mask, str] = {"none": "full", "causal": "causal", "window": "window"}
    for (tile, mask, varlen), found in rows.items():
        cells = (
            tile.d,
            names[mask] + (", packed" if varlen else ""),
            f"{tile.m} x {tile.n}",
            tile.stages,
            max(record.report.registers for record in found),
            max(record.report.spilled_bytes for record in found),
            max(record.shared_bytes for record in found),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    with workers() as pool:
        TABLE.write(render(pool.map(compile_case, cases())))
