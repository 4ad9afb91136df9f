"""An interrupt at any step of the registry's own code: no lock stays held, what is named runs.

Every history below is run again and again, with a `KeyboardInterrupt` at its first step, at its
second, and so on until one run comes through without. A step is a line; for some histories it is an
instruction of the interpreter, which is as fine as interrupts can come.
"""

from __future__ import annotations

import sys
import threading
import warnings
from pathlib import Path

import pytest

import flash_attention_registry
from flash_attention_registry import HandleError, Registry, RestoreError, before_using_cuda
from flash_attention_registry.discovery import Discovery, Scan
from flash_attention_registry.scope import ImplScope

PACKAGE = str(Path(flash_attention_registry.__file__).parent)
SECONDS = 5  # within which another thread must get its turn


class Planned(Exception):
    """A failure that belongs to the history."""


class Interrupt:
    """Raises `KeyboardInterrupt` at one step of the package's code.

    Attributes:
        where: The line at which it was raised; None if there were not as many steps.
    """

    def __init__(self, step: int, event: str) -> None:
        self.left = step
        self.event = event
        self.where: str | None = None

    def during(self, action) -> None:
        tracing = sys.gettrace()
        sys.settrace(self._enter)
        try:
            action()
        except (KeyboardInterrupt, Planned, HandleError, RestoreError):
            pass
        finally:
            sys.settrace(tracing)

    def _enter(self, frame, _event, _argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = self.event == "opcode"
        return self._step

    def _step(self, frame, event, _argument):
        if event == self.event:
            self.left -= 1
            if self.left == 0:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._step


class Stage:
    """A registry in which everything goes wrong that can, and the kernels that it installs."""

    def __init__(self, kernels, *, in_step_with_torch: bool = False) -> None:
        self.kernels = kernels
        discovery = Discovery(prefix="nothing.is.declared.in.such.a.group")
        discovery.restore((Scan({}, ()), {}))  # as if the metadata had been read, which takes long
        self.registry = Registry(discovery, in_step_with_torch=in_step_with_torch)
        self.calm = False  # whether nothing goes wrong any more
        self.heard: list[tuple[str | None, str | None]] = []
        self.registry.add_listener(lambda before, after: self.heard.append((before, after)))
        self.register("a", prepare=lambda: None, family="family")
        self.register("b", family="family", priority=1)
        self.register("raises", at_install=Planned)
        self.register("is interrupted", at_install=KeyboardInterrupt)
        self.register("comes once", at_install=Planned, spared=1)
        self.register("leaves with an error", at_remove=Planned)
        self.register("leaves interrupted", at_remove=KeyboardInterrupt)
        self.register("c")
        self.registry.register("gives no handle", register_fn=object)

    def register(self, name, *, at_install=None, at_remove=None, spared=0, **options) -> None:
        self.registry.register(
            name, register_fn=self.installer(name, at_install, at_remove, spared), **options
        )

    def installer(self, name, at_install=None, at_remove=None, spared=0):
        """A `register_fn` that raises from a given time on, or whose handles raise."""
        installations = []

        def install():
            installations.append(name)
            if at_install is not None and len(installations) > spared and not self.calm:
                raise at_install
            library = self.kernels.installer(name)()
            remove = library.remove

            def remove_and_raise():
                remove()
                if at_remove is not None and not self.calm:
                    raise at_remove

            library.remove = remove_and_raise
            return library

        return install

    def use(self, name) -> None:
        with ImplScope(self.registry, name):
            pass

    def check(self) -> None:
        """What must hold after any history, and what must go on to work."""
        self.calm = True
        name = self.registry.current()
        assert self.kernels.installed == ([] if name is None else [name])
        assert not self.registry.in_transition()
        before_using_cuda()
        self.check_of_others()
        for change in (lambda: self.registry.activate("a"), self.registry.restore):
            thread = threading.Thread(target=change, daemon=True)
            thread.start()
            thread.join(SECONDS)
            assert not thread.is_alive()
        assert (self.registry.current(), self.kernels.installed) == (None, [])
        self.registry.activate("b")
        assert (self.registry.current(), self.kernels.installed) == ("b", ["b"])
        assert self.heard[-2:] == [("a", None), (None, "b")]

    def check_of_others(self) -> None:
        """What a special stage has to check."""


def interrupted_at_every_step(make_stage, before, history, event) -> int:
    """Run a history once for each of its steps; return how many there are."""
    step = 0
    while True:
        step += 1
        stage, interrupt = make_stage(), Interrupt(step, event)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before(stage)
            stage.heard.clear()
            interrupt.during(lambda stage=stage: history(stage))
            try:
                stage.check()
            except BaseException as error:
                pytest.fail(f"after an interrupt at {interrupt.where} (step {step}): {error!r}")
        if interrupt.where is None:
            return step - 1


def nothing(_stage):
    pass


def activate(name):
    return lambda stage: stage.registry.activate(name)


# What is done before, and what is interrupted.
HISTORIES = {
    "activate": (nothing, activate("a")),
    "activate again": (activate("a"), activate("a")),
    "switch": (activate("a"), activate("b")),
    "activate a family": (nothing, activate("family")),
    "restore": (activate("a"), lambda stage: stage.registry.restore()),
    "a register_fn that raises": (activate("a"), activate("raises")),
    "a register_fn that is interrupted": (activate("a"), activate("is interrupted")),
    "a handle that is none": (activate("a"), activate("gives no handle")),
    "a remove that raises": (activate("leaves with an error"), activate("a")),
    "a remove and a register_fn that raise": (
        activate("leaves with an error"),
        activate("raises"),
    ),
    "a remove that is interrupted": (activate("leaves interrupted"), activate("a")),
    "a way back that fails": (activate("comes once"), activate("raises")),
    "use": (activate("a"), lambda stage: stage.use("b")),
    "use, from stock": (nothing, lambda stage: stage.use("b")),
    "use what raises": (activate("a"), lambda stage: stage.use("raises")),
    "use, with no way back": (activate("comes once"), lambda stage: stage.use("b")),
    "unregister": (activate("c"), lambda stage: stage.registry.unregister("c")),
    "explain": (activate("a"), lambda stage: stage.registry.explain()),
    "reset": (activate("a"), lambda stage: stage.registry.reset(stage.registry.snapshot())),
}
BY_INSTRUCTION = ["switch", "a register_fn that raises", "a remove that raises", "use"]


@pytest.mark.parametrize(("before", "history"), HISTORIES.values(), ids=HISTORIES)
def test_an_interrupt_at_any_line(kernels_type, before, history):
    steps = interrupted_at_every_step(lambda: Stage(kernels_type()), before, history, "line")
    assert steps > 20


@pytest.mark.parametrize("name", BY_INSTRUCTION)
def test_an_interrupt_at_any_instruction(kernels_type, name):
    before, history = HISTORIES[name]
    steps = interrupted_at_every_step(lambda: Stage(kernels_type()), before, history, "opcode")
    assert steps > 200
