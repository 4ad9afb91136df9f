"""What would come of asking for a name here, concluded from reports; nothing is activated."""

from __future__ import annotations

from flash_attention_registry.registration import TORCH_PREFIX

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from flash_attention_registry.report import ImplReport

__all__ = ["is_active", "meant_by", "of_unknown_family", "why_not_usable", "would_take"]


def meant_by(name: str, reports: Sequence[ImplReport]) -> list[ImplReport]:
    """Return the implementation of that exact name, else the members of that family.

    The members are in the order in which the family takes them. The list is empty if there is
    neither.
    """
    exact = [report for report in reports if report.name == name]
    members = [report for report in reports if report.family == name]
    return exact or sorted(members, key=lambda one: (-one.priority, one.name))


def would_take(name: str, reports: Sequence[ImplReport]) -> ImplReport | None:
    """Return what activating `name` would activate, as far as one can tell without doing it."""
    meant = meant_by(name, reports)
    by_exact_name = [report for report in meant if report.name == name]
    able = [report for report in meant if report.available]
    stays = [report for report in able if report.active]
    wins = [report for report in able if report.recommended]
    return next(iter((by_exact_name and able) or stays or wins), None)


def is_active(name: str, reports: Sequence[ImplReport]) -> bool:
    """Return whether an implementation of that name, or else a member of that family, is active."""
    return any(report.active for report in meant_by(name, reports))


def why_not_usable(name: str, reports: Sequence[ImplReport]) -> str | None:
    """Return why activating `name` would fail here, or None if it would not."""
    if would_take(name, reports) is not None:
        return None
    meant = meant_by(name, reports)
    if not meant:
        return _why_unknown(name, reports)
    if meant[0].name == name:
        return f"not available: {meant[0].unavailable_reason}"
    reasons = [f"{report.name}: {_why_not_taken(report)}" for report in meant]
    told = f"no member of this family would be taken here ({'; '.join(reasons)})"
    return ". ".join([told, *of_unknown_family(reports)])


def of_unknown_family(reports: Sequence[ImplReport]) -> list[str]:
    """Return one text, if any, that tells of what is installed and may belong to any family.

    A provider that cannot be loaded, or must not be, has not said what its family is.
    """
    reasons = [
        f"{report.name}: not available: {report.unavailable_reason}"
        for report in reports
        if report.family is None
        and report.distribution is not None
        and not report.available
        and not report.name.startswith(TORCH_PREFIX)  # torch's own are of no family
    ]
    return [f"No family is known of what cannot be used ({'; '.join(reasons)})"] if reasons else []


def _why_not_taken(report: ImplReport) -> str:
    if not report.available:
        return f"not available: {report.unavailable_reason}"
    return f"not recommended here: {report.not_recommended_reason}"


def _why_unknown(name: str, reports: Sequence[ImplReport]) -> str:
    names = [report.name for report in reports]
    families = sorted({report.family for report in reports if report.family is not None})
    told = (
        f"there is no implementation and no family {name!r}. "
        f"Implementations: {', '.join(names) or 'none'}. Families: {', '.join(families) or 'none'}."
    )
    return " ".join([told, *of_unknown_family(reports)])
