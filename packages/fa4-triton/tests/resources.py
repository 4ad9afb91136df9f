"""What every kernel costs on every architecture, as the compiler says: registers, spills, memory.

Nothing here needs a GPU: Triton compiles ahead of time for any compute capability. Run as a program
it compiles the cases below and writes their tables into the kernel notebook; with `--json` it
prints the records instead and changes nothing. Triton must not be in interpreter mode.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fa4_triton.plan import Device, Packed, Plan, Request, plan_key_gradients, plan_queries
from fa4_triton.tiles import Kernel, architecture, key_gradient_kernels

NOTEBOOK = Path(__file__).parents[3] / "docs" / "kernels" / "fa4-triton-portable.md"
BEGIN, END = "<!-- resources:begin -->", "<!-- resources:end -->"

# Bytes of shared memory a program may have; CUDA C++ Programming Guide, "Technical Specifications
# per Compute Capability". A capability is written as one number, 90 for 9.0.
SHARED_LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
HEAD_DIMS = (64, 80, 96, 128, 192, 256)


@dataclass(frozen=True, slots=True)
class Case:
    """One variant of one kernel on one architecture."""

    capability: int
    kernel: Kernel
    head_dim: int
    causal: bool = True
    window: bool = False
    varlen: bool = False
    gqa: bool = False
    dtype: str = "bf16"  # Triton's name

    @property
    def mask(self) -> str:
        """The mask's name."""
        return "window" if self.window else "causal" if self.causal else "none"

    def plan(self) -> Plan:
        """How a call of this kind is launched."""
        heads, heads_kv = 4, 1 if self.gqa else 4
        rows = (4096,) if self.varlen else (2, 2048)
        request = Request(
            query_shape=(*rows, heads, self.head_dim),
            key_shape=(*rows, heads_kv, self.head_dim),
            causal=self.causal,
            window_left=512 if self.window else None,
            window_right=256 if self.window else None,
            packed=Packed(2, 2048, 2048) if self.varlen else None,
        )
        # Any strides that are multiples of 8 elements: only that they are matters to a kernel.
        strides = (heads * self.head_dim, self.head_dim, 1)
        strides = strides if self.varlen else (2048 * strides[0], *strides)
        plan = plan_queries if self.kernel in ("forward", "dq") else plan_key_gradients
        return plan(
            self.kernel,
            Device(architecture(divmod(self.capability, 10)), l2_bytes=1 << 25, multiprocessors=1),
            request,
            (strides,) * (4 if self.kernel == "forward" else 6),
            alignment=-1,
        )


@dataclass(frozen=True, slots=True)
class Record:
    """What the compiler says of a case."""

    case: Case
    tile: tuple[int, int, int, int]  # rows, keys, warps, stages
    registers: int  # a thread
    spilled_bytes: int  # a thread, stored or loaded, whichever is more
    shared_bytes: int  # a program
    products: tuple[str, ...]  # PTX's matrix-product instructions in use
    advisories: tuple[str, ...]  # ptxas's codes C7500 to C7599: matrix products serialised


def cases() -> Iterator[Case]:
    """Every architecture, head dim and kernel, causal; without a mask and with all else at some.

    A causal variant has all the loops of a plain one. 8.9 compiles as 8.6 does, so its few extra
    cases are left out.
    """
    for capability, head_dim in product(SHARED_LIMITS, HEAD_DIMS):
        gradients = key_gradient_kernels(architecture(divmod(capability, 10)), head_dim)
        for kernel in ("forward", "dq", *gradients):
            yield Case(capability, kernel, head_dim)
            if head_dim in (128, 256) and capability != 89:
                yield Case(capability, kernel, head_dim, causal=False)
            if head_dim in (96, 128) and capability != 89:
                yield Case(capability, kernel, head_dim, False, True, True, True, "fp16")


