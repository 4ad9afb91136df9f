"""Providers that install nothing: to test what a registry does, without kernels and without torch.

``FakeProvider`` fails where it is told to, and writes down what was asked of it and in which order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from flash_attention_registry import Registry

Step = Literal["availability", "recommended", "prepare", "register_fn", "remove"]
"""What a registry asks of a provider, in the order of an activation."""

Gives = Literal["handle", "nothing", "handle without remove"]
"""What a fake provider's ``register_fn`` returns."""


class FakeHandle:
    """A handle that counts its removals and raises if it is told to.

    Attributes:
        error: What ``remove()`` raises; None if it succeeds.
        removals: How often ``remove()`` was called, failures included.
        removed: Whether a call of it succeeded.
    """

    def __init__(
        self, error: BaseException | None = None, *, on_remove: Callable[[], object] | None = None
    ) -> None:
        """Make a handle on nothing.

        Args:
            error: See above.
            on_remove: Called at each ``remove()``, before it succeeds or raises.
        """
        self.error = error
        self.removals = 0
        self.removed = False
        self._on_remove = on_remove

    def remove(self) -> None:
        """Count, then raise or be removed."""
        self.removals += 1
        if self._on_remove is not None:
            self._on_remove()
        if self.error is not None:
            raise self.error
        self.removed = True


class FakeProvider:
    """A provider whose every step can be made to fail.

    ``register(registry)`` makes it known; the registry does the rest:

    >>> from flash_attention_registry import Registry
    >>> provider, registry = FakeProvider("fake"), Registry()
    >>> provider.register(registry)
    >>> registry.activate("fake")
    >>> provider.runs, provider.calls
    (True, ['availability', 'prepare', 'register_fn'])
    >>> provider.fail("remove", OSError("stuck"))

    Attributes:
        name: The implementation's name.
        family: Its family, or None.
        priority: Its rank in the family.
        gives: What ``register_fn`` returns; may be changed at any time.
        calls: The steps that were asked for, in order, failures included.
        log: Where ``"name: step"`` is appended for each; share one list among providers to see the
            order of their steps.
        handles: The handles that were given out, the latest last.
    """

    def __init__(
        self,
        name: str = "fake",
        *,
        family: str | None = None,
        priority: int = 0,
        fails: Mapping[Step, BaseException | str] | None = None,
        gives: Gives = "handle",
        log: list[str] | None = None,
    ) -> None:
        """Make a provider that is not registered yet.

        Args:
            name: See above, as are the other arguments.
            family: Likewise.
            priority: Likewise.
            fails: Which steps fail and how; see ``fail``.
            gives: Likewise.
            log: Likewise.

        Raises:
            ValueError: There is no such step, or ``gives`` is not among the choices.
        """
        if gives not in get_args(Gives):
            raise ValueError(f"gives is {gives!r}; choose one of {list(get_args(Gives))}")
        self.name = name
        self.family = family
        self.priority = priority
        self.gives: Gives = gives
        self.calls: list[Step] = []
        self.log = log if log is not None else []
        self.handles: list[FakeHandle] = []
        self._fails: dict[Step, BaseException | str] = {}
        self._out_of_reach = 0
        for step, how in (fails or {}).items():
            self.fail(step, how)

    @property
    def runs(self) -> bool:
        """Whether its kernels would run: installed, and not removed as often.

        Kernels whose handle raised, or that gave no usable handle, go on running.
        """
        return self._out_of_reach > 0 or any(not handle.removed for handle in self.handles)

    def fail(self, step: Step, how: BaseException | str) -> None:
        """Make a step fail from now on; for ``remove``, of the handles given out before too.

        Args:
            step: Which.
            how: An exception, which is raised. Or a text: ``availability`` and ``recommended``
                return it as their reason, other steps raise a ``RuntimeError`` of it.

        Raises:
            ValueError: There is no such step.
        """
        _check_step(step)
        self._fails[step] = how
        self._tell_handles()

    def mend(self, *steps: Step) -> None:
        """Let steps succeed from now on; without arguments all of them.

        Raises:
            ValueError: There is no such step.
        """
        for step in steps or tuple(self._fails):
            _check_step(step)
            self._fails.pop(step, None)
        self._tell_handles()

    def register(self, registry: Registry | None = None) -> None:
        """Register with a registry; with the process's own if none is given."""
        if registry is None:
            from flash_attention_registry import default_registry

            registry = default_registry()
        registry.register(
            self.name,
            register_fn=self.register_fn,
            family=self.family,
            priority=self.priority,
            availability=self.availability,
            recommended=self.recommended,
            prepare=self.prepare,
        )

    def availability(self) -> str | None:
        """Whether it can run, as a registry asks."""
        return self._reason("availability")

    def recommended(self) -> str | None:
        """Whether its family should take it, as a registry asks."""
        return self._reason("recommended")

    def prepare(self) -> None:
        """Do nothing, or fail."""
        self._take("prepare")

    def register_fn(self) -> Any:
        """Install, so that it ``runs``, and return what ``gives`` says; a failure installs nothing.

        Any, because not all of it is what a registry accepts.
        """
        self._take("register_fn")
        if self.gives != "handle":
            self._out_of_reach += 1
            return None if self.gives == "nothing" else object()
        error = self._error("remove")
        handle = FakeHandle(error, on_remove=lambda: self._note("remove"))
        self.handles.append(handle)
        return handle

    def _note(self, step: Step) -> None:
        self.calls.append(step)
        self.log.append(f"{self.name}: {step}")

    def _take(self, step: Step) -> None:
        self._note(step)
        error = self._error(step)
        if error is not None:
            raise error

    def _reason(self, step: Step) -> str | None:
        how = self._fails.get(step)
        if isinstance(how, str):
            self._note(step)
            return how
        self._take(step)
        return None

    def _error(self, step: Step) -> BaseException | None:
        how = self._fails.get(step)
        return RuntimeError(how) if isinstance(how, str) else how

    def _tell_handles(self) -> None:
        for handle in self.handles:
            handle.error = self._error("remove")


def _check_step(step: str) -> None:
    if step not in get_args(Step):
        raise ValueError(f"a provider has no step {step!r}; choose one of {list(get_args(Step))}")
