"""What goes wrong in the registry of torch 2.11 to 2.13, row by row, and does not go wrong here.

Each docstring says what torch's does. `ab` has the implementations `a`, which is active, and `b`.
What torch leaves behind when its own FA3 fails is in `test_torch_registry`.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from flash_attention_registry import (
    HandleError,
    ReentrantTransitionError,
    RegistryWarning,
    RestoreError,
    UnknownImplError,
)
from flash_attention_registry.scope import ImplScope


def test_activating_an_unknown_name(ab, kernels):
    """Torch's removes the active implementation, and only then looks the name up."""
    with pytest.raises(UnknownImplError, match=r"Unknown flash attention impl 'x'.*\['a', 'b'\]"):
        ab.activate("x")
    assert (ab.current(), kernels.installed, kernels.removals) == ("a", ["a"], [])


def test_a_register_fn_that_raises(ab, kernels, failing):
    """Torch's has removed the active one by then and is left with none."""
    ab.register("c", register_fn=failing(ImportError("no module named flash_attn")))
    with pytest.raises(ImportError, match="flash_attn"):
        ab.activate("c")
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_a_register_fn_that_returns_none(ab, kernels):
    """Torch's says that nothing is active while the kernels run, and stacks the next on top."""
    ab.register("c", register_fn=kernels.installer_without_handle("c"))
    ab.activate("c")
    assert (ab.current(), kernels.running) == ("c", "c")
    with pytest.warns(RegistryWarning, match="cannot be removed"):
        ab.restore()
    assert ab.current() is None


def test_the_one_after_a_register_fn_that_returned_none(ab, kernels):
    """Torch's goes back, from the next one, to kernels that it does not know of."""
    ab.register("c", register_fn=kernels.installer_without_handle("c"))
    ab.activate("c")
    with pytest.warns(RegistryWarning, match="Left flash attention impl 'c'"):
        ab.activate("b")
    assert (ab.current(), kernels.running) == ("b", "b")
    ab.restore()
    assert ab.current() is None


def test_activating_the_active_name(ab, kernels):
    """Torch's removes it and registers it again."""
    before = kernels.installed[0]
    ab.activate("a")
    assert kernels.installed[0] is before
    assert kernels.removals == []


def test_a_remove_that_raises(ab, kernels):
    """Torch's is stuck: every later call raises the same error again."""
    ab.register("c", register_fn=kernels.installer_with_stuck_handle("c", OSError("busy")))
    ab.activate("c")
    with pytest.raises(RestoreError, match="busy"):
        ab.activate("b")
    assert (ab.current(), kernels.running) == ("b", "b")
    ab.activate("a")
    ab.restore()
    assert ab.current() is None


def test_a_handle_without_remove(ab, kernels):
    """Torch's takes it, and is stuck at the next switch."""
    ab.register("c", register_fn=object)
    with pytest.raises(HandleError, match=r"without a callable remove\(\)"):
        ab.activate("c")
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_registering_the_active_name_again(ab, kernels):
    """Torch's replaces the function without a word; what is active is then not what is named."""
    ab.register("a", register_fn=kernels.installer("newer a"))
    assert (ab.current(), kernels.running) == ("a", "a")
    ab.activate("a")
    assert (ab.current(), kernels.installed) == ("a", ["newer a"])


def test_a_register_fn_that_activates_another_one(ab, kernels):
    """Torch's overwrites the inner handle: those kernels can never be removed."""
    ab.register("c", register_fn=lambda: ab.activate("b"))
    with pytest.raises(ReentrantTransitionError, match="middle of another transition"):
        ab.activate("c")
    assert (ab.current(), kernels.installed) == ("a", ["a"])


@pytest.mark.parametrize("register_fn", [None, "package:function", 3])
def test_a_register_fn_that_cannot_be_called(ab, register_fn):
    """Torch's takes it, and lists a name that it does not know or cannot call."""
    with pytest.raises(TypeError, match=r"register_fn .* must be callable"):
        ab.register("c", register_fn=register_fn)
    assert ab.names() == ["a", "b"]


@pytest.mark.parametrize(("name", "error"), [("", ValueError), (7, TypeError), (None, TypeError)])
def test_a_name_that_is_none(ab, kernels, name, error):
    """Torch's takes it; with names of several types its list raises."""
    with pytest.raises(error, match="impl must be a"):
        ab.register(name, register_fn=kernels.installer("c"))
    assert ab.names() == ["a", "b"]


def test_a_half_finished_register_fn_whose_exception_is_kept(ab, kernels):
    """In torch's the traceback keeps the library alive, and its kernels run for as long."""

    class Library:
        pass

    built = []

    def half_way():
        library = Library()
        built.append(weakref.ref(library))
        raise OSError("no symbol")

    ab.register("c", register_fn=half_way)
    gc.disable()
    try:
        with pytest.raises(OSError, match="no symbol") as kept:
            ab.activate("c")
        assert built[0]() is None
    finally:
        gc.enable()
    assert kept.value.__traceback__ is not None
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def fail_inside(scope, kernels):
    with scope:
        assert kernels.running == "b"
        raise KeyError("of the program")


def test_leaving_a_scope(ab, kernels):
    """Torch's has none: who restores in a `finally` loses what was active before."""
    with pytest.raises(KeyError, match="of the program"):
        fail_inside(ImplScope(ab, "b"), kernels)
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_unregistering(ab, kernels):
    """Torch's has no way to: what was registered is listed for ever."""
    ab.unregister("a")
    assert (ab.names(), ab.current(), kernels.installed) == (["b"], None, [])


def test_asking_before_activating(ab):
    """Torch's has no way to: that something cannot run here is found out when it has failed."""
    ab.register("c", register_fn=pytest.fail, availability=lambda: "needs a GPU of type sm_90")
    reports = {report.name: report for report in ab.explain()}
    assert reports["c"].unavailable_reason == "needs a GPU of type sm_90"
    assert ab.current() == "a"


def test_what_an_installed_distribution_offers(site, installed):
    """Torch's knows it only once the program has imported it."""
    site.install("offering", "1 / 0", provides={"offered": "offering:register"})
    assert "offered" in installed.names()


def test_what_the_environment_asks_for(ab, asked):
    """Torch's documentation speaks of environment variables, and there is none."""
    asked("b")
    ab.request.activate()
    assert ab.current() == "b"


def test_two_threads_at_once(ab, kernels):
    """Torch's takes no lock: both remove what is active, and the kernels of one are never found."""
    both = threading.Barrier(2)
    install = kernels.installer("c")
    ab.register("c", register_fn=lambda: time.sleep(0.05) or install())

    def activate(name):
        both.wait(20)
        ab.activate(name)

    threads = [threading.Thread(target=activate, args=(name,)) for name in "bc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert kernels.installed == [ab.current()]
    ab.restore()
    assert kernels.installed == []
