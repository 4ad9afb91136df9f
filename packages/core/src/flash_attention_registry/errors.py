"""The exceptions and the warning of this package.

Every message says what was asked, what was found and what to do. Exceptions carry text and plain
data only: a handle or a traceback hung on one would keep kernels alive for as long as somebody
keeps the exception, and would keep it from crossing a process border.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping


class FlashAttentionRegistryError(Exception):
    """The base of every exception that this package defines."""


class UnknownImplError(FlashAttentionRegistryError, ValueError):
    """A name was asked for that is neither an implementation nor a family."""


class NotRegisteredError(FlashAttentionRegistryError, KeyError):
    """A name was to be unregistered that is not registered."""

    def __str__(self) -> str:
        """Return the message itself; `KeyError` would show it quoted."""
        return str(self.args[0]) if self.args else ""


class ImplUnavailableError(FlashAttentionRegistryError, RuntimeError):
    """What was asked for cannot run here; the message gives the reason.

    Attributes:
        reasons: Where several implementations were considered: for each, by name, why it was not
            taken.
    """

    def __init__(self, message: str, reasons: Mapping[str, str] | None = None) -> None:
        """Keep the message and a copy of the reasons."""
        super().__init__(message)
        self.reasons: dict[str, str] = dict(reasons or {})


class FamilyUnavailableError(ImplUnavailableError):
    """No member of a family could be activated."""


class RequestUnavailableError(ImplUnavailableError):
    """Nothing that `FLASH_ATTENTION_IMPL` asks for could be activated."""


class EnvironmentVariableError(FlashAttentionRegistryError, ValueError):
    """An environment variable of this package has a value that cannot be understood."""


class CallDeclinedError(FlashAttentionRegistryError, RuntimeError):
    """The active implementation does not serve a call, and `FLASH_ATTENTION_IMPL_STRICT` is set."""


class CudaNeededError(FlashAttentionRegistryError, RuntimeError):
    """A check can be answered only by using CUDA, which must not be initialised yet.

    Raised by `before_using_cuda()`; the registry asks the check again later.
    """


class HandleError(FlashAttentionRegistryError, TypeError):
    """A `register_fn` returned something that is neither None nor has a callable `remove`."""


class RestoreError(FlashAttentionRegistryError, RuntimeError):
    """The `remove()` of an implementation that was left raised; the transition itself took place.

    The exception that `remove()` raised is the `__cause__`.
    """


class ReentrantTransitionError(FlashAttentionRegistryError, RuntimeError):
    """The registry was asked to change by code that it was calling during a change."""


class RegistryWarning(UserWarning):
    """The category of every warning that the registry gives."""


def add_note(error: BaseException, note: str) -> None:
    """Add `note` to `error`; on Python 3.10 it is kept where later versions keep theirs."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:
        vars(error).setdefault("__notes__", []).append(note)


def add_error(error: BaseException, second: BaseException) -> None:
    """Add the text and the notes of `second`, which cannot be raised as well, to `error`."""
    for note in (text_of(second), *getattr(second, "__notes__", ())):
        add_note(error, note)


def text_of(error: BaseException) -> str:
    """Return `str(error)`, which must not be the next thing to fail."""
    try:
        return str(error)
    except Exception as second:
        return f"(its text cannot be had: {type(second).__name__})"


def describe(error: BaseException) -> str:
    """Return `error` as one piece of text, such as ``"ImportError: no module named x"``."""
    text = text_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
