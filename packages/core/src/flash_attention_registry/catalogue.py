"""Which implementations there are: registered, offered by what is installed, or torch's own."""

from __future__ import annotations

from flash_attention_registry.environment import why_disabled
from flash_attention_registry.errors import ImplUnavailableError, UnknownImplError, add_note
from flash_attention_registry.families import members_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from flash_attention_registry.discovery import Discovery
    from flash_attention_registry.registration import Registration
    from flash_attention_registry.torch_registry import TorchRegistry


class Catalogue:
    """The implementations that a registry knows, and those that it can come to know.

    Questions take no lock. Who changes it holds the transition lock; loading is no part of a
    transition, since a provider must be free to register.

    Attributes:
        registrations: What was registered, by name; replaced, never changed.
    """

    def __init__(self, discovery: Discovery, torch: TorchRegistry) -> None:
        """Know what installed distributions offer, and what torch's registry has."""
        self.registrations: dict[str, Registration] = {}
        self._discovery = discovery
        self._torch = torch

    def add(self, registration: Registration) -> None:
        """Take a registration in; what a direct call registered wins over an entry point."""
        if registration.entry is None or registration.name not in self.registrations:
            self.registrations = {**self.registrations, registration.name: registration}

    def drop(self, name: str) -> None:
        """Forget what was registered under a name."""
        self.registrations = {k: v for k, v in self.registrations.items() if k != name}

    def names(self) -> list[str]:
        """Return the names of all of them, sorted."""
        return sorted({*self.registrations, *self._discovery.entries(), *self._torch.names()})

    def names_known(self) -> set[str]:
        """Return the names that are registered, or offered by what metadata has been read."""
        return {*self.registrations, *self._discovery.names_seen()}

    def registration(self, name: str) -> Registration | None:
        """Return what is registered under a name, here or in torch's registry; loads nothing."""
        return self.registrations.get(name) or self._torch.registration(name)

    def members_of(self, family: str) -> list[Registration]:
        """Return the registered members of a family, the best first."""
        return members_of(family, self.registrations.values())

    def load_for(self, impl: str, on_failure: Callable[[str], object]) -> None:
        """Load the provider of that name; all of them if it may be a family's name.

        Args:
            impl: The name that is to be activated.
            on_failure: Called with the name of each provider that has failed.
        """
        if self.registration(impl) is None:
            entries = self._discovery.entries()
            self.load([impl] if impl in entries else entries, on_failure)

    def load(self, names: Iterable[str], on_failure: Callable[[str], object]) -> None:
        """Load the providers of these names that have not been."""
        for name in tuple(names):
            self._discovery.load(name, lambda name: name in self.registrations)
            if self._discovery.is_broken(name):
                on_failure(name)

    def why_not_loaded(self, name: str) -> str:
        """Return why what is offered under a name is not registered."""
        return self._discovery.failure(name) or "its provider has not registered it yet"

    def not_loaded(self) -> dict[str, str]:
        """Return why, for each name that is offered and not registered; its family is unknown."""
        names = self._discovery.entries()
        return {name: self.why_not_loaded(name) for name in names if name not in self.registrations}

    def refusal(self, impl: str, still: str) -> Exception:
        """Return what to raise for a name that is neither registered nor a family's.

        Args:
            impl: The name.
            still: The sentence which says that nothing has changed.
        """
        if impl in self._discovery.entries():
            # Nothing is the matter with the distribution of what the user does not want used.
            remedy = "" if why_disabled(impl) else "Repair or uninstall that distribution. "
            return ImplUnavailableError(
                f"Flash attention impl {impl!r} is not available: {self.why_not_loaded(impl)}. "
                f"{remedy}{still}"
            )
        error = UnknownImplError(
            f"Unknown flash attention impl '{impl}'. Available implementations: {self.names()}"
        )
        for name, reason in self.not_loaded().items():
            add_note(error, f"{name!r} could not be loaded: {reason}")
        for text in self._discovery.unreadable():
            add_note(error, text)
        return error
