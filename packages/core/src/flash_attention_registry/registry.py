"""The registry: which implementations there are, and which one is active."""

from __future__ import annotations

from flash_attention_registry import families
from flash_attention_registry.catalogue import Catalogue
from flash_attention_registry.discovery import Discovery
from flash_attention_registry.errors import (
    ImplUnavailableError,
    NotRegisteredError,
    RestoreError,
    text_of,
)
from flash_attention_registry.registration import Registration, refuse_reserved
from flash_attention_registry.request import EnvironmentRequest
from flash_attention_registry.slot import Slot
from flash_attention_registry.snapshot import RegistrySnapshot
from flash_attention_registry.torch_registry import TorchRegistry
from flash_attention_registry.transition import Transitions
from flash_attention_registry.warn import warn_or_log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from flash_attention_registry.handle import FlashAttentionHandle
    from flash_attention_registry.registration import ReasonCheck, RegisterFn
    from flash_attention_registry.report import ImplReport
    from flash_attention_registry.scope import Entry
    from flash_attention_registry.slot import ListenerHandle
    from flash_attention_registry.swap import Active, Listener
    from flash_attention_registry.transition import Turn


RESTORE = "restore stock kernels"


class Registry:
    """The implementations that can be activated, at most one of them active.

    Whatever goes wrong in a change, the implementation that was active before is active and
    working afterwards. One change happens at a time; other threads wait. Questions (`names`,
    `current`) take no lock and see the last complete change.

    The process has one, `default_registry()`, on which the functions of the package act. Others
    are of use in tests.

    Attributes:
        discovery: The implementations that installed distributions offer.
        request: What `FLASH_ATTENTION_IMPL` asks it for.
    """

    def __init__(
        self, discovery: Discovery | None = None, *, in_step_with_torch: bool = False
    ) -> None:
        """Make a registry in which nothing is registered and nothing is active.

        Args:
            discovery: Where to look for installed providers; the default is the entry-point groups.
            in_step_with_torch: Whether torch's own registry lists and names the same; there is one
                of it, so this is for the registry of the process.
        """
        self.discovery = discovery if discovery is not None else Discovery()
        self.request = EnvironmentRequest(self)
        self._slot = Slot()
        self._torch = TorchRegistry(self, self._slot, connected=in_step_with_torch)
        self._catalogue = Catalogue(self.discovery, self._torch)
        self._transitions = Transitions(around=self)

    # Around each transition

    def begin(self, turn: Turn) -> None:
        """Complete what interrupts have broken off, and look at what torch's registry did."""
        self._slot.settle(turn)
        self._torch.begin(turn)

    def end(self, turn: Turn) -> None:
        """Complete what an interrupt has broken off just now, and tell torch's registry."""
        self._slot.settle(turn)
        self._torch.end()

    def released(self) -> None:
        """Go on with what the environment asks for, if that had to wait for this transition."""
        self.request.resume()

    # Registering

    def register(
        self,
        impl: str,
        *,
        register_fn: RegisterFn,
        family: str | None = None,
        priority: int = 0,
        availability: ReasonCheck | None = None,
        recommended: ReasonCheck | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        """See `register_flash_attention_impl`."""
        entry = self.discovery.being_loaded(impl) if isinstance(impl, str) else None
        registration = Registration(
            impl,
            register_fn=register_fn,
            family=family,
            priority=priority,
            availability=availability,
            recommended=recommended,
            prepare=prepare,
            entry=entry,
        )
        refuse_reserved("impl", impl)
        if family is not None:
            refuse_reserved(f"family of flash attention impl {impl!r}", family)
        self._transitions.make(
            f"register {impl!r}", lambda _turn: self._catalogue.add(registration)
        )

    def unregister(self, impl: str) -> None:
        """See `unregister_flash_attention_impl`."""
        self._refuse_nameless(impl)

        def change(turn: Turn) -> None:
            if impl not in self._catalogue.registrations and impl not in self.discovery.entries():
                raise NotRegisteredError(
                    f"Cannot unregister flash attention impl {impl!r}: it is not registered"
                    f"{' here but in torch' if impl in self._torch.names() else ''}. "
                    f"Registered implementations: {self.names()}"
                )
            self._drop(impl, turn)
            self.discovery.forget(impl)

        self._transitions.make(f"unregister {impl!r}", change)

    def _drop(self, impl: str, turn: Turn) -> None:
        """Take `impl` out of the registrations, restoring stock kernels first if it is active."""
        if self._slot.name() == impl:
            self._slot.put(None, turn)
        self._catalogue.drop(impl)

    # Asking

    def names(self) -> list[str]:
        """See `list_flash_attention_impls`."""
        return self._catalogue.names()

    def names_known(self) -> set[str]:
        """Return the names that are registered, or offered by what metadata has been read."""
        return self._catalogue.names_known()

    def current(self) -> str | None:
        """See `current_flash_attention_impl`."""
        return self._torch.current()

    def refuse_reentry(self, wanted: str) -> None:
        """Raise `ReentrantTransitionError` if the calling thread is inside a transition."""
        self._transitions.refuse_reentry(wanted)

    def in_transition(self) -> bool:
        """Return whether the calling thread is inside a transition, or code that one runs."""
        return self._transitions.is_mine()

    def is_loading(self) -> bool:
        """Return whether the calling thread is loading a provider, so that not all are known."""
        return self.discovery.is_loading()

    def stuck_handles(self) -> tuple[FlashAttentionHandle, ...]:
        """Return the handles whose `remove()` raised; their kernels may still be installed."""
        return self._slot.stuck

    def explain(self) -> tuple[ImplReport, ...]:
        """See `explain_flash_attention_impls`."""
        from flash_attention_registry.report import report_on  # dataclasses: only who asks pays

        doing = "explain the implementations"
        self.refuse_reentry(doing)
        self._catalogue.load(self.discovery.entries(), self._drop_half_registered)

        def explain(_turn: Turn) -> tuple[ImplReport, ...]:
            return tuple(
                report_on(
                    name,
                    self.registration(name),
                    self.discovery.entries().get(name),
                    not_loaded=self._catalogue.why_not_loaded(name),
                    active=name == self._slot.name(),
                )
                for name in self.names()
            )

        return self._transitions.make(doing, explain)

    def registration(self, name: str) -> Registration | None:
        """Return what is registered under a name, here or in torch's registry; loads nothing."""
        return self._catalogue.registration(name)

    def add_listener(self, listener: Listener) -> ListenerHandle:
        """See `add_transition_listener`."""
        return self._slot.add_listener(listener)

    # Changing what is active

    def activate(self, impl: str, *, wanted: Callable[[], bool] = lambda: True) -> None:
        """See `activate_flash_attention_impl`.

        Args:
            impl: What to activate.
            wanted: Asked when no other change can come between; if not, nothing happens.
        """
        self.activate_for_torch(impl, wanted=wanted)

    def activate_for_torch(
        self, impl: str, *, wanted: Callable[[], bool] = lambda: True
    ) -> Active | None:
        """Activate `impl`; return what is active then, for `restore_for_torch`."""
        self._load_for(impl)

        def change(turn: Turn) -> Active | None:
            if wanted():
                self._activate(impl, turn)
            return self._slot.active

        return self._transitions.make(f"activate {impl!r}", change)

    def restore(self) -> None:
        """See `restore_flash_attention_impl`."""

        def change(turn: Turn) -> None:
            dropped = self.request.pending
            self.request.supersede()
            if self._slot.active is None and not dropped:
                turn.warn("No flash attention impl is active: there is nothing to restore.")
            self._slot.put(None, turn)

        self._transitions.make(RESTORE, change)

    def restore_if_active(self, *, wanted: Callable[[], bool] = lambda: True) -> None:
        """Restore stock kernels, without a warning if they run already; `wanted` as above."""

        def change(turn: Turn) -> None:
            if wanted():
                self._slot.put(None, turn)

        self._transitions.make(RESTORE, change)

    def restore_for_torch(self, active: Active | None) -> None:
        """Restore stock kernels if `active` is still what is active; never a `RestoreError`."""

        def change(turn: Turn) -> None:
            if active is self._slot.active:
                self._slot.put(None, turn)

        try:
            self._transitions.make(RESTORE, change)
        except RestoreError as error:
            warn_or_log(text_of(error))

    def show_to_torch(self) -> None:
        """Let torch's registry list what is known here, and name what is active."""
        if not self.in_transition():  # else it happens when this transition ends
            self._transitions.make("list implementations in torch's registry", bool)

    def enter(self, impl: str, entry: Entry) -> None:
        """Activate `impl` for a while, and note in `entry` what to return to."""
        self._load_for(impl)

        def change(turn: Turn) -> None:
            entry.note(self._slot.active)
            self._activate(impl, turn)
            entry.activated = True

        self._transitions.make(f"activate {impl!r}", change)

    def leave(self, entry: Entry) -> None:
        """Make active again what was active at `entry`; stock kernels if that cannot be."""
        self._transitions.make(
            "return to the previous implementation",
            lambda turn: entry.return_to_previous(self._slot, self.registration, turn),
        )

    def _activate(self, impl: str, turn: Turn) -> None:
        """Activate an implementation by its exact name, or else the best member of a family."""
        registration = self.registration(impl)
        if registration is not None:
            self._activate_exactly(registration, turn)
        elif impl not in self.discovery.entries() and (members := self._catalogue.members_of(impl)):
            not_loaded = self._catalogue.not_loaded()
            families.activate_best(impl, members, not_loaded, self._slot, turn)
        else:
            raise self._catalogue.refusal(impl, self._slot.still())
        self.request.supersede()

    def _activate_exactly(self, registration: Registration, turn: Turn) -> None:
        active = self._slot.active
        if active is not None and active.registration is registration:
            return
        unavailable = registration.why_unavailable()
        if unavailable is not None:
            raise ImplUnavailableError(
                f"Flash attention impl {registration.name!r} is not available: {unavailable}. "
                f"{self._slot.still()}"
            )
        self._slot.put(registration, turn)

    # Loading installed providers

    def _load_for(self, impl: str) -> None:
        """Load what may have to be known in order to activate a name."""
        self._refuse_nameless(impl)
        self.refuse_reentry(f"activate {impl!r}")
        self._catalogue.load_for(impl, self._drop_half_registered)

    def _refuse_nameless(self, impl: object) -> None:
        """Raise unless `impl` is a name."""
        if not isinstance(impl, str):
            raise TypeError(
                f"A flash attention impl is named by a str, but {impl!r} was given. "
                f"Available implementations: {self.names()}"
            )

    def _drop_half_registered(self, name: str) -> None:
        """Take back what a provider registered before it failed."""

        def change(turn: Turn) -> None:
            registration = self._catalogue.registrations.get(name)
            if registration is not None and registration.entry is not None:
                self._drop(name, turn)

        self._transitions.make(f"load the provider of {name!r}", change)

    # For tests

    def snapshot(self) -> RegistrySnapshot:
        """Return everything that `reset` needs to go back to this moment."""
        return self._transitions.make(
            "take a snapshot",
            lambda _turn: RegistrySnapshot(self._catalogue, self._slot, self.discovery),
        )

    def reset(self, snapshot: RegistrySnapshot) -> None:
        """Go back to the moment of `snapshot`.

        What is active now is removed through its handle, and what was active then is installed
        through its `register_fn`, unless it is the same. Registrations, listeners and the scan of
        entry points are as they were. Handles whose `remove()` raised since stay kept.

        Args:
            snapshot: What `snapshot()` of this registry returned.
        """
        self._transitions.make(
            "reset the registry",
            lambda turn: snapshot.put_back(self._catalogue, self._slot, self.discovery, turn),
        )
