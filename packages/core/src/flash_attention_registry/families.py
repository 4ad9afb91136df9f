"""Families: the implementations of one algorithm, of which the best one here is taken."""

from __future__ import annotations

from flash_attention_registry.errors import CudaNeededError, FamilyUnavailableError, describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from flash_attention_registry.registration import Registration
    from flash_attention_registry.slot import Slot
    from flash_attention_registry.transition import Turn


def members_of(family: str, registrations: Iterable[Registration]) -> list[Registration]:
    """Return the members of `family`: the greatest priority first, then by name."""
    members = [one for one in registrations if one.family == family]
    return sorted(members, key=lambda one: (-one.priority, one.name))


def activate_best(
    family: str,
    members: Sequence[Registration],
    not_loaded: Mapping[str, str],
    slot: Slot,
    turn: Turn,
) -> None:
    """Activate the first member that is available, recommended, and does not fail.

    Nothing happens if one of them is active already and still available: what runs is not changed
    under a user who only asks for the family again.

    Args:
        family: The name that was asked for; for messages.
        members: In the order of preference.
        not_loaded: What may be a member too, and why nobody can tell; for messages.
        slot: Where to activate.
        turn: Takes a warning for each member that was passed over because it failed.

    Raises:
        FamilyUnavailableError: No member could be taken; what was active before still is.
    """
    for member in members:
        if member.name == slot.name() and member.why_unavailable() is None:
            return
    reasons: dict[str, str] = {}
    failure: Exception | SystemExit | None = None
    for member in members:
        reason = _why_not(member)
        if reason is None:
            try:
                slot.put(member, turn)
            except CudaNeededError:
                raise
            except (Exception, SystemExit) as error:
                failure = error
                reason = f"its activation raised {describe(error)}"
                turn.warn(f"Passed over {member.name!r} of family {family!r}: {reason}.")
            else:
                return
        reasons[member.name] = reason
    listed = _lines(reasons)
    if not_loaded:
        listed += f"\nOf these it is not known whether they are members:{_lines(not_loaded)}"
    raise FamilyUnavailableError(
        f"No member of flash attention family {family!r} can be taken here:{listed}\n"
        f"A member that is only not recommended can be activated by its own name. {slot.still()}",
        reasons,
    ) from failure


def _lines(reasons: Mapping[str, str]) -> str:
    return "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())


def _why_not(member: Registration) -> str | None:
    """Return why the family should not take `member`, or None if it should."""
    unavailable = member.why_unavailable()
    if unavailable is not None:
        return f"not available: {unavailable}"
    not_recommended = member.why_not_recommended()
    return None if not_recommended is None else f"not recommended here: {not_recommended}"
