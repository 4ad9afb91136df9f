"""Which provider is broken how, and which tests find it.

Each is a subclass of the plain kernel set with one step overridden; or a function that registers
or installs what misbehaves, or that plants a fault in an adapter of the registry, as providers
with adapters of their own may have it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from standard_run import Appear, Stage, offer

from broken.promises import DRAWN


@dataclass(frozen=True, slots=True)
class Broken:
    """A broken provider.

    A test's name stands for some of its parameters, ``name[pattern]`` for some that match.

    Attributes:
        appear: Makes it known.
        found_by: The tests that are named for the promise that it breaks. Each has to fail.
        also: Tests that fail in consequence. Each has to fail.
        perhaps: Tests that fail in consequence or do not, as it happens. No other one may fail.
        gpu: Whether it takes a CUDA device to see it.
    """

    appear: Appear
    found_by: tuple[str, ...]
    also: tuple[str, ...]
    perhaps: tuple[str, ...]
    gpu: bool

    @property
    def expected(self) -> tuple[str, ...]:
        """All tests that have to fail."""
        return self.found_by + self.also

    @property
    def allowed(self) -> tuple[str, ...]:
        """All tests that may fail: where results are wrong, also those of drawn cases."""
        wrong = any("_is_right" in test for test in self.expected)
        return (*self.expected, *self.perhaps, *([DRAWN] if wrong else []))


BROKEN: dict[str, Broken] = {}
"""All of them, by the name of the class or function."""


def found_by(
    *tests: str, also: tuple[str, ...] = (), perhaps: tuple[str, ...] = (), gpu: bool = False
) -> Callable[[Any], Any]:
    """Note a broken kernel set, or a function that lets a broken provider appear."""

    def note(described: Any) -> Any:
        name = described.__name__
        assert name not in BROKEN, f"there are two of {name}"
        appear = _offering(described) if isinstance(described, type) else described
        BROKEN[name] = Broken(appear, tests, also, perhaps, gpu)
        return described

    return note


def let_appear(name: str, stage: Stage) -> None:
    """Make one of them known."""
    BROKEN[name].appear(stage)


def unmatched(patterns: Collection[str], tests: Collection[str]) -> list[str]:
    """The patterns that stand for none of the tests."""
    return [pattern for pattern in patterns if not any(matches(pattern, test) for test in tests)]


def unexpected(tests: Collection[str], patterns: Collection[str]) -> list[str]:
    """The tests for which no pattern stands."""
    return [test for test in tests if not any(matches(pattern, test) for pattern in patterns)]


def matches(pattern: str, test: str) -> bool:
    """Whether ``name`` or ``name[pattern of parameters]`` stands for a test."""
    name, _, wanted = pattern.partition("[")
    found, _, parameters = test.partition("[")
    return name == found and fnmatchcase(parameters, wanted or "*")


def _offering(kernel_set: Any) -> Appear:
    return lambda stage: offer(kernel_set)
