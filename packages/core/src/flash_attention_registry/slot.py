"""The one place where an implementation is active: installing, removing, putting back."""

from __future__ import annotations

from flash_attention_registry.errors import RestoreError, add_note, describe
from flash_attention_registry.fork import ForkSensitive
from flash_attention_registry.indivisible import Call
from flash_attention_registry.installing import call_and_free_frames, install
from flash_attention_registry.swap import Active, Swap, put_back

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flash_attention_registry.handle import FlashAttentionHandle
    from flash_attention_registry.registration import Registration
    from flash_attention_registry.swap import Listener, News
    from flash_attention_registry.transition import Turn


class ListenerHandle:
    """What `add_transition_listener` returns."""

    def __init__(self, listeners: dict[object, Listener]) -> None:
        """Remember where the listener was put, under this object as its key."""
        self._listeners = listeners

    def remove(self) -> None:
        """Stop calling the listener; a second call does nothing."""
        self._listeners.pop(self, None)


class Slot(ForkSensitive):
    """Holds the active implementation, or nothing: then stock kernels run.

    Its user holds the transition lock while calling `put`; `active` may be read at any time and is
    replaced only when a transition is complete. Wherever an interrupt comes, `settle` finds out how
    far things got, and makes `active` what runs.

    Attributes:
        active: The active implementation, or None.
        stuck: The handles whose `remove()` raised. They are kept because dropping the last
            reference to a library that is still installed is not safe in every provider.
        listeners: Called with the names before and after each committed transition.
        on_removed: Called when the handle of what was active has been removed, or could not be.
    """

    def __init__(self) -> None:
        """Start with stock kernels."""
        self.active: Active | None = None
        self.stuck: tuple[FlashAttentionHandle, ...] = ()
        self.listeners: dict[object, Listener] = {}
        self.on_removed: Callable[[], object] = bool
        self._swap: Swap | None = None  # what has begun and is not complete
        self._news: list[News] = []  # who has to hear what
        super().__init__()

    def renew(self) -> None:
        """Say what is true in a child that was forked in the middle of a swap."""
        swap, self._swap = self._swap, None
        if swap is None:
            return
        if swap.target is not None and swap.installation.finished:
            self.active = Active(swap.target, swap.installation.result)
        elif swap.removal().finished:
            self.active = None

    def add_listener(self, listener: Listener) -> ListenerHandle:
        """Call `listener` after each committed transition until the returned handle is removed."""
        handle = ListenerHandle(self.listeners)
        self.listeners[handle] = listener
        return handle

    def keep_listeners(self, listeners: Mapping[object, Listener]) -> None:
        """Call these from now on, and no others."""
        for handle in [one for one in self.listeners.copy() if one not in listeners]:
            self.listeners.pop(handle, None)
        self.listeners.update(listeners)

    def put(self, target: Registration | None, turn: Turn) -> None:
        """Replace what is active by `target`, or by stock kernels if it is None.

        The old one is removed before the new one is installed: not every kernel can be installed
        on top of another. If anything goes wrong the old one is installed again by its own
        `register_fn`, and the error goes on to the caller. After an interrupt of the registry's own
        code the new one may be in place already; `active` tells.

        Args:
            target: What to activate; nobody is asked whether it is available.
            turn: Takes the warnings, the `RestoreError` if the old one's `remove()` raised, and an
                interrupt that a listener raised.
        """
        self.settle(turn)
        previous = self.active
        if target is None and previous is None:
            return
        if target is not None and target.prepare is not None:
            call_and_free_frames(target.prepare)
        swap = self._swap = Swap(previous, target)
        removal_error = None
        try:
            removal_error = self._remove(swap)
            if target is not None:
                install(target, swap.installation)
        except BaseException as error:
            if removal_error is not None:
                add_note(error, str(removal_error))
            self._complete(swap, turn, error)
            del previous, swap  # the traceback keeps this frame, and must not keep their handles
            raise
        if removal_error is not None:
            turn.raise_after(removal_error)
        self._complete(swap, turn)

    def adopt(self, active: Active | None, turn: Turn) -> None:
        """Commit what was installed or removed already, past this registry.

        Args:
            active: What is installed now; None if what was active before has been removed.
            turn: Takes the warnings.
        """
        self.settle(turn)
        swap = Swap(self.active, None)
        if active is None:
            _warn_of_what_stays(swap.previous, turn)
        swap.outcome = active, self._news_of(swap, active)
        self._complete(swap, turn)

    def settle(self, turn: Turn) -> None:
        """Complete a swap that an interrupt broke off, and tell listeners what they have missed."""
        if self._swap is not None:
            self._complete(self._swap, turn)
        self._tell(turn)

    def _remove(self, swap: Swap) -> RestoreError | None:
        """Remove what was active; return what to raise in the end if its `remove()` raised."""
        previous = swap.previous
        if previous is None or previous.handle is None:
            return None
        try:
            previous.removal.run(previous.handle.remove)
        except Exception as error:
            swap.removal_failure = error
            late = RestoreError(
                f"remove() of flash attention impl {previous.registration.name!r} raised "
                f"{describe(error)}. The registry went on without it, but its kernels may still "
                f"be installed. Report this to its provider; restart the process to be rid of them."
            )
            late.__cause__ = error
            return late
        finally:
            self.on_removed()
        return None

    def _complete(self, swap: Swap, turn: Turn, error: BaseException | None = None) -> None:
        """Decide what is active, make it what everybody sees, and tell every listener.

        It may be called again where an interrupt kept it from its end.

        Args:
            swap: Whatever has been done of it.
            turn: Takes the warnings.
            error: What broke it off.
        """
        if swap.outcome is None:
            self._keep_if_stuck(swap)
            swap.outcome = self._outcome(swap, turn, error)
        self.active, self._news = swap.outcome
        self._swap = None
        self._tell(turn)

    def _outcome(
        self, swap: Swap, turn: Turn, error: BaseException | None
    ) -> tuple[Active | None, list[News]]:
        previous = swap.previous
        if swap.is_done():
            _warn_of_what_stays(previous, turn)
            active = None
            if swap.target is not None:
                active = Active(swap.target, swap.installation.result)
            return active, self._news_of(swap, active)
        swap.installation.undo()
        if previous is None or not previous.removal.begun:
            return previous, self._news
        active = put_back(previous, swap.way_back, turn, error)
        return active, self._news_of(swap, None) if active is None else self._news

    def _keep_if_stuck(self, swap: Swap) -> None:
        """Keep the handle of what was active unless its `remove()` has returned.

        Also if an interrupt ended it: how far it had got is unknown then.
        """
        removal, previous = swap.removal(), swap.previous
        if previous is None or previous.handle is None or not removal.begun or removal.finished:
            return
        if not any(handle is previous.handle for handle in self.stuck):
            self.stuck = (*self.stuck, previous.handle)

    def _news_of(self, swap: Swap, active: Active | None) -> list[News]:
        """Return who has to hear of `active`, after those who have yet to hear of something."""
        before, after = _name_of(swap.previous), _name_of(active)
        # A copy, made in one step: other threads add and remove listeners without a lock.
        listening = self.listeners.copy().values()
        return [*self._news, *((one, before, after) for one in listening)]

    def _tell(self, turn: Turn) -> None:
        """Tell every listener, whatever one raises."""
        while self._news:
            listener, before, after = self._news[0]
            call = Call()
            try:
                call.run(listener, before, after)
            except Exception as error:
                turn.warn(
                    f"A transition listener ({listener!r}) raised {describe(error)}. The "
                    f"transition from {before!r} to {after!r} took place all the same."
                )
            except BaseException as interrupt:
                turn.raise_after(interrupt)
            if call.begun:
                self._news = self._news[1:]

    def name(self) -> str | None:
        """Return the name of what is active, or None."""
        return _name_of(self.active)

    def still(self) -> str:
        """Return the sentence with which an error says that nothing was changed."""
        name = self.name()
        return "Stock kernels still run." if name is None else f"Still active: {name!r}."


def _name_of(active: Active | None) -> str | None:
    return None if active is None else active.registration.name


def _warn_of_what_stays(left: Active | None, turn: Turn) -> None:
    """Warn if what has been left gave no handle to remove its kernels with."""
    if left is not None and left.handle is None:
        turn.warn(
            f"Left flash attention impl {left.registration.name!r}, but its register_fn "
            f"returned no handle: its kernels cannot be removed and may still run. Restart "
            f"the process to be rid of them."
        )
