"""Are the kernels really used? What `flash-attention doctor` asks of this process, and concludes.

`diagnose()` may be called in any program too, in the middle of a training for instance: it then
tells what is active there and which calls were counted there. This module needs no torch; what must
be asked of torch is in `flash_attention_registry.sdpa.diagnosis`.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version

from flash_attention_registry.default import (
    current_flash_attention_impl,
    default_registry,
    explain_flash_attention_impls,
)
from flash_attention_registry.doctor.asked import environment_traps, parsed_variables, request_of
from flash_attention_registry.doctor.findings import AttentionRun, Diagnosis, Request
from flash_attention_registry.environment import IMPL, STRICT
from flash_attention_registry.errors import (
    FlashAttentionRegistryError,
    describe,
    text_of,
)
from flash_attention_registry.layout import one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from flash_attention_registry.doctor.findings import TypicalCall
    from flash_attention_registry.report import ImplReport

__all__ = ["HINTS", "Diagnosis", "TorchImport", "diagnose", "import_torch"]

HINTS = (
    "Dropout above 0 in training is never served; torch.nn.TransformerEncoderLayer has 0.1 unless "
    "told otherwise. Set it to 0.",
    "Attention masks and float32 keep calls on a GPU from flash kernels. Say is_causal=True in "
    "place of a causal mask, and use bfloat16 or float16.",
    "What AOTInductor has compiled calls torch's own kernels past the dispatcher, and is never "
    "served.",
)
"""What holds in every process, and is easily overlooked."""


@dataclass(frozen=True, slots=True)
class TorchImport:
    """What came of importing torch.

    Attributes:
        problem: Why torch cannot be used, or None.
        missing: Whether it is not installed at all.
        refusal: The error of this package that ended the import, in a strict environment, or None.
    """

    problem: str | None = None
    missing: bool = False
    refusal: FlashAttentionRegistryError | None = None

    def why_not_again(self) -> str | None:
        """Return why nobody may be asked who would import torch again, or None.

        What torch has registered in C++ stays so when its import fails, and is refused by a second.
        """
        failed_late = "torch._C" in sys.modules and not self.missing
        if self.refusal is None and (self.problem is None or not failed_late):
            return None
        remedy = "Repair that" if self.refusal is None else f"Unset {STRICT}"
        return (
            f"torch cannot be imported a second time, which their checks would do. {remedy} to see "
            f"them."
        )


def diagnose(run: str | bool = False) -> Diagnosis:
    """Find out whether kernels are really used in this process, and if not, why.

    Imports torch and every installed provider, and initialises CUDA where there is a GPU. What
    `FLASH_ATTENTION_IMPL` asks for is settled, if it still waits for the first call on a GPU.
    Nothing else is changed, and no attention is computed unless `run` says so.

    Args:
        run: True makes one small call of `scaled_dot_product_attention`, forward and backward,
            under what is active; a name makes it under that implementation or family.

    Returns:
        What was found. Whatever goes wrong is in it and is not raised.
    """
    imported = import_torch()
    torch_side, problem = _torch_side() if imported.problem is None else (None, imported.problem)
    counts = {} if torch_side is None else torch_side.counts()
    variables = parsed_variables()
    refusal = imported.refusal or _settle()
    reports, not_explained = _reports(imported)
    request = request_of(reports, problem, refusal)
    traps = environment_traps(reports, request)
    calls: tuple[TypicalCall, ...] = ()
    call_run = None
    if torch_side is not None:
        traps += torch_side.traps()
        calls = torch_side.typical_calls()
        if run is not False:
            call_run = torch_side.run_once(None if run is True else run)
    elif run is not False:
        call_run = AttentionRun(None if run is True else run, None, None, False, {}, problem)
    problems = [variable.problem for variable in variables]
    if imported.refusal is None:
        problems += [None if imported.missing else problem]
    if imported.why_not_again() is None:
        problems += [not_explained]
    problems += [_problem_of_request(request), _problem_of_run(call_run)]
    return Diagnosis(
        summary=_summary(request, calls, call_run, problem),
        problems=tuple(dict.fromkeys(text for text in problems if text is not None)),
        python=f"{platform.python_version()} on {platform.platform()}",
        packages=_packages(),
        torch=None if torch_side is None else torch_side.torch_facts(),
        torch_problem=problem,
        environment=variables,
        request=request,
        active=current_flash_attention_impl(),
        implementations=reports,
        not_explained=not_explained,
        counts=counts,
        calls=calls,
        traps=traps,
        hints=HINTS,
        run=call_run,
    )


def import_torch() -> TorchImport:
    """Import torch, which also honours `FLASH_ATTENTION_IMPL` where a provider is installed."""
    try:
        import_module("torch")
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            return TorchImport("torch is not installed", missing=True)
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        own = next((one for one in chain if isinstance(one, FlashAttentionRegistryError)), None)
        if own is not None:
            return TorchImport(
                f"{type(own).__name__} ended the import of torch, because {STRICT} is set",
                refusal=own,
            )
        told = " because of ".join(describe(one) for one in chain)
        return TorchImport(f"torch cannot be imported: {told}")
    return TorchImport()


def _torch_side() -> tuple[ModuleType | None, str | None]:
    """Import what asks torch; return it, or why that cannot be done."""
    try:
        from flash_attention_registry.sdpa import diagnosis
    except Exception as error:
        return None, (
            f"flash_attention_registry.sdpa cannot be imported with this torch, which must be 2.11 "
            f"or newer: {describe(error)}"
        )
    return diagnosis, None


def _settle() -> Exception | None:
    """Settle what waits for the first call on a GPU; return the error of a strict environment."""
    request = default_registry().request
    if request.pending:
        try:
            request.settle()
        except Exception as error:
            return error
    return None


def _reports(imported: TorchImport) -> tuple[tuple[ImplReport, ...], str | None]:
    """Return the reports, or none and why."""
    not_again = imported.why_not_again()
    if not_again is not None:
        return (), not_again
    try:
        return explain_flash_attention_impls(), None
    except FlashAttentionRegistryError as error:
        return (), text_of(error)


def _problem_of_request(request: Request) -> str | None:
    if request.state != "failed" or not request.names:
        return None  # a value that cannot be understood is a problem of its variable
    reasons = "".join(f"\n  {name}: {one_line(why)}" for name, why in request.reasons.items())
    return f"{IMPL}={','.join(request.names)} asks for what is not active:{reasons}"


def _problem_of_run(run: AttentionRun | None) -> str | None:
    if run is None or run.served is not False:
        return None
    return f"The call{_under(run)} was not served: {run.reason}"


def _under(run: AttentionRun) -> str:
    name = run.asked or run.active
    return "" if name is None else f" under {name}"


def _summary(
    request: Request,
    calls: Sequence[TypicalCall],
    run: AttentionRun | None,
    problem: str | None,
) -> str:
    """Return the answer: what runs, and who served the call that was made."""
    # Kernels can be installed past the registry too; then the calls name them.
    served = [call.kernel for call in calls if call.kernel not in (None, "stock")]
    active = current_flash_attention_impl() or next(iter(served), None)
    if problem is not None:
        said = f"No kernels can be used: {problem}."
    elif active is not None:
        said = f"{active} is active and would run {len(served)} of {len(calls)} typical calls."
    elif request.state == "failed":
        said = f"Torch's own kernels run: what {IMPL} asks for is not active."
    elif request.state == "pending":
        said = f"Torch's own kernels run, until {IMPL} is settled at the first call on a GPU."
    elif request.state == "native":
        said = f"Torch's own kernels run, as {IMPL} allows."
    else:
        said = "Torch's own kernels run: no implementation is active, and none is asked for."
    if run is None or run.device is None:
        return said
    verdict = {True: "it was served", False: "it was NOT served", None: run.reason}[run.served]
    return f"{said} One call was really made{_under(run)}: {verdict}."


def _packages() -> dict[str, str | None]:
    """Return the versions of what matters: this package, who offers implementations, and torch."""
    entries = default_registry().discovery.entries().values()
    offering = {entry.distribution: entry.version for entry in entries if entry.distribution}
    return {
        "flash-attention-registry": _version("flash-attention-registry"),
        **dict(sorted(offering.items())),
        "torch": _version("torch"),
        "triton": _version("triton"),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except Exception:  # not installed; or damaged, which must not end the diagnosis
        return None
