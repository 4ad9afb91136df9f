"""What is used of torch that is private to it, because there is no public way.

Torch may change these names and what stands behind them. So the form of each is checked where it is
read, here and nowhere else, and what happens where it is another one is said with it. What is
private to torch's registry of implementations is in `flash_attention_registry.torch_state`.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "INDUCTOR_CONFIG",
    "UnknownTorchError",
    "chosen_backend",
    "cpp_wrapper",
    "keys_of",
    "python_kernels",
    "schema_of",
    "take_out",
]

INDUCTOR_CONFIG = "torch._inductor.config"
"""The module of Inductor's configuration."""


class UnknownTorchError(RuntimeError):
    """This torch differs from those that are known, in something that cannot be done without."""


def python_kernels() -> set[str] | None:
    """Return torch's bookkeeping of Python kernels itself, with keys such as `"aten/add/CPU"`.

    None if it has another form: then overrides of other libraries that were there before ours are
    not noticed, and torch's own FA3 and FA4 of before 2.13 cannot be installed on top of ours.
    """
    return _set_of_keys(getattr(torch.library, "_impls", None))


def keys_of(library: Any) -> set[str] | None:
    """Return which of those keys a `torch.library.Library` has added; None as above."""
    return _set_of_keys(getattr(library, "_op_impls", None))


def _set_of_keys(found: object) -> set[str] | None:
    if not isinstance(found, set):
        return None
    some = next(iter(found), "aten/op/key")
    return found if isinstance(some, str) and some.count("/") == 2 else None


def take_out(library: Any) -> None:
    """Take the kernels of a `torch.library.Library` out of the dispatcher.

    Torch does so by itself when a library is freed. The caller drops its references, so that it is
    taken out then where torch offers no way to do it now.
    """
    destroy = getattr(library, "_destroy", None)
    if callable(destroy):
        destroy()


def schema_of(op: str) -> torch.FunctionSchema | None:
    """Return the schema of an op's default overload in this torch, None if it has no such op.

    Raises:
        UnknownTorchError: The op is there, and torch does not tell its schema.
    """
    packet = getattr(torch.ops.aten, op, None)
    if packet is None:
        return None
    schema = getattr(packet.default, "_schema", None)
    if not isinstance(schema, torch.FunctionSchema):
        raise UnknownTorchError(
            f"torch {torch.__version__} does not tell the schema of aten::{op} in a way that is "
            f"known here, so its calls cannot be served. Upgrade flash-attention-registry."
        )
    return schema


def chosen_backend(
    query: Tensor, mask: Tensor | None, dropout_p: float, causal: bool
) -> int | None:
    """Return the backend that torch chooses for self-attention, as a number of `SDPBackend`.

    None if this torch does not tell: the diagnosis then says less about typical calls.

    Args:
        query: `[B, H, S, D]`, also in the place of key and value.
        mask: Broadcastable to `[B, H, S, S]`, or None.
        dropout_p: As in training.
        causal: Whether the call is causal.
    """
    try:
        chosen = torch._fused_sdp_choice(
            query, query, query, mask, dropout_p=dropout_p, is_causal=causal
        )
        return int(chosen)
    except (AttributeError, TypeError, ValueError):
        return None


def cpp_wrapper() -> bool | None:
    """Return whether Inductor is set to generate code in C++.

    None if its configuration has not been loaded, or has no such setting: the environment variable
    that it reads is then all that there is to go by.
    """
    setting = getattr(sys.modules.get(INDUCTOR_CONFIG), "cpp_wrapper", None)
    return None if setting is None else bool(setting)
