"""What a diagnosis consists of: plain records, which know nothing of how they were found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from flash_attention_registry.report import ImplReport

__all__ = [
    "AttentionRun",
    "Diagnosis",
    "Gpu",
    "Request",
    "RequestState",
    "TorchFacts",
    "Trap",
    "TypicalCall",
    "Variable",
]

RequestState: TypeAlias = Literal["nothing", "active", "native", "pending", "failed"]
"""What became of `FLASH_ATTENTION_IMPL`.

`nothing`: it asks for nothing. `active`: what it asks for is active. `native`: torch's own kernels
run, which it allows. `pending`: not settled, and not because of a failure. `failed`: what it asks
for is not active.
"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that torch sees.

    Attributes:
        index: Its number in this process.
        name: What its driver calls it.
        compute_capability: Such as `"9.0"`.
    """

    index: int
    name: str
    compute_capability: str


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """The torch of this process.

    Attributes:
        version: Such as `"2.13.0+cpu"`.
        cuda: The version of CUDA that it is built with, or None.
        cudnn: The version of cuDNN that it uses, or None.
        driver: The version of the NVIDIA driver, or None if it cannot be told.
        gpus: What it sees.
    """

    version: str
    cuda: str | None
    cudnn: str | None
    driver: str | None
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable of this package.

    Attributes:
        name: Its name.
        value: What it is set to, or None.
        meaning: How it is understood, or None if it is not.
        problem: Why it is not understood, or None.
    """

    name: str
    value: str | None
    meaning: str | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What `FLASH_ATTENTION_IMPL` asks for, and what became of that.

    Attributes:
        names: What it asks for, the most wanted first.
        state: What became of it.
        reasons: For each name before the one that is active, or for all, why it is not.
    """

    names: tuple[str, ...] = ()
    state: RequestState = "nothing"
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TypicalCall:
    """Where one kind of attention call would go. It was asked for and not made.

    Attributes:
        call: What is special about it, such as `"bfloat16, causal"`.
        device: Where its tensors are.
        backend: What torch chooses for it, a name of `torch.nn.attention.SDPBackend`, or None if
            torch does not say.
        kernel: The implementation that would run it, `"stock"`, or None if that cannot be told.
        reason: Why it is not the active implementation, or what else there is to say; or None.
    """

    call: str
    device: str
    backend: str | None
    kernel: str | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Trap:
    """Something that is so here, and keeps kernels from being used.

    Attributes:
        found: What it is.
        remedy: What to do about it.
    """

    found: str
    remedy: str


@dataclass(frozen=True, slots=True)
class AttentionRun:
    """One call of attention, forward and backward, that was really made.

    Attributes:
        asked: What it was to run under, or None for what was active.
        active: What was active while it ran, or None.
        device: Where its tensors were; None if it was not made.
        served: Whether forward and backward ran on what was active; None if nothing was active, or
            if its calls are not counted here.
        counts: What was counted of it, and of no other call; as in `Diagnosis.counts`.
        reason: Why it was not served, or why that cannot be told, or None.
    """

    asked: str | None
    active: str | None
    device: str | None
    served: bool | None
    counts: dict[str, dict[str, Any]]
    reason: str | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that tells whether kernels are really used in this process.

    `str()` makes a text of it, in lines as wide as the terminal.

    Attributes:
        summary: The answer in a few sentences.
        problems: What was asked for and is not usable, and why; nothing if all is well.
        python: Version and platform of Python.
        packages: Versions of the distributions that matter; None for what is not installed.
        torch: What torch says of itself, or None.
        torch_problem: Why torch is of no use, or None.
        environment: The variables of this package.
        request: What `FLASH_ATTENTION_IMPL` asks for.
        active: The active implementation, or None: stock kernels run.
        implementations: What is known about each, as `explain_flash_attention_impls` says it.
        not_explained: Why `implementations` is empty although there may be some, or None.
        counts: Calls of this process so far, before the diagnosis made any, by aten op: `served`
            and `declined`, the latter by reason. Ops without a call are left out.
        calls: Where typical calls would go.
        traps: What is in the way.
        hints: What is never served, wherever it is run.
        run: The call that was made, if one was asked for.
    """

    summary: str
    problems: tuple[str, ...]
    python: str
    packages: dict[str, str | None]
    torch: TorchFacts | None
    torch_problem: str | None
    environment: tuple[Variable, ...]
    request: Request
    active: str | None
    implementations: tuple[ImplReport, ...]
    not_explained: str | None
    counts: dict[str, dict[str, Any]]
    calls: tuple[TypicalCall, ...]
    traps: tuple[Trap, ...]
    hints: tuple[str, ...]
    run: AttentionRun | None

    @property
    def ok(self) -> bool:
        """Whether everything that was asked for is usable."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, `ok` included, in dictionaries, lists and texts that JSON can hold."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        """Return it as text, in lines as wide as the terminal."""
        from flash_attention_registry.doctor.text import text_of_diagnosis

        return text_of_diagnosis(self)
