"""Compiling ahead of time for any compute capability, and what the compiler says of it.

Serves `resources.py`, `hopper_resources.py` and `hopper_backward_resources.py`. Nothing here needs
a GPU. `python compilation.py FOLDER NAME ...` compiles what the tests look at of each of these
modules and leaves its records in `FOLDER/NAME.pickle`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[3] / "docs" / "kernels"

# Bytes of shared memory a program may have; CUDA C++ Programming Guide, "Technical Specifications
# per Compute Capability". A capability is written as one number, 90 for 9.0.
SHARED_LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

NICENESS = 10
"""Tests run meanwhile, and whatever they time goes first."""


@dataclass(frozen=True, slots=True)
class Report:
    """What ptxas says of a kernel."""

    registers: int  # a thread, when the program starts
    spilled_bytes: int  # a thread, stored or loaded, whichever is more
    advisories: tuple[str, ...]  # codes C7500 to C7599: matrix products serialised


def compiled(case: Any, source: Any, capability: int, **options: int) -> tuple[Any, Report]:
    """Triton's `CompiledKernel` of `source`, and ptxas's report. `case` is for messages.

    Raises:
        RuntimeError: It does not compile, or ptxas reports in a form that is not known here.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    log = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(log):
        knobs.cache.dir = cache  # what comes out of a cache has no log
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.disable_line_info = True  # saves time and changes no instruction
        try:
            kernel = triton.compile(
                source, target=GPUTarget("cuda", capability, 32), options=options
            )
        except Exception as error:
            raise RuntimeError(f"{case} does not compile: {error}\n{log.getvalue()}") from error
    text = log.getvalue()
    registers = re.search(r"Used (\d+) registers", text)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    if registers is None or spills is None:
        raise RuntimeError(f"no registers or no spills in ptxas's report on {case}: {text!r}")
    advisories = tuple(sorted(set(re.findall(r"\bC75\d\d\b", text))))
    return kernel, Report(int(registers[1]), max(map(int, spills.groups())), advisories)


@dataclass(frozen=True, slots=True)
class Loop:
    """One loop over blocks, by its machine code.

    Attributes:
        order: What matters of it, in order: `PRODUCT` and `EXP` (runs of them are one), `WAIT n`
            until at most n groups of products are under way, `PASS` of a turn.
        local: Loads and stores of spilled registers.
        length: Instructions.
    """

    order: tuple[str, ...]
    local: int
    length: int


@dataclass(frozen=True, slots=True)
class MachineCode:
    """What matters of a Gluon kernel's machine code."""

    loops: tuple[Loop, ...]  # that multiply
    register_operands: int  # products whose left operand is in registers
    hazards: tuple[str, ...]  # instructions that overwrite such an operand under way


def compile_gluon(
    case: Any, kernel: Any, types: dict[str, str], config: Any, aligned: Iterable[str] = ()
) -> tuple[Any, Report, MachineCode]:
    """(Triton's `CompiledKernel` of a Gluon kernel for Hopper, ptxas's report, its machine code).

    Args:
        case: For messages.
        kernel: Which; its last argument is `config`.
        types: Triton's, of its other arguments, in its order.
        config: What it is compiled for.
        aligned: Addresses that are multiples of 16.
    """
    import triton
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    source = GluonASTSource(
        kernel,
        {**types, "config": "constexpr"},
        {(names.index("config"),): config},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    made, report = compiled(case, source, 90, num_warps=4)
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        listed = subprocess.run(
            [disassembler, "-c", binary], capture_output=True, text=True, check=True
        )
    code = listed.stdout.splitlines()
    operands, hazards = operand_hazards(code)
    return made, report, MachineCode(tuple(product_loops(code)), operands, tuple(hazards))


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
    before 13.3 may give its registers to something else sooner. A group of products ends with one
    that is marked gsb0; a wait that leaves groups under way retires the others. No product of these
    kernels is under way where a loop turns, so the order of the code will do, branches aside.
    """
    groups: list[set[int]] = []
    last: set[int] = set()
    found, hazards = 0, []
    for text in code:
        wait = _WAIT.search(text)
        match = _INSTRUCTION.match(text)
        if wait:
            left = int(wait[1], 16)
            groups = groups[max(0, len(groups) - left) :]
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
        elif match[1].split(".")[0] not in _WRITE_NONE and last.union(*groups) & _written(
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


@dataclass(frozen=True, slots=True)
class Table:
    """A generated part of a kernel notebook.

    Attributes:
        notebook: Which.
        name: Of the markers around that part.
    """

    notebook: Path
    name: str

    def section(self, page: str) -> slice:
        """Where that part is in the notebook's text, the markers not included."""
        begin, end = (f"<!-- {self.name}:{side} -->" for side in ("begin", "end"))
        found = slice(page.find(begin) + len(begin), page.find(end))
        if not len(begin) <= found.start <= found.stop:
            raise ValueError(f"{self.notebook} must have the line {begin} and after it {end}")
        return found

    def told(self) -> str:
        """What the notebook says."""
        page = self.notebook.read_text(encoding="utf-8")
        return page[self.section(page)].strip()

    def write(self, text: str) -> None:
        """Say it anew."""
        page = self.notebook.read_text(encoding="utf-8")
        part = self.section(page)
        whole = f"{page[: part.start]}\n{text}\n{page[part.stop :]}"
        self.notebook.write_text(whole, encoding="utf-8")


class Compilation:
    """Kernels that are compiled while the tests before theirs run.

    In a process of its own, and not only for that: Triton cannot compile where it interprets.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Begin with what the tests look at of modules."""
        self._folder = tempfile.TemporaryDirectory()
        self._errors = Path(self._folder.name) / "errors"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__, self._folder.name, *names],
                env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    def records(self, name: str) -> list[Any]:
        """Of one of these modules, as soon as they are there.

        Raises:
            RuntimeError: Something did not compile.
        """
        path = Path(self._folder.name) / f"{name}.pickle"
        while not path.exists():
            if self._process.poll() is not None and not path.exists():
                raise RuntimeError(f"not compiled: {self._errors.read_text()[-4000:]}")
            time.sleep(0.1)
        found: list[Any] = pickle.loads(path.read_bytes())
        return found

    def stop(self) -> None:
        """End it, with the processes that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait()
        self._folder.cleanup()


def workers() -> ProcessPoolExecutor:
    """As many processes as there are cores, behind whatever else runs."""
    # Spawned, not forked: a process that has compiled holds LLVM's threads.
    return ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn"),
        initializer=os.nice,
        initargs=(NICENESS,),
    )


def main() -> None:
    """Compile what the tests look at; see above."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    modules = [importlib.import_module(name) for name in names]
    with workers() as pool:
        found = [pool.map(module.compile_case, module.tested_cases()) for module in modules]
        for name, records in zip(names, found, strict=True):
            unfinished = folder / name
            unfinished.write_bytes(pickle.dumps(list(records)))
            unfinished.rename(folder / f"{name}.pickle")


if __name__ == "__main__":
    main()