def compile_case(case: Case) -> Record:
    """Compile one case. Output of the compiler goes to this process's standard output if it fails.

    Raises:
        RuntimeError: It does not compile, or ptxas reports in a form that is not known here.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    plan = case.plan()
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(log):
        knobs.cache.dir = cache  # what comes out of a cache has no log
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.disable_line_info = True  # saves time and changes no instruction
        try:
            compiled = triton.compile(
                _source(case, plan),
                target=GPUTarget("cuda", case.capability, 32),
                options={"num_warps": plan.tile.warps, "num_stages": plan.tile.stages},
            )
        except Exception as error:
            raise RuntimeError(f"{case} does not compile: {error}") from error
    report = log.getvalue()
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if registers is None or spills is None:
        raise RuntimeError(f"no registers or no spills in ptxas's report on {case}: {report!r}")
    instructions = re.findall(
        r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", compiled.asm["ptx"]
    )
    return Record(
        case,
        (plan.tile.m, plan.tile.n, plan.tile.warps, plan.tile.stages),
        registers=int(registers[1]),
        spilled_bytes=max(map(int, spills.groups())),
        shared_bytes=compiled.metadata.shared,
        products=tuple(sorted(set(instructions))),
        advisories=tuple(sorted(set(re.findall(r"\bC75\d\d\b", report)))),
    )


def _source(case: Case, plan: Plan) -> Any:
    """The case as Triton's compiler takes it: what the launch of such a call would find out."""
    from triton.compiler import ASTSource

    from fa4_triton.kernels.backward import dkdv_kernel, dq_kernel
    from fa4_triton.kernels.forward import forward_kernel
    from fa4_triton.launch import constant_arguments

    kernel = {"forward": forward_kernel, "dq": dq_kernel}.get(case.kernel, dkdv_kernel)
    constants = iter(constant_arguments(kernel, plan.tile, plan.constants))
    types: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            types[name], values[index,] = "constexpr", next(constants)
        elif parameter.annotation_type:
            types[name] = parameter.annotation_type
        elif not parameter.do_not_specialize:  # an operand, aligned
            types[name], attributes[index,] = f"*{case.dtype}", [["tt.divisibility", 16]]
        elif not name.startswith("cu_seqlens"):  # lse, delta
            types[name] = "*fp32"
        elif case.varlen:
            types[name] = "*i32"
        else:
            types[name], values[index,] = "constexpr", None
    return ASTSource(kernel, types, values, attributes)


def record_of(entry: dict[str, Any]) -> Record:
    """The record that `--json` printed as `entry`."""
    lists = {name: tuple(entry[name]) for name in ("tile", "products", "advisories")}
    return Record(**{**entry, **lists, "case": Case(**entry["case"])})


def compile_all(chosen: Iterable[Case]) -> list[Record]:
    """Compile cases in as many processes as there are cores."""
    # Spawned, not forked: a process that has compiled holds LLVM's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return list(pool.map(compile_case, chosen, chunksize=4))


def render(records: Iterable[Record]) -> str:
    """The notebook's tables in Markdown, one a kernel; a row is an architecture and a head dim."""
    rows: dict[Kernel, dict[tuple[int, int], list[Record]]] = {}
    for record in records:
        case = record.case
        rows.setdefault(case.kernel, {}).setdefault((case.capability, case.head_dim), []).append(
            record
        )
    return "\n\n".join(
        f"### `{kernel}`\n\n{HEADER}\n" + "\n".join(_row(*at, found) for at, found in table.items())
        for kernel, table in rows.items()
    )


HEADER = """\
| architecture | head dim | rows x keys | warps | stages | registers | spilled | shared | an SM |
|---|---|---|---|---|---|---|---|---|"""


def _row(capability: int, head_dim: int, records: list[Record]) -> str:
    """One line of a table: the most that any variant takes."""
    rows, keys, warps, stages = records[0].tile
    registers = max(record.registers for record in records)
    shared = max(record.shared_bytes for record in records)
    # An SM has 65536 registers, which warps get in units of 256, and a kibibyte more shared memory
    # than a program may have; each program costs a kibibyte beside what it asks for.
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = (SHARED_LIMITS[capability] + 1024) // (shared + 1024)
    cells = (
        f"{capability // 10}.{capability % 10}",
        head_dim,
        f"{rows} x {keys}",
        warps,
        stages,
        registers,
        max(record.spilled_bytes for record in records),
        shared,
        min(by_registers, by_shared),
    )
    return f"| {' | '.join(map(str, cells))} |"


def section(page: str) -> tuple[int, int]:
    """Where the generated part of the notebook begins and ends, the markers not included."""
    begin, end = page.find(BEGIN), page.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"{NOTEBOOK} must have the line {BEGIN} and after it the line {END}")
    return begin + len(BEGIN), end


def main() -> None:
    """Write the tables into the notebook, or with `--json` the records to standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the records, change no file")
    as_json = parser.parse_args().json
    records = compile_all(cases())
    if as_json:
        print(json.dumps([asdict(record) for record in records]))
        return
    page = NOTEBOOK.read_text(encoding="utf-8")
    begin, end = section(page)
    NOTEBOOK.write_text(f"{page[:begin]}\n{render(records)}\n{page[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
