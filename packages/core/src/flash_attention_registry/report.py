"""Why an implementation is or is not usable, as data and as text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

from flash_attention_registry.registration import TORCH_PREFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from flash_attention_registry.discovery import ProviderEntry
    from flash_attention_registry.registration import Registration


@dataclass(frozen=True, slots=True)
class ImplReport:
    """What is known about one implementation on this machine at one moment.

    Attributes:
        name: The name to activate it by.
        distribution: The distribution whose entry point registered it, or in whose registry it is;
            None if a direct call did.
        version: That distribution's version, or None.
        family: The family it belongs to, or None (also if its provider could not be loaded).
        priority: Its rank in the family; the greatest comes first.
        available: Whether it can run here.
        unavailable_reason: Why it cannot, or None.
        recommended: Whether its family takes it here.
        not_recommended_reason: Why not, or None.
        active: Whether it is the active implementation.
    """

    name: str
    distribution: str | None
    version: str | None
    family: str | None
    priority: int
    available: bool
    unavailable_reason: str | None
    recommended: bool
    not_recommended_reason: str | None
    active: bool

    def __str__(self) -> str:
        """Return a line that says what it is and a line that says whether it is usable."""
        origin = " ".join(part for part in (self.distribution, self.version) if part)
        where = f"from {origin}" if origin else "registered by a direct call"
        if self.family is not None:
            where = f"family {self.family}, priority {self.priority}, {where}"
        if not self.available:
            verdict = f"not available: {self.unavailable_reason}"
        elif not self.recommended:
            verdict = f"available, but not recommended here: {self.not_recommended_reason}"
        else:
            verdict = "available and recommended"
        return f"{self.name}{' [active]' if self.active else ''} ({where})\n    {verdict}"


def format_reports(reports: Iterable[ImplReport]) -> str:
    """Return the reports as one text, or a sentence if there are none."""
    return "\n".join(str(report) for report in reports) or (
        "No flash attention implementation is registered, and no installed distribution offers one."
    )


def report_on(
    name: str,
    registration: Registration | None,
    entry: ProviderEntry | None,
    *,
    not_loaded: str,
    active: bool,
) -> ImplReport:
    """Ask an implementation about itself and return the report.

    Args:
        name: The implementation's name.
        registration: What was registered, or None if its provider could not be loaded.
        entry: The entry point of that name, or None.
        not_loaded: Why nothing was registered; read only if that is so.
        active: Whether it is the active implementation.
    """
    not_recommended: str | None = "it is not available"
    distribution: str | None = None
    version: str | None = None
    if registration is None:
        unavailable: str | None = not_loaded
    else:
        entry = registration.entry  # not the entry point of that name that a direct call overruled
        if name.startswith(TORCH_PREFIX):
            distribution, version = "torch", getattr(sys.modules.get("torch"), "__version__", None)
        unavailable = registration.why_unavailable()
        if unavailable is None:
            not_recommended = registration.why_not_recommended()
    if entry is not None:
        distribution, version = entry.distribution, entry.version
    return ImplReport(
        name=name,
        distribution=distribution,
        version=version,
        family=None if registration is None else registration.family,
        priority=0 if registration is None else registration.priority,
        available=unavailable is None,
        unavailable_reason=unavailable,
        recommended=not_recommended is None,
        not_recommended_reason=not_recommended,
        active=active,
    )
