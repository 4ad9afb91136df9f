"""What the environment asks for, and what became of that in this process."""

from __future__ import annotations

import os

from flash_attention_registry import autoload, environment, metadata
from flash_attention_registry.default import current_flash_attention_impl, default_registry
from flash_attention_registry.doctor.findings import Request, Trap, Variable
from flash_attention_registry.doctor.usable import is_active, of_unknown_family, why_not_usable
from flash_attention_registry.environment import DISABLE, IMPL, NATIVE, STRICT
from flash_attention_registry.errors import (
    EnvironmentVariableError,
    RequestUnavailableError,
    text_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from flash_attention_registry.report import ImplReport

__all__ = ["environment_traps", "parsed_variables", "request_of"]

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""Torch's own switch for the hooks at the end of `import torch`: on if it is unset or 1."""


def parsed_variables() -> tuple[Variable, ...]:
    """Parse the variables of this package, each by itself."""
    return (
        _variable(IMPL, lambda: ", then ".join(environment.requested()) or "nothing is asked for"),
        _variable(
            STRICT,
            lambda: (
                "what is not served is an error"
                if environment.strict()
                else "what is not served runs on torch's own kernels"
            ),
        ),
        _variable(DISABLE, lambda: ", ".join(sorted(environment.disabled())) or "nothing"),
    )


def _variable(name: str, meaning: Callable[[], str]) -> Variable:
    value = os.environ.get(name)
    try:
        return Variable(name, value, meaning())
    except EnvironmentVariableError as error:
        return Variable(name, value, None, text_of(error))


def request_of(
    reports: Sequence[ImplReport], problem: str | None, refusal: Exception | None
) -> Request:
    """Conclude what became of `FLASH_ATTENTION_IMPL`.

    Args:
        reports: What there is.
        problem: Why torch cannot be used, or None.
        refusal: What was raised when it was settled, or None.
    """
    try:
        names = environment.requested()
    except EnvironmentVariableError:
        return Request(state="failed")
    given = refusal.reasons if isinstance(refusal, RequestUnavailableError) else {}
    reasons: dict[str, str] = {}
    active = current_flash_attention_impl()
    for name in names:
        if is_active(name, reports):
            return Request(names, "active", reasons)
        if name == NATIVE and active is None:
            return Request(names, "native", reasons)
        reasons[name] = (
            given.get(name)
            or problem
            or (None if name == NATIVE else why_not_usable(name, reports))
            or _why_not_active(active)
        )
    if not names:
        return Request()
    waits = refusal is None and bool(default_registry().request.pending)
    return Request(names, "pending" if waits else "failed", reasons)


def _why_not_active(active: str | None) -> str:
    """Return why something that is usable is not active."""
    if active is not None:
        return f"usable, but {active!r} is active instead"
    if any(variable.problem is not None for variable in parsed_variables()):
        return "usable, but not active, because an environment variable cannot be understood"
    if autoload.was_called():
        return (
            "usable, but not active: its activation failed with a warning, or the program has "
            "restored torch's own kernels since"
        )
    if _autoload_is_off():
        return f"usable, but {AUTOLOAD}={os.environ[AUTOLOAD]} keeps torch from activating it"
    return (
        "usable, but nothing has activated it: no installed distribution declares the hook that "
        "torch calls for it (entry point group torch.backends)"
    )


def _autoload_is_off() -> bool:
    return os.environ.get(AUTOLOAD, "1") != "1"


def environment_traps(reports: Sequence[ImplReport], request: Request) -> tuple[Trap, ...]:
    """Return what variables and installed metadata say that cannot have been meant."""
    traps = []
    if request.names and _autoload_is_off():
        traps.append(
            Trap(
                f"{IMPL} is set, but {AUTOLOAD}={os.environ[AUTOLOAD]} keeps torch from reading it",
                f"Unset {AUTOLOAD}, or call activate_requested_flash_attention_impl() in the "
                f"program.",
            )
        )
    for text in metadata.unreadable():
        traps.append(
            Trap(
                f"{text}. What that distribution offers is not seen here, and torch, which reads "
                f"all of them, may not be importable",
                f"Install that distribution again, or uninstall it. With {AUTOLOAD}=0 torch reads "
                f"none of them.",
            )
        )
    try:
        disabled = environment.disabled()
    except EnvironmentVariableError:
        return tuple(traps)
    known = {name for report in reports for name in (report.name, report.family)}
    # What is disabled by its own name is not loaded, so that its family is not known.
    can_tell = bool(reports) and not of_unknown_family(reports)
    for name in sorted(disabled - known) if can_tell else ():
        traps.append(
            Trap(
                f"{DISABLE} names {name!r}, which is no implementation and no family here",
                "Look for a slip of the pen: flash-attention list shows the names.",
            )
        )
    return tuple(traps)
