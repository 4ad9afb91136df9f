"""The state of torch's own registry, as far as its module lets itself be read and written.

Torch offers no way to be told of changes or to name what is active, so two private names of its
module are used. They are checked at every use, since torch may change them. Torch's registry takes
no lock: what is written here is written only in the place of what has been looked at.
"""

from __future__ import annotations

import sys

from flash_attention_registry.indivisible import compare_and_set

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Entry = tuple[Any, Any]

MODULE = "torch.nn.attention._registry"
"""Where torch keeps its registry."""

ACTIVE = "_FLASH_ATTENTION_ACTIVE"
"""What names the active implementation there: None, or its name and its handle."""

IMPLS = "_FLASH_ATTENTION_IMPLS"
"""What holds the `register_fn` of each name there."""


def loaded() -> Any:
    """Return the module of torch's registry if it has been imported and is of a known form.

    `why_apart` says what is the matter if it has been imported and this returns None.
    """
    module = sys.modules.get(MODULE)
    return module if module is not None and why_apart() is None else None


def why_apart() -> str | None:
    """Return why the registry of the imported torch is not kept in step, or None if it is."""
    module = sys.modules.get(MODULE)
    if module is None:
        return "torch has not been imported"
    active = getattr(module, ACTIVE, ())
    known_form = active is None or (isinstance(active, tuple) and len(active) == 2)
    if known_form and isinstance(getattr(module, IMPLS, None), dict):
        return None
    return (
        f"{MODULE} of this torch is not of the form that torch 2.11 to 2.13 have, so what is "
        f"activated there is not seen here, and the other way round"
    )


def active_there(module: Any) -> Entry | None:
    """Return what torch's registry holds as active: name and handle, or None."""
    entry: Entry | None = getattr(module, ACTIVE)
    return entry


def impls_there(module: Any) -> dict[Any, Any]:
    """Return the table of torch's registry itself: each name's `register_fn`."""
    table: dict[Any, Any] = getattr(module, IMPLS)
    return table


def replace_active(module: Any, seen: Entry | None, new: Entry | None) -> bool:
    """Let torch's registry hold `new` as active if it still holds `seen`; return whether it did."""
    return compare_and_set(vars(module), ACTIVE, seen, new)
