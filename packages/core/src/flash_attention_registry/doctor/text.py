"""The text of a diagnosis: one section for each question, the answer first."""

from __future__ import annotations

from flash_attention_registry.environment import IMPL
from flash_attention_registry.layout import one_line, plain, section, wrapped
from flash_attention_registry.report import format_reports

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from flash_attention_registry.doctor.findings import (
        AttentionRun,
        Diagnosis,
        Request,
        TypicalCall,
    )

__all__ = ["text_of_diagnosis"]

_STATES = {
    "nothing": "asks for nothing",
    "active": "asks for {names}: active",
    "native": "asks for {names}: torch's own kernels run",
    "pending": "asks for {names}: settled at the first attention call on a GPU",
    "failed": "asks for {names}: NOT active",
}


def text_of_diagnosis(diagnosis: Diagnosis) -> str:
    """Return the whole text, in ASCII and in lines as wide as the terminal."""
    return plain("\n\n".join(_sections(diagnosis)))


def _sections(diagnosis: Diagnosis) -> Iterator[str]:
    yield wrapped(diagnosis.summary)
    if diagnosis.problems:
        yield section("Problems", diagnosis.problems)
    yield section("Versions", _versions(diagnosis))
    yield section("Environment", _environment(diagnosis))
    reports = diagnosis.not_explained or format_reports(diagnosis.implementations)
    yield section("Implementations", reports.splitlines())
    if diagnosis.calls:
        title = f"Typical calls on {diagnosis.calls[0].device}, asked about and not made"
        yield section(title, map(_call, diagnosis.calls))
    if diagnosis.torch is not None:
        yield section("Calls of this process so far", _counts(diagnosis.counts))
    if diagnosis.run is not None:
        yield section("The call that was made", _run(diagnosis.run))
    traps = [f"{trap.found}\n  {trap.remedy}" for trap in diagnosis.traps]
    yield section("Traps", traps or ["none found"])
    yield section("Always so", diagnosis.hints)


def _versions(diagnosis: Diagnosis) -> Iterator[str]:
    yield f"Python {diagnosis.python}"
    for name, version in diagnosis.packages.items():
        yield f"{name} {version or '(no such distribution is installed)'}"
    torch = diagnosis.torch
    if torch is None:
        yield f"{diagnosis.torch_problem}"
        return
    yield f"torch says: {torch.version}, CUDA {torch.cuda or 'none'}, cuDNN {torch.cudnn or 'none'}"
    yield f"NVIDIA driver: {torch.driver or 'unknown'}"
    for gpu in torch.gpus:
        yield f"GPU {gpu.index}: {gpu.name}, compute capability {gpu.compute_capability}"
    if not torch.gpus:
        yield "torch sees no GPU"


def _environment(diagnosis: Diagnosis) -> Iterator[str]:
    for variable in diagnosis.environment:
        if variable.value is None:
            yield f"{variable.name} is not set"
        else:
            yield f"{variable.name}={variable.value}: {variable.meaning or variable.problem}"
    yield from _request(diagnosis.request)


def _request(request: Request) -> Iterator[str]:
    if request.names:
        yield f"{IMPL} {_STATES[request.state].format(names=', then '.join(request.names))}"
        yield from (f"  {name}: {one_line(why)}" for name, why in request.reasons.items())


def _call(call: TypicalCall) -> str:
    backend = "torch does not say which backend it chooses"
    if call.backend is not None:
        backend = f"torch chooses {call.backend}"
    kernel = "which kernel runs cannot be told" if call.kernel is None else f"{call.kernel} runs it"
    return f"{call.call}: {backend}; {kernel}{'' if call.reason is None else f' ({call.reason})'}"


def _counts(counts: dict[str, dict[str, Any]]) -> Iterator[str]:
    for op, count in counts.items():
        yield f"{op}: {count['served']} served, {sum(count['declined'].values())} on stock"
        yield from (f"  {number} on stock: {why}" for why, number in count["declined"].items())
    if not counts:
        yield "none was counted"


def _run(run: AttentionRun) -> Iterator[str]:
    if run.device is None:
        yield f"it was not made: {run.reason}"
        return
    yield f"scaled_dot_product_attention, bfloat16, causal, forward and backward, on {run.device}"
    yield f"active meanwhile: {run.active or 'nothing'}"
    yield from _counts(run.counts)
    verdict = [{True: "served", False: "NOT served", None: None}[run.served], run.reason]
    yield ": ".join(filter(None, verdict))
