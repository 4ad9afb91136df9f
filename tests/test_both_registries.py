"""Any history of calls on our registry and on torch's: both name the same, and that is what runs.

The model below knows only the promises: what a call does to the name that is active. What is
installed is a list of pretended kernels, the newest last, as torch's dispatcher stacks them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch.nn.attention._registry as torch_registry
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    rule,
    run_state_machine_as_test,
)

from flash_attention_registry import (
    ImplUnavailableError,
    NotRegisteredError,
    Registry,
    RestoreError,
    UnknownImplError,
)
from flash_attention_registry.discovery import Discovery
from flash_attention_registry.scope import ImplScope

OURS = st.sampled_from(["a", "b", "c"])
THEIRS = st.sampled_from(["X", "Y"])
ANY = st.one_of(OURS, st.sampled_from(["torch:X", "torch:Y", "nobody"]))
WAYS = ["none", "unavailable", "prepare raises", "install raises", "remove raises", "no handle"]
MISBEHAVIOURS = st.sampled_from(["none", *WAYS])
EXAMPLES = 2000


class Planned(Exception):
    """A failure that the history asked for."""


@dataclass(eq=False)
class Plan:
    """One registration, by whom and how it misbehaves; compared by identity."""

    name: str
    misbehaviour: str

    def fail_at(self, what: str) -> None:
        if self.misbehaviour == f"{what} raises":
            raise Planned(f"{what} of {self.name}")

    @property
    def without_handle(self) -> bool:
        return self.misbehaviour == "no handle"


class Kernels:
    """What is installed, and what can never be removed any more."""

    def __init__(self) -> None:
        self.running: list[Plan] = []
        self.left: list[Plan] = []

    def install(self, plan: Plan) -> Any:
        plan.fail_at("install")
        if plan.without_handle:
            self.running.append(plan)
            self.left.append(plan)
            return None
        kernels = self
        running = Plan(plan.name, plan.misbehaviour)
        self.running.append(running)

        class Handle:
            def remove(self) -> None:
                if plan.misbehaviour == "remove raises":
                    kernels.left.append(running)
                plan.fail_at("remove")
                if running in kernels.running:
                    kernels.running.remove(running)

        return Handle()


class BothRegistries(RuleBasedStateMachine):
    """Drives both registries at once; `self.active` is the model: the plan that is active.

    Attributes:
        histories: How many there were.
        asked_for: On which side, how, and with which misbehaviour implementations were activated.
    """

    histories = 0
    asked_for: ClassVar[set[tuple[str, str, str]]] = set()

    def __init__(self) -> None:
        super().__init__()
        BothRegistries.histories += 1
        self.before = dict(torch_registry._FLASH_ATTENTION_IMPLS)
        torch_registry._FLASH_ATTENTION_IMPLS.clear()
        assert torch_registry._FLASH_ATTENTION_ACTIVE is None
        self.registry = Registry(
            Discovery(prefix="nothing.is.declared.in.such.a.group"), in_step_with_torch=True
        )
        self.kernels = Kernels()
        self.plans: dict[str, Plan] = {}
        self.active: Plan | None = None
        # The registration that our registry holds it for; None while it has not looked.
        self.taken_for: Plan | None = None
        self.activated_there = False  # and not through our registry: torch's holds its own handle
        self.scopes: list[tuple[ImplScope, Plan | None]] = []

    def teardown(self) -> None:
        torch_registry._FLASH_ATTENTION_IMPLS.clear()
        torch_registry._FLASH_ATTENTION_IMPLS.update(self.before)
        torch_registry._FLASH_ATTENTION_ACTIVE = None

    # The model

    def look_at_torch(self) -> None:
        """A transition of ours takes what is active there for what is registered there by now."""
        if self.active is not None and self.taken_for is None:
            self.taken_for = self.plans[self.active.name]

    def note(self, side: str, how: str, name: str) -> None:
        """Note that `name` is asked for."""
        plan = self.plans.get(name) or self.plans.get(f"torch:{name}")
        if plan is not None:
            self.asked_for.add((side, how, plan.misbehaviour))

    def try_ours(self, name: str) -> Plan | None:
        """What is active after `name` was asked for on our side."""
        self.look_at_torch()
        plan = self.plans.get(name)
        refused = ["install raises", "unavailable", "prepare raises"]
        if name.startswith("torch:"):
            refused = refused[:1]  # torch's registry has neither check nor preparation
        if plan is None or plan is self.taken_for:
            return self.active
        if plan.misbehaviour not in refused:
            return plan
        if plan.misbehaviour != "install raises" or self.active is None:
            return self.active
        if self.active.without_handle:
            return self.active
        self.activated_there = False
        return self.put_back(self.taken_for)

    def put_back(self, plan: Plan | None) -> Plan | None:
        """It was installed once, unless torch's registry has had another by its name since."""
        return None if plan is None or plan.misbehaviour == "install raises" else plan

    def try_theirs(self, own_name: str) -> Plan | None:
        """What is active after `own_name` was asked for on torch's side, which restores first."""
        if self.is_stuck():
            return self.active
        self.active = self.taken_for = None
        plan = self.plans.get(own_name) or self.plans[f"torch:{own_name}"]
        if plan.name.startswith("torch:"):
            # Torch's registry forgets what gave it no handle.
            return None if plan.misbehaviour in ("install raises", "no handle") else plan
        return self.try_ours(plan.name)

    def is_stuck(self) -> bool:
        """Whether torch's registry fails at every restore, as it does if its handle raises."""
        active = self.active
        return (
            active is not None and self.activated_there and active.misbehaviour == "remove raises"
        )

    @contextlib.contextmanager
    def expecting(self, after: Plan | None, *, on_torch: bool = False) -> Iterator[None]:
        """Run a call, whose errors must be the planned ones, and move the model."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield
            except (Planned, RestoreError, UnknownImplError, NotRegisteredError):
                pass
            except (ImplUnavailableError, ValueError) as error:
                if not any(text in str(error) for text in ("not available", "Unknown flash")):
                    raise
        if after is not self.active:
            there = on_torch and after is not None and after.name.startswith("torch:")
            self.active, self.activated_there = after, there
            self.taken_for = None if there else after

    # Our side

    @rule(name=OURS, misbehaviour=MISBEHAVIOURS)
    def register(self, name: str, misbehaviour: str) -> None:
        self.look_at_torch()
        plan = self.plans[name] = Plan(name, misbehaviour)
        reason = "planned" if misbehaviour == "unavailable" else None
        self.registry.register(
            name,
            register_fn=lambda: self.kernels.install(plan),
            availability=lambda: reason,
            prepare=lambda: plan.fail_at("prepare"),
        )

    @rule(name=OURS)
    def unregister(self, name: str) -> None:
        self.look_at_torch()
        was_active = self.active is not None and self.active.name == name
        self.plans.pop(name, None)
        with self.expecting(None if was_active else self.active):
            self.registry.unregister(name)

    @rule(name=ANY)
    def activate(self, name: str) -> None:
        self.note("ours", "activate", name)
        with self.expecting(self.try_ours(name)):
            self.registry.activate(name)

    @rule()
    def restore(self) -> None:
        with self.expecting(None):
            self.registry.restore()

    @rule(name=ANY)
    def enter(self, name: str) -> None:
        self.note("ours", "use", name)
        self.look_at_torch()
        before = self.taken_for
        returned = False
        scope = ImplScope(self.registry, name)
        with self.expecting(self.try_ours(name)):
            try:
                scope.__enter__()
            except RestoreError:  # of what was left; without a scope it is returned to at once
                returned = True
            else:
                self.scopes.append((scope, before))
        if returned:
            self.active = self.taken_for = self.put_back(before)
            self.activated_there = False

    @rule()
    def leave(self) -> None:
        if not self.scopes:
            return
        self.look_at_torch()
        scope, before = self.scopes.pop()
        if before is not None and before.name not in self.plans:
            before = None
        with self.expecting(self.after_returning(before)):
            scope.__exit__(None, None, None)

    def after_returning(self, before: Plan | None) -> Plan | None:
        """What is active after a return to `before`."""
        return self.active if before is self.taken_for else self.put_back(before)

    # Torch's side

    @rule(name=THEIRS, misbehaviour=MISBEHAVIOURS)
    def register_there(self, name: str, misbehaviour: str) -> None:
        plan = self.plans[f"torch:{name}"] = Plan(f"torch:{name}", misbehaviour)
        install: Callable[[], Any] = lambda: self.kernels.install(plan)  # noqa: E731
        torch_registry.register_flash_attention_impl(name, register_fn=install)

    @rule(name=st.one_of(OURS, THEIRS, st.just("nobody")))
    def activate_there(self, name: str) -> None:
        self.note("torch's", "activate", name)
        if name not in torch_registry.list_flash_attention_impls():
            after = self.active if self.is_stuck() else None
        else:
            after = self.try_theirs(name)
        with self.expecting(after, on_torch=True):
            torch_registry.activate_flash_attention_impl(name)

    @rule()
    def restore_there(self) -> None:
        with self.expecting(self.active if self.is_stuck() else None, on_torch=True):
            torch_registry.restore_flash_attention_impl()

    # What must hold

    @invariant()
    def both_name_the_same(self) -> None:
        expected = None if self.active is None else self.active.name
        assert self.registry.current() == expected
        theirs = torch_registry.current_flash_attention_impl()
        assert theirs == (None if expected is None else expected.removeprefix("torch:"))

    @invariant()
    def what_is_named_is_what_runs(self) -> None:
        kept = [kernel for kernel in self.kernels.running if kernel not in self.kernels.left]
        if self.active is None or self.active.without_handle or kept == []:
            assert kept == []
            return
        (kernel,) = kept
        assert kernel.name == self.active.name
        assert self.kernels.running[-1] is kernel

    @invariant()
    def both_list_the_same(self) -> None:
        ours = {name for name in self.plans if not name.startswith("torch:")}
        theirs = {name for name in self.plans if name.startswith("torch:")}
        assert self.registry.names() == sorted(ours | theirs)
        listed = {name.removeprefix("torch:") for name in ours | theirs}
        assert torch_registry.list_flash_attention_impls() == sorted(listed)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_registry.logger, "disabled", True)


def test_after_any_history_both_name_what_runs() -> None:
    BothRegistries.histories, BothRegistries.asked_for = 0, set()
    run_state_machine_as_test(
        BothRegistries,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=20, deadline=None, database=None
        ),
    )
    assert BothRegistries.histories >= EXAMPLES
    assert BothRegistries.asked_for == {
        (side, how, what)
        for side, hows in {"ours": ["activate", "use"], "torch's": ["activate"]}.items()
        for how in hows
        for what in WAYS
    }
