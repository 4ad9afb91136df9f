"""The registry of the process, and the functions that act on it."""

from __future__ import annotations

from flash_attention_registry.registry import Registry
from flash_attention_registry.scope import ImplScope

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from flash_attention_registry.registration import ReasonCheck, RegisterFn
    from flash_attention_registry.report import ImplReport
    from flash_attention_registry.slot import ListenerHandle
    from flash_attention_registry.swap import Listener

_registry = Registry(in_step_with_torch=True)


def default_registry() -> Registry:
    """Return the registry of this process, on which the functions of the package act."""
    return _registry


def register_flash_attention_impl(
    impl: str,
    *,
    register_fn: RegisterFn,
    family: str | None = None,
    priority: int = 0,
    availability: ReasonCheck | None = None,
    recommended: ReasonCheck | None = None,
    prepare: Callable[[], object] | None = None,
) -> None:
    """Make an implementation known under a name; nothing is installed yet.

    For providers. Registering a name again replaces what was registered; if it is active it stays
    so, and activating the name once more switches to the new `register_fn`.

    Args:
        impl: The name to activate it by.
        register_fn: Called without arguments to install the kernels. It returns a
            `FlashAttentionHandle`, or None if the kernels cannot be removed again. It may be called
            again later, to put the implementation back after another one failed to activate.
        family: The family it belongs to: the implementations of one algorithm, such as "FA4".
        priority: Its rank in the family; the greatest comes first, then the alphabet decides.
        availability: Called without arguments; returns None if the implementation can run on this
            machine, else the reason. An exception is a reason too.
        recommended: Called without arguments, only if available; returns None if its family should
            take it on this machine, else the reason. Activation by name does not ask it.
        prepare: Called without arguments before anything is removed; for what may fail or takes
            time: imports, checks, compiling. Its result is not used.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `impl` or `family` is empty, has space around it or a comma in it, is `native`,
            or begins with `torch:`.
        ReentrantTransitionError: Called by code that the registry is calling.
    """
    _registry.register(
        impl,
        register_fn=register_fn,
        family=family,
        priority=priority,
        availability=availability,
        recommended=recommended,
        prepare=prepare,
    )


def unregister_flash_attention_impl(impl: str) -> None:
    """Forget an implementation, after restoring stock kernels if it is active.

    One that an installed distribution offers is left out for the rest of the process, or until it
    is registered again.

    Args:
        impl: The implementation's name.

    Raises:
        NotRegisteredError: A `KeyError`: there is no implementation of that name.
        RestoreError: It was active and its `remove()` raised; it is forgotten all the same.
        ReentrantTransitionError: Called by code that the registry is calling.
    """
    _registry.unregister(impl)


def activate_flash_attention_impl(impl: str) -> None:
    """Install an implementation in place of what is active.

    An exact name is obeyed whether or not the implementation is recommended here. The name of a
    family takes its best member that is available and recommended; a member whose activation fails
    yields to the next. An exact name wins over a family of the same name.

    Activating what is active does nothing, unless it was registered again since. A family does
    nothing either while its active member is available.

    If this raises, what was active before is active again, with two exceptions that are raised
    after the change was made: `RestoreError`, and a `RegistryWarning` that a warnings filter turns
    into an error. An interrupt may come after it too: what is named as active is what runs. An
    error of the activation itself goes before such a warning, which is then a note of it. Where the
    one before cannot be installed again either, stock kernels run, and a note and a warning say so.

    Args:
        impl: The name of an implementation or of a family.

    Raises:
        UnknownImplError: A `ValueError`: there is neither.
        ImplUnavailableError: The implementation cannot run here; the message says why.
        FamilyUnavailableError: No member could be taken; the message gives each one's reason.
        HandleError: The `register_fn` returned something that is no handle.
        EnvironmentVariableError: A `ValueError`: `FLASH_ATTENTION_IMPL_DISABLE` or, with some
            implementations, `FLASH_ATTENTION_IMPL_STRICT` cannot be understood.
        RestoreError: `impl` is active now, but the `remove()` of the one before raised.
        RegistryWarning: Only if a filter makes warnings errors; `impl` is active now.
        ReentrantTransitionError: Called by code that the registry is calling.
        Exception: Whatever `prepare` or `register_fn` raised.
    """
    _registry.activate(impl)


