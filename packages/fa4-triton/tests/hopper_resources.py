"""What the Hopper kernels cost and how ptxas orders them, read off their machine code.

Nothing here needs a GPU. Run as a program it compiles every variant of the table and writes their
costs into the kernel notebook; with `--json` it prints the records instead and changes nothing,
with `--few` it compiles what the tests do.
Triton must not be in interpreter mode.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fa4_triton.hopper import HopperTile, Mask, Situation, choose

NOTEBOOK = Path(__file__).parents[3] / "docs" / "kernels" / "fa4-triton.md"
BEGIN, END = "<!-- resources:begin -->", "<!-- resources:end -->"

OPERANDS = ("q", "k", "v", "out")

SHARED_LIMIT = 232448
"""Bytes of shared memory that a program may have on compute capability 9.0."""


@dataclass(frozen=True, slots=True)
class Case:
    """One variant of the forward."""

    tile: HopperTile
    mask: Mask
    varlen: bool
    tail: bool
    dtype: str  # Triton's name


@dataclass(frozen=True, slots=True)
class Loop:
    """One loop over blocks of keys, by its machine code.

    Attributes:
        order: What matters of it, in order: `PRODUCT` and `EXP` (runs of them are one), `WAIT n`
            until at most n groups of products are under way.
        local: Loads and stores of spilled registers.
        length: Instructions.
    """

    order: tuple[str, ...]
    local: int
    length: int


@dataclass(frozen=True, slots=True)
class Record:
    """What the compiler made of a case."""

    case: Case
    registers: int  # a thread, when the program starts
    spilled_bytes: int  # a thread, stored or loaded, whichever is more
    shared_bytes: int  # a program
    advisories: tuple[str, ...]  # ptxas's codes C7500 to C7599: matrix products serialised
    loops: tuple[Loop, ...]
    register_operands: int  # products whose left operand is in registers
    hazards: tuple[str, ...]  # instructions that overwrite such an operand under way


def cases() -> Iterator[Case]:
    """Every tile of the table; a full mask with a tail too, and in fp16; all of them packed."""
    masks: tuple[Mask, ...] = ("none", "causal", "window")
    for width, mask, varlen in product((64, 128, 256), masks, (False, True)):
        situation = Situation("hopper", "3.6.0", None, width, "bf16", mask, "forward", varlen)
        for _, tile in choose(situation).tiles:
            yield Case(tile, mask, varlen, varlen and mask == "none", "bf16")
            if mask == "none" and not varlen:
                yield Case(tile, mask, False, True, "fp16")


def few_cases() -> Iterator[Case]:
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
    """Compile one case.

    Raises:
        RuntimeError: It does not compile, or ptxas reports in a form that is not known here.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from fa4_triton.hopper_launch import LAYOUT, config_of
    from fa4_triton.kernels.hopper_forward import hopper_forward_kernel as kernel

    tile = case.tile
    rows = f"tensordesc<{case.dtype}[1, 1, 64, {tile.d}],{LAYOUT!r}>"
    keys = f"tensordesc<{case.dtype}[1, 1, {tile.n}, {tile.d}],{LAYOUT!r}>"
    types = {"q_desc": rows, "k_desc": keys, "v_desc": keys, "out_desc": rows, "lse": "*fp32"}
    types |= dict.fromkeys(OPERANDS, f"*{case.dtype}")
    types |= dict.fromkeys(("counter", "cu_seqlens_q", "cu_seqlens_k"), "*i32")
    types |= {"scale_log2": "fp32", "lse_of_empty": "fp32"}
    types |= {"config": "constexpr"}
    names = kernel.arg_names
    source = GluonASTSource(
        kernel,
        {name: types.get(name, "i32") for name in names},
        {(names.index("config"),): config_of(tile, case.mask, case.varlen, case.tail)},
        {(names.index(name),): [["tt.divisibility", 16]] for name in OPERANDS},
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
        report, code = _assemble(compiled.asm["ptx"], Path(folder))
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if registers is None or spills is None:
        raise RuntimeError(f"no registers or no spills in ptxas's report on {case}: {report!r}")
    in_registers, hazards = operand_hazards(code)
    return Record(
        case,
        registers=int(registers[1]),
        spilled_bytes=max(map(int, spills.groups())),
        shared_bytes=compiled.metadata.shared,
        advisories=tuple(sorted(set(re.findall(r"\bC75\d\d\b", report)))),
        loops=tuple(product_loops(code)),
        register_operands=in_registers,
        hazards=tuple(hazards),
    )


def _assemble(ptx: str, folder: Path) -> tuple[str, list[str]]:
    """(ptxas's report, lines of machine code)."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    source, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(ptx)
    made = subprocess.run(
        [tools / "ptxas", "-v", "--gpu-name=sm_90a", source, "-o", binary],
        capture_output=True,
        text=True,
        check=True,
    )
    listed = subprocess.run(
        [tools / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True
    )
    return made.stderr, listed.stdout.splitlines()


_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\S*\s+gsb0, 0x([0-9a-f]+)")


def product_loops(code: Sequence[str]) -> Iterator[Loop]:
    """The innermost loops that multiply by warp groups."""
    labels = {match[1]: line for line, text in enumerate(code) if (match := _LABEL.match(text))}
    spans = []
    for line, text in enumerate(code):
        match = _BRANCH.search(text)
        if match and labels.get(match[1], line) < line:
            span = range(labels[match[1]], line + 1)
            if any("HGMMA" in code[at] for at in span):
                spans.append(span)
    for span in spans:
        if any(
            span.start <= other.start and other.stop <= span.stop
            for other in spans
            if other is not span
        ):
            continue
        body = [code[at] for at in span]
        yield Loop(
            tuple(_order(body)),
            local=sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in body),
            length=sum(_INSTRUCTION.match(text) is not None for text in body),
        )


def _order(body: Iterable[str]) -> Iterator[str]:
    before = ""
    for text in body:
        wait = _WAIT.search(text)
        if wait:
            now = f"WAIT {int(wait[1], 16)}"
        elif "HGMMA" in text:
            now = "PRODUCT"
        elif "MUFU.EX2" in text:
            now = "EXP"
        elif "BAR.ARV" in text:
            now = "PASS"
        else:
            continue
        if now != before:
            yield now
        before = now


# Instructions whose first operand is no register that they write.
_WRITE_NONE = {
    *("ST", "STS", "STG", "STL", "STSM", "RED", "UTMALDG", "UTMASTG", "UTMAREDG"),
    *("BAR", "SYNCS", "DEPBAR", "MEMBAR", "FENCE", "WARPGROUP", "WARPSYNC", "USETMAXREG"),
    *("BRA", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "NOP", "NANOSLEEP"),
    *("ISETP", "FSETP", "PLOP3", "R2UR"),
}
_INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]+)\s+(.*?)\s*;")


def operand_hazards(code: Iterable[str]) -> tuple[int, list[str]]:
    """(matrix products with a left operand in registers, instructions that spoil one under way).

    A product reads its left operand after it was issued, until it is waited for. Versions of ptxas
    before 13.3 may give its registers to something else sooner. Looked at in the order of the
    code, branches aside: a wait for all retires every product, one that leaves some under way
    retires none here, since where groups begin cannot be seen. That finds too much, never too
    little.
    """
    under_way: set[int] = set()
    found, hazards = 0, []
    for text in code:
        wait = _WAIT.search(text)
        match = _INSTRUCTION.match(text)
        if wait:
            if int(wait[1], 16) == 0:
                under_way.clear()
        elif match is None:
            continue
        elif match[1].startswith("HGMMA"):
            operands = match[2].split(",")
            register = re.match(r"\s*R(\d+)\b", operands[1]) if len(operands) > 1 else None
            if register:
                found += 1
                under_way.update(range(int(register[1]), int(register[1]) + 4))
        elif match[1].split(".")[0] not in _WRITE_NONE and under_way & _written(
            match[1], match[2].split(",")[0].strip()
        ):
            hazards.append(text.strip())
    return found, hazards


def _written(name: str, target: str) -> set[int]:
    """Registers that an instruction writes, by its first operand and its width."""
    register = re.match(r"R(\d+)\b", target)
    if register is None:
        return set()
    width = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
    return set(range(int(register[1]), int(register[1]) + width))


def record_of(entry: dict[str, Any]) -> Record:
    """The record that `--json` printed as `entry`."""
    case = Case(**{**entry["case"], "tile": HopperTile(**entry["case"]["tile"])})
    loops = tuple(
        Loop(tuple(loop["order"]), loop["local"], loop["length"]) for loop in entry["loops"]
    )
    lists = {name: tuple(entry[name]) for name in ("advisories", "hazards")}
    return Record(**{**entry, **lists, "loops": loops, "case": case})


def compile_all(chosen: Iterable[Case]) -> list[Record]:
    """Compile cases in as many processes as there are cores."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return list(pool.map(compile_case, chosen))


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
            max(record.registers for record in found),
            max(record.spilled_bytes for record in found),
            max(record.shared_bytes for record in found),
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
    parser.add_argument("--few", action="store_true", help="compile half of the variants")
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
