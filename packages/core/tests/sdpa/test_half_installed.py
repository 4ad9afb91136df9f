"""An activation that fails or is interrupted leaves no kernel set of its own in the routers."""

from __future__ import annotations

import linecache
import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import flash_attention_registry
from flash_attention_registry import HandleError, Registry, RegistryWarning
from flash_attention_registry.discovery import Discovery
from flash_attention_registry.sdpa import KernelSet, install, installed_kernel_sets

PACKAGE = str(Path(flash_attention_registry.__file__).parent)
QUERY = torch.randn(1, 2, 8, 16).to(torch.bfloat16)


class Nothing:
    """The handle of an implementation that does without `sdpa`."""

    def remove(self) -> None:
        """There is nothing to remove."""


class Stage:
    """A registry of implementations that fail, and of some to be active before."""

    def __init__(self, plain_kernels: Callable[..., Any]) -> None:
        self.make = plain_kernels
        self.sets: dict[str, Any] = {}
        self.registry = Registry(Discovery(prefix="nothing.is.declared.in.such.a.group"))
        for name, register_fn in {
            "other": lambda: self.install("other"),
            "other without a handle": lambda: self.install("other without a handle") and None,
            "not sdpa": Nothing,
            "raises": lambda: self.install("raises") and self.fail(OSError("half")),
            "is interrupted": lambda: self.install("interrupts") and self.fail(KeyboardInterrupt()),
            "gives no handle": lambda: (self.install("gives no handle"),),
            "cannot have two": self.install_two,
            "replaces its own": self.replace_its_own,
            "whole": lambda: self.install("whole"),
        }.items():
            self.registry.register(name, register_fn=register_fn)

    def install(self, name: str, device_type: str = "cpu", **changes: Any) -> Any:
        self.sets[name] = self.make(name, **changes)
        return install(self.sets[name], device_type)

    @staticmethod
    def fail(error: BaseException) -> None:
        raise error

    def install_two(self) -> Any:
        handle = self.install("on the CPU", "cpu")
        self.install("on the GPU", "cuda", device_types=frozenset({"cpu"}))
        return handle

    def replace_its_own(self) -> None:
        older = self.install("older")
        self.install("newer")
        older.remove()
        raise OSError("half")

    def prepare(self, before: str | None) -> None:
        """Put the routers in, empty, and let `before` be active."""
        install(self.make(), "cpu").remove()
        if before is not None:
            self.registry.activate(before)

    def serving(self) -> KernelSet | None:
        """Return which kernel set serves, as calls see it."""
        calls = {name: len(kernels.calls) for name, kernels in self.sets.items()}
        F.scaled_dot_product_attention(QUERY, QUERY, QUERY)
        served = [x for name, x in self.sets.items() if len(x.calls) > calls.get(name, 0)]
        assert served == list(installed_kernel_sets().values())
        return served[0] if served else None

    def named(self) -> KernelSet | None:
        """Return which kernel set is to serve, by the name of what is active."""
        name = self.registry.current()
        return None if name is None else self.sets.get(name)


BEFORE = [None, "other", "not sdpa", "other without a handle"]
FAILING = {
    "raises": OSError,
    "is interrupted": KeyboardInterrupt,
    "gives no handle": HandleError,
    "cannot have two": ValueError,
    "replaces its own": OSError,
}


@pytest.fixture
def stage(plain_kernels: type) -> Stage:
    return Stage(plain_kernels)


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize(("name", "error"), FAILING.items())
def test_what_was_active_serves_after_a_failure(
    stage: Stage, before: str | None, name: str, error: type[BaseException]
) -> None:
    stage.prepare(before)
    with pytest.raises(error):
        stage.registry.activate(name)
    assert stage.registry.current() == before
    assert stage.serving() is stage.named()


@pytest.mark.parametrize("name", FAILING)
def test_nothing_serves_after_a_failure_and_restore(stage: Stage, name: str) -> None:
    stage.prepare("other")
    with pytest.raises((Exception, KeyboardInterrupt)):
        stage.registry.activate(name)
    stage.registry.restore()
    assert stage.serving() is None


def test_what_was_installed_by_hand_serves_after_a_failure(stage: Stage) -> None:
    stage.install("by hand")
    with pytest.raises(OSError, match="half"):
        stage.registry.activate("raises")
    assert stage.serving() is stage.sets["by hand"]


def test_a_later_failure_leaves_what_has_succeeded_before(stage: Stage) -> None:
    stage.prepare("other without a handle")
    with pytest.warns(RegistryWarning, match="cannot be removed"):
        stage.registry.activate("whole")
    with pytest.raises(OSError, match="half"):
        stage.registry.activate("raises")
    assert stage.serving() is stage.named() is stage.sets["whole"]


class Interrupt:
    """Raises `KeyboardInterrupt` at one line of the package.

    Not at a `with`: on the way out of the block the tracer gets to where no interrupt comes, right
    before a lock's `__exit__`, which is written in C.
    """

    def __init__(self, step: int) -> None:
        self.left = step
        self.where: str | None = None

    def during(self, action: Callable[[], object]) -> None:
        tracing = sys.gettrace()
        sys.settrace(self._enter)
        try:
            action()
        except (KeyboardInterrupt, OSError):
            pass
        finally:
            sys.settrace(tracing)

    def _enter(self, frame: FrameType, _event: str, _argument: object) -> Any:
        return self._step if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _step(self, frame: FrameType, event: str, _argument: object) -> Any:
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not line.lstrip().startswith("with "):
            self.left -= 1
            if self.left == 0:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._step


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("name", ["raises", "whole"])
def test_what_is_named_serves_after_an_interrupt_at_any_line(
    plain_kernels: type, before: str | None, name: str
) -> None:
    lines: list[str] = []

    def interrupt_at_every_line() -> None:
        while True:
            stage, interrupt = Stage(plain_kernels), Interrupt(len(lines) + 1)
            stage.prepare(before)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                interrupt.during(partial(stage.registry.activate, name))
                if interrupt.where is None:
                    return
                lines.append(interrupt.where)
                assert stage.serving() is stage.named(), interrupt.where
                stage.registry.restore()
                if before != "other without a handle":
                    assert stage.serving() is None, interrupt.where

    in_its_own_thread(interrupt_at_every_line)
    assert len({line for line in lines if line.startswith("router.py")}) > 10


def in_its_own_thread(action: Callable[[], object]) -> None:
    """Call, so that what an interrupt leaves the interpreter handling ends with the thread."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