def restore_flash_attention_impl() -> None:
    """Remove the active implementation, so that stock kernels run.

    What `FLASH_ATTENTION_IMPL` asks for and still waits for the GPU is dropped. With nothing active
    and nothing waiting there is only a `RegistryWarning`.

    Raises:
        RestoreError: Its `remove()` raised; nothing is active, but its kernels may still run.
        ReentrantTransitionError: Called by code that the registry is calling.
    """
    _registry.restore()


def list_flash_attention_impls() -> list[str]:
    """Return the names of the registered and the installed implementations, sorted.

    No provider is imported for it.
    """
    return _registry.names()


def current_flash_attention_impl() -> str | None:
    """Return the name of the active implementation, or None: stock kernels run.

    It is the implementation's own name also if it was activated through its family.
    """
    return _registry.current()


def activate_requested_flash_attention_impl() -> str | None:
    """Activate what the environment variable `FLASH_ATTENTION_IMPL` asks for, now.

    `import torch` does so by itself where a provider is installed, except that what depends on the
    GPU waits for the first attention call there. For a framework that wants to know before that,
    or that runs with `TORCH_DEVICE_BACKEND_AUTOLOAD=0`. The variable holds a name, a family, or
    several of them separated by commas, of which the first that can be activated is; `native`
    stands for torch's own kernels.

    Returns:
        The name of what is active then, or None: stock kernels run. If the variable is not set,
        nothing was changed.

    Raises:
        EnvironmentVariableError: A `ValueError`: the variable's value cannot be understood.
        RequestUnavailableError: Nothing that it asks for could be activated; the message gives
            each one's reason. What was active before still is.
        RestoreError: It is active now, but the `remove()` of the one before raised.
        ReentrantTransitionError: Called by code that the registry is calling.
    """
    _registry.request.activate()
    return _registry.current()


def use_flash_attention_impl(impl: str) -> ImplScope:
    """Return a context manager that activates `impl` and returns to the previous implementation.

    The block gets the name of the implementation that is active. The whole process uses it
    meanwhile: the kernels of a process are replaced, not those of a thread.

    On exit what was active on entry is active again, whatever the block activated, and by the
    `register_fn` that it was activated with, even if its name was registered again meanwhile; if
    that fails the error is raised and stock kernels run. They run too, and a warning says so, if
    its name was unregistered. If entering the block raises, what was active before is active again.

    Args:
        impl: The name of an implementation or of a family; entering the block raises what
            `activate_flash_attention_impl` raises.

    Example:
        >>> with use_flash_attention_impl("FA4") as name:  # doctest: +SKIP
        ...     print("training on", name)
    """
    return ImplScope(_registry, impl)


def explain_flash_attention_impls() -> tuple[ImplReport, ...]:
    """Return what is known about each implementation, sorted by name.

    Imports every installed provider and asks each implementation whether it can run here and
    whether it is recommended. `format_reports` makes one text of it.

    Raises:
        EnvironmentVariableError: `FLASH_ATTENTION_IMPL_DISABLE` cannot be understood.
        ReentrantTransitionError: Called by code that the registry is calling.
    """
    return _registry.explain()


def add_transition_listener(listener: Listener) -> ListenerHandle:
    """Call `listener(before, after)` after each completed transition.

    Args:
        listener: Takes the names of what was and of what is active, each None for stock kernels.
            It is called in the thread that made the transition, before other threads can make one;
            it must not change the registry. If it raises there is a `RegistryWarning`; what is no
            `Exception`, such as `KeyboardInterrupt`, is raised again once all listeners have been
            called and the transition is complete.

    Returns:
        An object whose `remove()` ends that.
    """
    return _registry.add_listener(listener)
