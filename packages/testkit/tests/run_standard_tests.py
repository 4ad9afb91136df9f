"""Standard tests as plain calls: what a kernel set passes and fails, without a run of pytest."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from flash_attention_testkit.cases import SdpaCase

GUARD = "test_standard_tests_are_not_overridden"


def outcomes_of(
    cls: type,
    *,
    cases: Sequence[SdpaCase] = (),
    before: Callable[[], object] = lambda: None,
    leave_out: str = "",
    **fixtures: Any,
) -> dict[str, str]:
    """`"passed"`, `"failed"` or `"skipped"` by name and parameters.

    Args:
        cls: A group of standard tests.
        cases: What tests that take a `case` are called with.
        before: Is called before each test.
        leave_out: Name of a test that is not called.
        **fixtures: The fixtures there are. A test that takes another one is left out.
    """
    found = {}
    for name, test in inspect.getmembers(cls, inspect.isfunction):
        if name.startswith("test_") and name not in (GUARD, leave_out):
            for identity, parameters in _parametrised(test, cases):
                taken = fixtures | parameters
                wanted = [word for word in inspect.signature(test).parameters if word != "self"]
                if set(wanted) <= set(taken):
                    arguments = {word: taken[word] for word in wanted}
                    before()
                    found[f"{name}{identity}"] = _outcome(test, cls(), arguments)
    return found


def failed(outcomes: dict[str, str]) -> set[str]:
    """The names, without parameters, of tests that failed."""
    return {name.partition("[")[0] for name, outcome in outcomes.items() if outcome == "failed"}


def _outcome(test: Any, instance: object, arguments: dict[str, Any]) -> str:
    try:
        test(instance, **arguments)
    except pytest.skip.Exception:
        return "skipped"
    except Exception:
        return "failed"
    return "passed"


def _parametrised(test: Any, cases: Sequence[SdpaCase]) -> Iterator[tuple[str, dict[str, Any]]]:
    axes: list[list[tuple[str, Any]]] = []
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            name, values = mark.args
            axes.append([(name, value) for value in values])
    if "case" in inspect.signature(test).parameters:
        axes.append([("case", case) for case in cases])
    for chosen in itertools.product(*axes):
        identity = "-".join(str(value) for _, value in chosen)
        yield f"[{identity}]" if chosen else "", dict(chosen)
