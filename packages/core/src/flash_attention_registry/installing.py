"""Calling a provider's functions, so that nothing of what they half built stays alive."""

from __future__ import annotations

import sys

from flash_attention_registry.errors import HandleError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from flash_attention_registry.indivisible import Call
    from flash_attention_registry.registration import Registration

    T = TypeVar("T")


def install(registration: Registration, call: Call) -> None:
    """Run the `register_fn` as `call`; if it fails nothing of what it built stays alive."""
    call_and_free_frames(lambda: registration.install(call))
    if not has_given_handle(call):
        found = type(call.result).__name__
        call.forget_result()
        raise HandleError(
            f"register_fn of flash attention impl {registration.name!r} returned an object of type "
            f"{found} without a callable remove(). It must return None or a handle whose remove() "
            f"uninstalls the kernels."
        )


def has_given_handle(call: Call) -> bool:
    """Whether a `register_fn` has returned, and what it may return: a handle or None."""
    if not call.finished:
        return False
    try:
        return call.result is None or callable(getattr(call.result, "remove", None))
    except Exception:
        return False


def call_and_free_frames(call: Callable[[], T]) -> T:
    """Call; if it raises, free the local variables of every function that has ended by that.

    A traceback keeps them alive, and with them a half-built kernel library, for as long as
    somebody keeps the exception: a notebook, pytest, or an `except` clause.
    """
    outer = sys.exc_info()[1]
    try:
        return call()
    except BaseException as error:
        _free_frames(error, outer)
        raise


def _free_frames(error: BaseException, outer: BaseException | None) -> None:
    """Clear the frames of `error` and of what led to it, up to but without `outer`.

    `outer` was being handled before the failed call began: its frames are none of our business.
    """
    import traceback  # loads much that only this rare path needs

    pending: list[BaseException | None] = [error]
    seen = {id(outer)}
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        pending += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
