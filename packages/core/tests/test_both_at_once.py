"""Our registry in one thread and torch's in another: no handle is lost, both agree in the end.

Torch's registry takes no lock. What may happen to its callers is its own affair; what was
installed, on whichever side, must be removed when something else is active.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading

import pytest

from flash_attention_registry import Registry
from flash_attention_registry.discovery import Discovery

SECONDS = 60  # a test that takes longer hangs

pytestmark = pytest.mark.filterwarnings("ignore::flash_attention_registry.RegistryWarning")


class Installed:
    """Handles that were given and not removed yet; like torch's they may be removed again."""

    def __init__(self) -> None:
        self.handles: dict[object, str] = {}

    def installer(self, name):
        installed = self

        class Handle:
            def remove(self) -> None:
                installed.handles.pop(self, None)

        def install():
            handle = Handle()
            installed.handles[handle] = name
            return handle

        return install

    def names(self) -> list[str]:
        return list(self.handles.values())


@pytest.fixture
def installed(torchs):
    return Installed()


@pytest.fixture
def ours(torchs, installed):
    """A registry of `a` and `b`, in step with torch's, which has `X` and `Y`."""
    nowhere = Discovery(prefix="nothing.is.declared.in.such.a.group")
    registry = Registry(nowhere, in_step_with_torch=True)
    for name in ("a", "b"):
        registry.register(name, register_fn=installed.installer(name))
    for name in ("X", "Y"):
        torchs.register_flash_attention_impl(name, register_fn=installed.installer(name))
    return registry


@pytest.fixture
def rapid_switching():
    """Threads take turns after a few instructions each."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(*functions):
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,), daemon=True) for one in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert errors == []


def check(ours, torchs, installed):
    """What must hold when nobody is at work: one transition settles who is named."""
    ours.show_to_torch()
    name = ours.current()
    own = None if name is None else name.removeprefix("torch:")
    assert torchs.current() == own
    assert installed.names() == ([] if own is None else [own])
    if name is not None:
        ours.restore()
    assert (ours.current(), torchs.current(), installed.names()) == (None, None, [])


@pytest.mark.usefixtures("rapid_switching")
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("here", "there"),
    [
        (["torch:X"], ["X"]),
        (["a", "torch:X"], ["X", "Y"]),
        (["a", "b", "torch:X", "torch:Y", None], ["a", "X", "Y", None]),
    ],
    ids=["the same one", "torch's on both sides", "everything"],
)
def test_no_handle_is_lost(ours, torchs, installed, here, there, seed):
    choices = random.Random(seed)
    ours_do, torchs_do = choices.choices(here, k=60), choices.choices(there, k=60)

    def use_ours():
        for name in ours_do:
            ours.restore() if name is None else ours.activate(name)

    def use_torchs():
        for name in torchs_do:
            with contextlib.suppress(TypeError):  # torch reads its variable twice
                if name is None:
                    torchs.restore_flash_attention_impl()
                else:
                    torchs.activate_flash_attention_impl(name)

    in_threads(use_ours, use_torchs)
    check(ours, torchs, installed)


class Stops:
    """A `register_fn` that waits in the middle, so that another thread can do something."""

    def __init__(self, install) -> None:
        self.install = install
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self):
        handle = self.install()
        self.inside.set()
        assert self.go_on.wait(SECONDS)
        return handle


def test_what_is_activated_there_while_ours_installs_torchs_is_not_taken_for_it(
    ours, torchs, installed
):
    stops = Stops(installed.installer("X"))
    torchs.register_flash_attention_impl("X", register_fn=stops)

    def use_torchs():
        assert stops.inside.wait(SECONDS)
        torchs.activate_flash_attention_impl("Y")
        stops.go_on.set()

    in_threads(lambda: ours.activate("torch:X"), use_torchs)
    assert installed.names() == ["X", "Y"]
    check(ours, torchs, installed)


def test_what_is_activated_there_while_ours_switches_is_not_overwritten(ours, torchs, installed):
    stops = Stops(installed.installer("a"))
    ours.register("a", register_fn=stops)
    torchs.activate_flash_attention_impl("X")

    def use_torchs():
        assert stops.inside.wait(SECONDS)
        torchs.activate_flash_attention_impl("Y")
        stops.go_on.set()

    in_threads(lambda: ours.activate("a"), use_torchs)
    assert ours.current() == "torch:Y"
    check(ours, torchs, installed)


def test_ours_is_activated_while_torchs_installs_its_own(ours, torchs, installed):
    stops = Stops(installed.installer("X"))
    torchs.register_flash_attention_impl("X", register_fn=stops)

    def use_ours():
        assert stops.inside.wait(SECONDS)
        ours.activate("a")
        stops.go_on.set()

    in_threads(use_ours, lambda: torchs.activate_flash_attention_impl("X"))
    assert (ours.current(), torchs.current()) == ("torch:X", "X")
    check(ours, torchs, installed)
