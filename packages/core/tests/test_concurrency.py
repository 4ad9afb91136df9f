"""Reentry, threads and fork."""

from __future__ import annotations

import importlib.util
import os
import sys
import threading

import pytest

from flash_attention_registry import (
    ReentrantTransitionError,
    RegistryWarning,
    RestoreError,
    fork,
)
from flash_attention_registry.fork import ForkSafeLock, ForkSensitive, _renew_all
from flash_attention_registry.scope import Entry
from flash_attention_registry.swap import Swap
from flash_attention_registry.transition import Transitions

SECONDS = 20  # a test that waits longer than this hangs


CHANGES = {
    "register": lambda r: r.register("z", register_fn=lambda: None),
    "unregister": lambda r: r.unregister("b"),
    "activate": lambda r: r.activate("b"),
    "activate a family": lambda r: r.activate("FA4"),
    "restore": lambda r: r.restore(),
    "explain": lambda r: r.explain(),
    "snapshot": lambda r: r.snapshot(),
    "leave a scope": lambda r: r.leave(Entry()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("where", ["register_fn", "prepare"])
def test_changing_the_registry_while_it_installs_is_refused(ab, kernels, change, where):
    functions = {"register_fn": lambda: None, where: lambda: change(ab)}
    ab.register("c", family="FA4", **functions)
    with pytest.raises(ReentrantTransitionError, match=r"middle of another.*activate 'c'"):
        ab.activate("c")
    assert (ab.current(), ab.names(), kernels.installed) == ("a", ["a", "b", "c"], ["a"])
    ab.activate("b")  # the lock is free again
    assert ab.current() == "b"


def test_changing_the_registry_in_remove_is_refused(ab, kernels):
    class Handle:
        def remove(self):
            ab.activate("b")

    ab.register("c", register_fn=Handle)
    ab.activate("c")
    with pytest.raises(RestoreError) as caught:
        ab.restore()
    assert isinstance(caught.value.__cause__, ReentrantTransitionError)
    assert ab.current() is None


@pytest.mark.parametrize("check", ["availability", "recommended"])
def test_changing_the_registry_in_a_check_is_a_reason_against(ab, check):
    ab.register("c", register_fn=lambda: None, **{check: lambda: ab.activate("b")})
    report = {report.name: report for report in ab.explain()}["c"]
    assert "ReentrantTransitionError" in (
        report.unavailable_reason or report.not_recommended_reason
    )
    assert ab.current() == "a"


def test_changing_the_registry_in_a_listener_is_refused(ab):
    ab.add_listener(lambda before, after: ab.restore())
    with pytest.warns(RegistryWarning, match="ReentrantTransitionError"):
        ab.activate("b")
    assert ab.current() == "b"


def test_asking_is_allowed_while_the_registry_installs(ab):
    answers = []
    ab.register("c", register_fn=lambda: answers.append((ab.current(), ab.names())))
    ab.activate("c")
    assert answers == [("a", ["a", "b", "c"])]


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def held(ab):
    """A thread that is in the middle of activating `slow` until `release` is set."""
    inside, release = threading.Event(), threading.Event()

    def install():
        inside.set()
        assert release.wait(SECONDS)

    ab.register("slow", register_fn=install)
    thread = in_thread(lambda: ab.activate("slow"))
    assert inside.wait(SECONDS)
    yield release
    release.set()
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_other_threads_wait_for_a_transition_and_then_make_theirs(ab, held, kernels):
    done = threading.Event()

    def change():
        with pytest.warns(RegistryWarning):  # `slow` has no handle
            ab.activate("b")
        done.set()

    thread = in_thread(change)
    assert not done.wait(0.2)
    held.set()
    assert done.wait(SECONDS)
    thread.join(SECONDS)
    assert (ab.current(), kernels.running) == ("b", "b")


def test_questions_do_not_wait_and_see_the_last_complete_change(ab, held):
    assert ab.current() == "a"  # removed already, but the transition is not complete
    assert ab.names() == ["a", "b", "slow"]


def test_many_threads_end_on_what_is_installed(ab, kernels):
    failures = []

    def switch(name):
        try:
            for _ in range(100):
                ab.activate(name)
                ab.register(f"other-{name}", register_fn=lambda: None)
        except BaseException as error:
            failures.append(error)

    threads = [in_thread(lambda name=name: switch(name)) for name in "abab"]
    for thread in threads:
        thread.join(SECONDS)
    assert not failures
    assert kernels.installed == [ab.current()]
    assert ab.names() == ["a", "b", "other-a", "other-b"]


def forked(function):
    """Run `function` in a forked child; tell whether it returned True in time."""
    child = os.fork()
    if child == 0:
        import signal

        signal.alarm(SECONDS)
        status = 1
        try:
            status = 0 if function() is True else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
forks_on_purpose = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@needs_fork
@forks_on_purpose
def test_a_child_forked_during_a_transition_can_make_its_own(ab, held):
    def change():
        ab.activate("b")
        return ab.current() == "b"

    assert forked(change)
    assert ab.current() == "a"


@needs_fork
@forks_on_purpose
def test_a_child_forked_between_removal_and_installation_says_that_stock_runs(ab, held, kernels):
    assert forked(lambda: (ab.current(), kernels.running) == (None, "stock"))


@needs_fork
@forks_on_purpose
def test_a_child_forked_by_a_register_fn_is_in_no_transition(ab):
    succeeded = []

    def install():
        def change():
            ab.activate("b")
            return ab.current() == "b"

        succeeded.append(forked(change))

    ab.register("forks", register_fn=install)
    ab.activate("forks")
    assert succeeded == [True]
    assert ab.current() == "forks"


@needs_fork
@forks_on_purpose
def test_a_child_that_returns_from_the_register_fn_completes_the_transition(ab):
    children = []

    def install():
        children.append(os.fork())

    ab.register("forks", register_fn=install)
    ab.activate("forks")
    if children[0] == 0:
        status = 1
        try:
            ab.unregister("b")
            status = 0 if (ab.current(), ab.names()) == ("forks", ["a", "forks"]) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
    assert ab.names() == ["a", "b", "forks"]


@needs_fork
@forks_on_purpose
def test_the_child_inherits_the_active_implementation_and_leaves_the_parents_alone(ab, kernels):
    def restore():
        inherited = ab.current()
        ab.restore()
        return (inherited, ab.current(), kernels.running) == ("a", None, "stock")

    assert forked(restore)
    assert (ab.current(), kernels.running) == ("a", "a")


def test_everything_with_a_lock_says_how_to_renew_it():

    class Forgetful(ForkSensitive):
        pass

    with pytest.raises(NotImplementedError, match="Forgetful must define renew"):
        Forgetful()


@pytest.mark.skipif(not hasattr(sys, "setswitchinterval"), reason="CPython only")
def test_listeners_may_come_and_go_while_transitions_run(ab):
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            ab.add_listener(lambda before, after: None).remove()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = in_thread(churn)
    try:
        for _ in range(100):
            ab.activate("b")
            ab.activate("a")
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        thread.join(SECONDS)
    assert ab.current() == "a"


def test_what_fails_before_a_transition_begins_leaves_the_lock_free():
    class Around:
        beginnings = 0

        def begin(self, turn):
            self.beginnings += 1
            if self.beginnings == 1:
                raise KeyboardInterrupt

        def end(self, turn):
            pass

        def released(self):
            pass

    transitions = Transitions(Around())
    with pytest.raises(KeyboardInterrupt):
        transitions.make("try", lambda turn: pytest.fail("has not begun"))
    assert not transitions.is_mine()
    assert transitions.make("try again", lambda turn: transitions.is_mine())


def test_renewing_gives_free_locks_and_no_half_made_transition(ab):
    """What happens in a forked child, which coverage does not see, in this process."""
    guard = ForkSafeLock()
    with guard.lock:
        before = guard.lock
        _renew_all()
        assert guard.lock is not before
        assert guard.lock.acquire(blocking=False)
    slot = ab._slot
    swap = slot._swap = Swap(slot.active, None)
    slot.renew()
    assert ab.current() == "a"
    slot._swap = swap
    swap.removal().run(slot.active.handle.remove)
    slot.renew()
    assert ab.current() is None
    slot._swap = swap
    swap.target = ab.registration("b")
    swap.installation.run(swap.target.register_fn)
    slot.renew()
    assert ab.current() == "b"


def test_a_system_without_fork_needs_no_renewing(monkeypatch):
    monkeypatch.delattr(os, "register_at_fork", raising=False)
    spec = importlib.util.spec_from_file_location("fork_without_fork", fork.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.ForkSafeLock().lock.acquire(blocking=False)
