"""An interrupt at any step of the registry's own code: no lock stays held, what is named runs.

Every history below is run again and again, with a `KeyboardInterrupt` at its first step, at its
second, and so on until one run comes through without. A step is a line; for some histories it is an
instruction of the interpreter, which is as fine as interrupts can come.
"""

from __future__ import annotations

import sys
import threading
import types
import warnings
from pathlib import Path

import pytest

import flash_attention_registry
from flash_attention_registry import (
    HandleError,
    Registry,
    RestoreError,
    before_using_cuda,
    request,
)
from flash_attention_registry.discovery import Discovery, Scan
from flash_attention_registry.half_built import undo_on_failure
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
        # Python 3.12 traces instructions only if a frame has asked for it before tracing begins.
        sys._getframe().f_trace_opcodes = self.event == "opcode"
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
        self.registry.register(
            "gives no handle", register_fn=lambda: self.leave_half_built("gives no handle")
        )

    def register(self, name, *, at_install=None, at_remove=None, spared=0, **options) -> None:
        self.registry.register(
            name, register_fn=self.installer(name, at_install, at_remove, spared), **options
        )

    def installer(self, name, at_install=None, at_remove=None, spared=0):
        """A `register_fn` that raises half way from a given time on, or whose handles raise."""
        installations = []

        def install():
            installations.append(name)
            if at_install is not None and len(installations) > spared and not self.calm:
                self.leave_half_built(name)
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

    def leave_half_built(self, name) -> object:
        """Install kernels of which nobody gets the handle."""
        installed = self.kernels.installed

        def undo():
            if name in installed:
                installed.remove(name)

        undo_on_failure(undo)
        installed.append(name)
        return object()

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
    """Run a history once for each of its steps; return how many there are.

    In a thread of its own: an interrupt between two instructions of an `except` clause may come
    where the interpreter lets none come, and leave the error as what the thread is handling.
    """
    outcome = []

    def run():
        try:
            outcome.append(run_them(make_stage, before, history, event))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def run_them(make_stage, before, history, event) -> int:
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


# In step with torch's registry


class StageWithTorch(Stage):
    """A registry in step with torch's, which has an implementation `X` and one that raises."""

    def __init__(self, kernels, torchs) -> None:
        torchs._FLASH_ATTENTION_IMPLS.clear()
        torchs._FLASH_ATTENTION_ACTIVE = None
        self.torchs = torchs
        super().__init__(kernels, in_step_with_torch=True)
        torchs.register_flash_attention_impl("X", register_fn=self.installer("torch:X"))
        torchs.register_flash_attention_impl("bad", register_fn=self.installer("bad", Planned))

    def check_of_others(self) -> None:
        name = self.registry.current()
        assert self.torchs.current() == (None if name is None else name.removeprefix("torch:"))


def activate_there(name):
    return lambda stage: stage.torchs.activate_flash_attention_impl(name)


def restore_there(stage):
    stage.torchs.restore_flash_attention_impl()


HISTORIES_WITH_TORCH = {
    "activate torch's": (activate("a"), activate("torch:X")),
    "from torch's": (activate("torch:X"), activate("a")),
    "from torch's, activated there": (activate_there("X"), activate("a")),
    "restore torch's, activated there": (
        activate_there("X"),
        lambda stage: stage.registry.restore(),
    ),
    "a failure, torch's activated there": (activate_there("X"), activate("raises")),
    "a failure of torch's": (activate("a"), activate("torch:bad")),
    "look at what was activated there": (
        lambda stage: (activate("a")(stage), activate_there("X")(stage)),
        lambda stage: stage.registry.show_to_torch(),
    ),
    "activate ours there": (activate_there("X"), activate_there("a")),
    "activate torch's there": (activate("a"), activate_there("X")),
    "restore there": (activate("torch:X"), restore_there),
}


@pytest.mark.parametrize(
    ("before", "history"), HISTORIES_WITH_TORCH.values(), ids=HISTORIES_WITH_TORCH
)
def test_an_interrupt_at_any_line_in_step_with_torch(kernels_type, torchs, before, history):
    steps = interrupted_at_every_step(
        lambda: StageWithTorch(kernels_type(), torchs), before, history, "line"
    )
    assert steps > 20


@pytest.mark.parametrize("name", ["activate torch's", "from torch's, activated there"])
def test_an_interrupt_at_any_instruction_in_step_with_torch(kernels_type, torchs, name):
    before, history = HISTORIES_WITH_TORCH[name]
    steps = interrupted_at_every_step(
        lambda: StageWithTorch(kernels_type(), torchs), before, history, "opcode"
    )
    assert steps > 200


# What the environment asks for, and providers that are loaded


class StageOfInstalled(Stage):
    """A registry for which `installed` is offered by an entry point, and may need CUDA."""

    def __init__(self, kernels) -> None:
        super().__init__(kernels)
        entry = types.SimpleNamespace(
            name="installed",
            value="nowhere:register",
            conflict=None,
            register=lambda: self.register("installed", availability=before_using_cuda),
        )
        self.registry.discovery.restore((Scan({"installed": entry}, ()), {}))
        self.awaited: list[object] = []

    def honour(self) -> None:
        self.registry.request.honour(lambda *asked: self.awaited.append(asked))

    def check_of_others(self) -> None:
        settled = []
        settle = self.registry.request.settle
        thread = threading.Thread(target=lambda: settled.append(settle()), daemon=True)
        thread.start()
        thread.join(SECONDS)
        assert settled == [True]
        self.registry.activate("installed")
        assert self.registry.current() == "installed"
        self.registry.restore()


HISTORIES_OF_INSTALLED = {
    "load": ("", activate("installed")),
    "honour": ("b", lambda stage: stage.honour()),
    "honour what needs CUDA": ("installed", lambda stage: stage.honour()),
    "settle": ("installed", lambda stage: (stage.honour(), stage.registry.request.settle())),
    "activate what is requested": ("b", lambda stage: stage.registry.request.activate()),
    "in vain": ("raises,nobody", lambda stage: stage.honour()),
}


@pytest.mark.parametrize(
    ("impl", "history"), HISTORIES_OF_INSTALLED.values(), ids=HISTORIES_OF_INSTALLED
)
def test_an_interrupt_at_any_line_of_a_request(kernels_type, asked, impl, history, monkeypatch):
    # It changes nothing, and goes through all the modules that there are.
    monkeypatch.setattr(request, "_is_half_imported", lambda packages: False)
    asked(impl)
    steps = interrupted_at_every_step(
        lambda: StageOfInstalled(kernels_type()), nothing, history, "line"
    )
    assert steps > 20


def test_a_request_that_an_interrupt_breaks_off_is_pending(kernels_type, monkeypatch):
    monkeypatch.setattr(request, "_is_half_imported", lambda packages: False)
    step = 0
    while True:
        step += 1
        stage, interrupt = StageOfInstalled(kernels_type()), Interrupt(step, "line")
        stage.honour()
        registry, its_request = stage.registry, stage.registry.request
        its_request.ask(("b",))
        interrupt.during(its_request.resume)
        assert registry.current() == "b" or its_request.pending == ("b",), interrupt.where
        its_request.resume()
        assert (registry.current(), its_request.pending) == ("b", ()), interrupt.where
        if interrupt.where is None:
            break
    assert step > 20
