"""What a provider tells the registry about one implementation."""

from __future__ import annotations

from flash_attention_registry.environment import NATIVE, why_disabled
from flash_attention_registry.errors import CudaNeededError, describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from flash_attention_registry.discovery import ProviderEntry
    from flash_attention_registry.handle import FlashAttentionHandle
    from flash_attention_registry.indivisible import Call

    RegisterFn = Callable[[], FlashAttentionHandle | None]
    ReasonCheck = Callable[[], str | None]


TORCH_PREFIX = "torch:"
"""What the names of implementations in torch's own registry begin with here."""


class Registration:
    """One implementation as it was registered; never changed, only replaced.

    The registry tells a re-registered implementation from the one it activated by the identity of
    this object.

    Attributes:
        name: The implementation's name.
        register_fn: Installs the kernels; returns a handle or None.
        family: The family it belongs to, or None.
        priority: Its rank in the family; the greatest comes first.
        prepare: The first phase of a two-phase provider, or None.
        entry: The entry point that registered it, or None if a direct call did.
    """

    __slots__ = (
        "_availability",
        "_recommended",
        "entry",
        "family",
        "name",
        "prepare",
        "priority",
        "register_fn",
    )

    def __init__(
        self,
        name: str,
        *,
        register_fn: RegisterFn,
        family: str | None = None,
        priority: int = 0,
        availability: ReasonCheck | None = None,
        recommended: ReasonCheck | None = None,
        prepare: Callable[[], object] | None = None,
        entry: ProviderEntry | None = None,
    ) -> None:
        """Check and keep the arguments.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: `name` or `family` is empty or has space around it.
        """
        _check_name("impl", name)
        if family is not None:
            _check_name(f"family of flash attention impl {name!r}", family)
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise TypeError(
                f"priority of flash attention impl {name!r} must be an int, but it is {priority!r}."
            )
        if not callable(register_fn):
            raise TypeError(
                f"register_fn of flash attention impl {name!r} must be callable without "
                f"arguments, but it is {register_fn!r}."
            )
        for what, value in (
            ("availability", availability),
            ("recommended", recommended),
            ("prepare", prepare),
        ):
            if value is not None and not callable(value):
                raise TypeError(
                    f"{what} of flash attention impl {name!r} must be None or callable without "
                    f"arguments, but it is {value!r}."
                )
        self.name = name
        self.register_fn = register_fn
        self.family = family
        self.priority = priority
        self.prepare = prepare
        self.entry = entry
        self._availability = availability
        self._recommended = recommended

    def install(self, call: Call) -> None:
        """Run the `register_fn` as `call`, which tells how far it got whatever is raised."""
        call.run(self.register_fn)

    def why_unavailable(self) -> str | None:
        """Return why the implementation cannot run here, or must not, or None if it can.

        Raises:
            CudaNeededError: Only where CUDA must not be initialised yet.
            EnvironmentVariableError: The list of disabled implementations cannot be read.
        """
        disabled = why_disabled(self.name, self.family)
        return _ask("availability", self._availability) if disabled is None else disabled

    def why_not_recommended(self) -> str | None:
        """Return why its family should not take it here, or None if it should.

        Raises:
            CudaNeededError: Only where CUDA must not be initialised yet.
        """
        return _ask("recommendation", self._recommended)


def refuse_reserved(what: str, name: str) -> None:
    """Raise if a name could not be asked for later: it means something else already.

    Raises:
        ValueError: `name` holds a comma, is `native`, or begins with `torch:`.
    """
    reason = why_reserved(name)
    if reason is not None:
        raise ValueError(f"{what} must not be {name!r}: {reason}.")


def why_reserved(name: str) -> str | None:
    """Return why a name cannot be an implementation's or a family's, or None if it can."""
    if "," in name or name == NATIVE or name.startswith(TORCH_PREFIX):
        return (
            f"{NATIVE!r} stands for torch's own kernels, names that begin with {TORCH_PREFIX!r} "
            f"for implementations in torch's registry, and a comma separates names in environment "
            f"variables"
        )
    return None


def _check_name(what: str, name: object) -> None:
    """Raise unless `name` is a string that a person can type again."""
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a str, but it is {name!r}.")
    if not name or name != name.strip():
        raise ValueError(
            f"{what} must be a name that is not empty and has no space around it, "
            f"but it is {name!r}."
        )


def _ask(what: str, check: ReasonCheck | None) -> str | None:
    """Return the reason that `check` gives, or None; a check that fails is a reason too."""
    if check is None:
        return None
    try:
        answer: object = check()
    except CudaNeededError:
        raise
    except (Exception, SystemExit) as error:  # nothing that is asked ends the program
        return f"{what} check raised {describe(error)}"
    if answer is None:
        return None
    if not isinstance(answer, str):
        return (
            f"{what} check returned an object of type {type(answer).__name__}; "
            f"it must return None or a reason (str)"
        )
    return answer or "no reason given"
