"""The environment variables that users set, parsed strictly.

| variable | value |
|---|---|
| `FLASH_ATTENTION_IMPL` | a name, a family, or several after one another, separated by commas |
| `FLASH_ATTENTION_IMPL_STRICT` | `1`: what cannot be activated or served is an error |
| `FLASH_ATTENTION_IMPL_DISABLE` | names and families, separated by commas, that must not be used |

Each is read when it is asked for, so that a child process, however it was started, sees what it was
given. A blank value is none at all. Values are names and never modules or paths: only what an
installed distribution declares, or what a program registers itself, can be reached through them.
"""

from __future__ import annotations

import os

from flash_attention_registry.errors import EnvironmentVariableError

IMPL = "FLASH_ATTENTION_IMPL"
"""What to activate: a preference list of names and families."""

STRICT = "FLASH_ATTENTION_IMPL_STRICT"
"""Whether what cannot be activated, or a call that cannot be served, is an error."""

DISABLE = "FLASH_ATTENTION_IMPL_DISABLE"
"""The names and families that must not be used."""

NATIVE = "native"
"""Stands for torch's own kernels, alone or as the last resort of a list."""

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


def requested() -> tuple[str, ...]:
    """Return what `FLASH_ATTENTION_IMPL` asks for, the most wanted first; empty if nothing.

    Raises:
        EnvironmentVariableError: The list has an empty place, or goes on after `native`.
    """
    names = _names(IMPL)
    if NATIVE in names[:-1]:
        raise EnvironmentVariableError(
            f"{IMPL}={os.environ[IMPL]!r}: what follows {NATIVE!r} would never be used, because "
            f"torch's own kernels are always there. Put {NATIVE!r} last, or leave it out."
        )
    return names


def strict() -> bool:
    """Return whether `FLASH_ATTENTION_IMPL_STRICT` is set.

    Raises:
        EnvironmentVariableError: Its value is no boolean.
    """
    value = os.environ.get(STRICT, "").strip()
    if value.lower() in _TRUE:
        return True
    if not value or value.lower() in _FALSE:
        return False
    raise EnvironmentVariableError(
        f"{STRICT}={value!r} is neither yes nor no. Set it to 1 (or {', '.join(_TRUE[1:])}) or "
        f"to 0 (or {', '.join(_FALSE[1:])}), or unset it."
    )


def disabled() -> frozenset[str]:
    """Return the names and families that `FLASH_ATTENTION_IMPL_DISABLE` lists.

    Raises:
        EnvironmentVariableError: The list has an empty place.
    """
    return frozenset(_names(DISABLE))


def check() -> None:
    """Raise if one of the variables cannot be understood, needed or not.

    Raises:
        EnvironmentVariableError: It says of each of them what is the matter.
    """
    problems = []
    for read in (requested, strict, disabled):
        try:
            read()
        except EnvironmentVariableError as error:
            problems.append(str(error))
    if problems:
        raise EnvironmentVariableError("\n".join(problems))


def why_disabled(name: str, family: str | None = None) -> str | None:
    """Return why the user does not want this implementation used, or None.

    Args:
        name: The implementation's name.
        family: Its family, if that is known.

    Raises:
        EnvironmentVariableError: `FLASH_ATTENTION_IMPL_DISABLE` cannot be read.
    """
    if DISABLE not in os.environ:
        return None
    names = disabled()
    if name in names:
        return f"it is disabled by {DISABLE}={os.environ[DISABLE]}"
    if family in names:
        return f"its family {family} is disabled by {DISABLE}={os.environ[DISABLE]}"
    return None


def _names(variable: str) -> tuple[str, ...]:
    """Return the items of a comma-separated list, without the space around them."""
    value = os.environ.get(variable, "")
    if not value.strip():
        return ()
    names = tuple(name.strip() for name in value.split(","))
    if "" in names:
        raise EnvironmentVariableError(
            f"{variable}={value!r} has an empty place in its list of names. Separate names by "
            f"single commas, as in {variable}=fa4-cuda,fa4-triton."
        )
    return names
