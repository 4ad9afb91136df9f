"""The hook inside `import torch` waits for no lock whose holder may wait for that import."""

from __future__ import annotations

import threading
import types

import pytest

from flash_attention_registry import ImplUnavailableError
from flash_attention_registry.lock import Lock
from flash_attention_registry.waiting import BusyError, do_unless_busy, without_waiting

WAIT = 20  # seconds; a test that waits longer than this hangs


class Elsewhere:
    """Calls a function in another thread, which is held inside until it is released."""

    def __init__(self, call):
        self.inside, self.release = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=call, args=(self.hold,), daemon=True)
        self.thread.start()
        assert self.inside.wait(WAIT)

    def hold(self):
        self.inside.set()
        assert self.release.wait(WAIT)

    def finish(self):
        self.release.set()
        self.thread.join(WAIT)
        assert not self.thread.is_alive()


def never():
    pytest.fail("must not be called")


def test_a_lock_that_is_free_is_taken_either_way():
    lock = Lock()
    assert lock.hold(lock.is_mine)
    assert without_waiting(lambda: lock.hold(lock.is_mine))
    assert lock.is_free()


def test_a_lock_that_is_held_is_not_waited_for():
    lock = Lock()
    other = Elsewhere(lock.hold)
    with pytest.raises(BusyError, match="another thread") as busy:
        without_waiting(lambda: lock.hold(never))
    assert not busy.value.is_over()
    other.finish()
    assert busy.value.is_over()


def test_what_needs_a_held_lock_is_left_to_its_holder():
    lock, calls = Lock(), []

    def action():
        calls.append(1)
        lock.hold(never)

    other = Elsewhere(lock.hold)
    do_unless_busy(action)
    assert calls == [1]
    other.finish()


def test_it_is_tried_again_if_the_holder_has_just_finished():
    lock, calls = Lock(), []
    other = Elsewhere(lock.hold)

    def action():
        calls.append(1)
        try:
            lock.hold(lambda: None)
        except BusyError:
            other.finish()  # at this very moment
            raise

    do_unless_busy(action)
    assert calls == [1, 1]


def test_a_request_is_settled_by_the_thread_that_changes_the_registry(registry, kernels, asked):
    """The other thread may be importing torch, and wait for the import that the hook is in."""
    registry.register("a", register_fn=kernels.installer("a"))
    slow = []
    registry.register("slow", register_fn=lambda: None, availability=lambda: slow[0]())

    def explain(hold):
        slow.append(hold)
        registry.explain()

    other = Elsewhere(explain)
    asked("a")
    registry.request.honour(lambda *_: pytest.fail("nothing needs CUDA"))
    assert (registry.current(), registry.request.pending) == (None, ("a",))
    other.finish()
    assert (registry.current(), registry.request.pending) == ("a", ())


def test_a_request_is_settled_after_another_thread_has_loaded_a_provider(installed, kernels, asked):
    def load(hold):
        installed.discovery._lock.hold(hold)
        installed.register("b", register_fn=kernels.installer("b"))

    other = Elsewhere(load)
    asked("b")
    installed.discovery.entries()["b"] = types.SimpleNamespace(value="nowhere:register")
    installed.request.honour(lambda *_: pytest.fail("nothing needs CUDA"))
    assert (installed.current(), installed.request.pending) == (None, ("b",))
    installed.discovery.refresh()
    other.finish()
    assert (installed.current(), installed.request.pending) == ("b", ())


def test_a_provider_that_could_not_register_meanwhile_is_no_broken_one(site, installed, asked):
    source = """
from flash_attention_registry import default
def register():
    default.register_flash_attention_impl("late", register_fn=lambda: None)
"""
    site.install("late_provider", source, provides={"late": "late_provider:register"})
    slow = []
    installed.register("slow", register_fn=lambda: None, availability=lambda: slow[0]())

    def activate(hold):
        slow.append(lambda: hold() or "no GPU")
        with pytest.raises(ImplUnavailableError, match="no GPU"):
            installed.activate("slow")

    other = Elsewhere(activate)
    asked("late")
    installed.request.honour(lambda *_: pytest.fail("nothing needs CUDA"))
    assert installed.discovery.failure("late") is None
    other.finish()
    assert (installed.current(), installed.request.pending) == ("late", ())


def test_a_request_is_left_to_the_thread_that_settles_it(registry, kernels, asked):
    registry.register("a", register_fn=kernels.installer("a"))

    def settle(hold):
        registry.request._lock.hold(hold)

    other = Elsewhere(settle)
    asked("a")
    registry.request.honour(lambda *_: pytest.fail("nothing needs CUDA"))
    assert (registry.current(), registry.request.pending) == (None, ("a",))
    other.finish()
    registry.explain()
    assert registry.current() == "a"


def test_a_failed_activation_does_not_lose_the_request_that_came_up_in_it(registry, kernels, asked):
    asked("a")
    registry.register("a", register_fn=kernels.installer("a"))

    def import_torch():
        registry.request.honour(lambda *_: pytest.fail("nothing needs CUDA"))
        return "no GPU"

    registry.register("b", register_fn=lambda: None, availability=import_torch)
    with pytest.raises(ImplUnavailableError, match="no GPU"):
        registry.activate("b")
    assert (registry.current(), registry.request.pending) == ("a", ())


def test_what_is_raised_after_a_transition_comes_with_its_own_error(registry, asked, monkeypatch):
    asked("nobody")
    monkeypatch.setenv("FLASH_ATTENTION_IMPL_STRICT", "1")

    def import_torch():
        registry.request.honour(lambda *_: None)
        return "no GPU"

    registry.register("b", register_fn=lambda: None, availability=import_torch)
    with pytest.raises(ImplUnavailableError, match="no GPU") as caught:
        registry.activate("b")
    assert "asks for what cannot be activated" in "".join(caught.value.__notes__)


def test_a_request_is_tried_again_if_the_other_thread_has_just_finished(
    registry, kernels, asked, monkeypatch
):
    registry.register("a", register_fn=kernels.installer("a"))
    activate, calls = registry.activate, []

    def busy_at_first(name, **options):
        calls.append(name)
        if len(calls) == 1:
            raise BusyError(Lock())  # which is free
        activate(name)

    monkeypatch.setattr(registry, "activate", busy_at_first)
    asked("a")
    registry.request.honour(lambda *_: pytest.fail("nothing needs CUDA"))
    assert (calls, registry.current()) == (["a", "a"], "a")
