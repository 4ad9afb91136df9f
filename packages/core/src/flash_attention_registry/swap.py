"""One implementation taking the place of another, and how far that got."""

from __future__ import annotations

from flash_attention_registry.errors import add_note, describe
from flash_attention_registry.half_built import Installation
from flash_attention_registry.indivisible import Call
from flash_attention_registry.installing import has_given_handle, install

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from flash_attention_registry.handle import FlashAttentionHandle
    from flash_attention_registry.registration import Registration
    from flash_attention_registry.transition import Turn

    Listener = Callable[[str | None, str | None], object]
    News = tuple[Listener, str | None, str | None]


class Active:
    """An implementation whose kernels are installed; never changed, only replaced.

    Attributes:
        registration: What was registered when it was activated.
        handle: What its `register_fn` returned; None if its kernels cannot be removed.
        by_torch: Whether it was activated in torch's registry, which holds the handle too.
        removal: The call of the handle's `remove()`.
    """

    __slots__ = ("by_torch", "handle", "registration", "removal")

    def __init__(
        self,
        registration: Registration,
        handle: FlashAttentionHandle | None,
        *,
        by_torch: bool = False,
    ) -> None:
        """Keep them; nothing is removed yet."""
        self.registration = registration
        self.handle = handle
        self.by_torch = by_torch
        self.removal = Call()


class Swap:
    """One implementation taking the place of another, and how far that got.

    Attributes:
        previous: What was active before; None for stock kernels.
        target: What is to be; None for stock kernels.
        removal_failure: What the `remove()` of the previous one raised, unless it was an interrupt.
        installation: The call of the target's `register_fn`.
        way_back: The call of the previous one's, after a failure.
        outcome: What is active afterwards and what listeners hear, once that is decided.
    """

    __slots__ = ("installation", "outcome", "previous", "removal_failure", "target", "way_back")

    def __init__(self, previous: Active | None, target: Registration | None) -> None:
        """Nothing has been done yet."""
        self.previous = previous
        self.target = target
        self.removal_failure: Exception | None = None
        self.installation = Installation()
        self.way_back = Installation()
        self.outcome: tuple[Active | None, list[News]] | None = None

    def removal(self) -> Call:
        """Return the call that removes the previous one, which may be none to be removed."""
        return Call() if self.previous is None else self.previous.removal

    def is_done(self) -> bool:
        """Return whether the target is in place, and the previous one out of the way."""
        if self.target is not None:
            return has_given_handle(self.installation)
        nothing_to_remove = self.previous is None or self.previous.handle is None
        return nothing_to_remove or self.removal().finished or self.removal_failure is not None


def put_back(
    previous: Active, way_back: Installation, turn: Turn, error: BaseException | None
) -> Active | None:
    """Install `previous` again because of `error`; settle for stock if that fails too."""
    if not way_back.begun:
        try:
            install(previous.registration, way_back)
        except BaseException as second:
            if not way_back.begun or way_back.finished:
                raise  # an interrupt of this code: the next call goes on from here
            text = (
                f"Flash attention impl {previous.registration.name!r} could not be activated again "
                f"({describe(second)}). No implementation is active: stock kernels run."
            )
            if error is not None:
                add_note(error, text)
                text = f"{text} The transition before it failed with {describe(error)}."
            turn.warn(text)
            if not isinstance(second, Exception):
                turn.raise_after(second)
    if has_given_handle(way_back):
        return Active(previous.registration, way_back.result)
    way_back.undo()
    return None
