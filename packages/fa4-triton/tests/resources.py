"""What every kernel costs on every architecture, as the compiler says: registers, spills, memory.

Run as a program it compiles the cases below and writes their tables into the kernel notebook; see
`compilation.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from compilation import NOTEBOOKS, SHARED_LIMITS, Report, Table, compiled, workers

from fa4_triton.plan import Device, Packed, Plan, Request, plan_key_gradients, plan_queries
from fa4_triton.tiles import Kernel, architecture, key_gradient_kernels

TABLE = Table(NOTEBOOKS / "fa4-triton-portable.md", "resources")

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
    report: Report
    shared_bytes: int  # a program
    products: tuple[str, ...]  # PTX's matrix-product instructions in use


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


tested_cases = cases
"""All of them."""


def compile_case(case: Case) -> Record:
    """Compile one case."""
    plan = case.plan()
    tile = plan.tile
    kernel, report = compiled(
        case, _source(case, plan), case.capability, num_warps=tile.warps, num_stages=tile.stages
    )
    instructions = re.findall(r"\b(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", kernel.asm["ptx"])
    return Record(
        case,
        (tile.m, tile.n, tile.warps, tile.stages),
        report,
        kernel.metadata.shared,
        tuple(sorted(set(instructions))),
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
    registers = max(record.report.registers for record in records)
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
        max(record.report.spilled_bytes for record in records),
        shared,
        min(by_registers, by_shared),
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    with workers() as pool:
        TABLE.write(render(pool.map(compile_case, cases())))
