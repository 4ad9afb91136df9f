"""Any history of calls, with anything failing: what is said to be active is what runs."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("hypothesis")

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flash_attention_registry import (
    FamilyUnavailableError,
    ImplUnavailableError,
    NotRegisteredError,
    Registry,
    RestoreError,
    UnknownImplError,
)
from flash_attention_registry.discovery import Discovery
from flash_attention_registry.scope import ImplScope

NAMES = st.sampled_from(["a", "b", "c"])
FAILURES = st.frozensets(st.sampled_from(["prepare", "install", "remove", "availability"]))


class Planned(Exception):
    """A failure that the history asked for."""


class Histories(RuleBasedStateMachine):
    """Registers, activates and removes three implementations that fail as planned."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry(Discovery(prefix="nothing.is.declared.in.such.a.group"))
        self.running: list[object] = []
        self.failures: dict[str, frozenset[str]] = {}
        self.scopes: list[object] = []

    def fail_if_planned(self, name: str, what: str) -> None:
        if what in self.failures[name]:
            raise Planned(f"{what} of {name}")

    def install(self, name: str) -> object:
        machine = self

        class Handle:
            of = name

            def remove(self) -> None:
                machine.running.remove(self)
                # Fails after its work: kernels that stay are the subject of another test.
                machine.fail_if_planned(name, "remove")

        self.fail_if_planned(name, "install")
        handle = Handle()
        self.running.append(handle)
        return handle

    def change(self, call: object, *arguments: object) -> None:
        """Make a change; if it is refused before it begins, nothing may have changed."""
        before = list(self.running)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                call(*arguments)
            except (Planned, RestoreError, FamilyUnavailableError):
                pass
            except (UnknownImplError, NotRegisteredError, ImplUnavailableError):
                assert self.running == before

    @rule(name=NAMES, failures=FAILURES, in_family=st.booleans(), priority=st.integers(0, 1))
    def register(self, name: str, failures: frozenset[str], in_family: bool, priority: int) -> None:
        self.failures[name] = failures
        self.registry.register(
            name,
            register_fn=lambda: self.install(name),
            family="FA4" if in_family else None,
            priority=priority,
            availability=lambda: self.fail_if_planned(name, "availability"),
            prepare=lambda: self.fail_if_planned(name, "prepare"),
        )

    @rule(name=st.one_of(NAMES, st.just("FA4")))
    def activate(self, name: str) -> None:
        self.change(self.registry.activate, name)

    @rule()
    def restore(self) -> None:
        self.change(self.registry.restore)
        assert self.registry.current() is None

    @rule(name=NAMES)
    def unregister(self, name: str) -> None:
        self.change(self.registry.unregister, name)
        assert name not in self.registry.names()

    @rule(name=NAMES)
    def enter(self, name: str) -> None:
        scope = ImplScope(self.registry, name)
        self.change(lambda: (scope.__enter__(), self.scopes.append(scope)))

    @rule()
    def leave(self) -> None:
        if self.scopes:
            self.change(self.scopes.pop().__exit__, None, None, None)

    @rule()
    def reset(self) -> None:
        snapshot = self.registry.snapshot()
        active, names = self.registry.current(), self.registry.names()
        self.change(self.registry.restore)
        for name in names:
            self.change(self.registry.unregister, name)
        self.change(self.registry.reset, snapshot)
        assert self.registry.names() == names
        assert self.registry.current() in (active, None)

    @invariant()
    def what_is_said_is_what_runs(self) -> None:
        name = self.registry.current()
        assert [handle.of for handle in self.running] == ([] if name is None else [name])
        assert name is None or name in self.registry.names()


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, database=None
)
