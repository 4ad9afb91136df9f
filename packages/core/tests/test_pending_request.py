"""What `FLASH_ATTENTION_IMPL` asks for and needs CUDA: settled at the first call on a GPU, once."""

from __future__ import annotations

import os
import sys
import threading
import types
import warnings

import pytest

from flash_attention_registry import (
    Registry,
    RegistryWarning,
    RequestUnavailableError,
    before_using_cuda,
    environment,
)
from flash_attention_registry.discovery import Discovery, Scan
from flash_attention_registry.scope import ImplScope

WAIT = 20  # seconds; for threads that are to go on at once


@pytest.fixture
def pending(abc, asked):
    """A registry of `a`, `b`, and `c`, which was asked for at the end of `import torch`."""
    asked("c")
    abc.request.honour(lambda *_: None)
    assert abc.request.pending == ("c",)
    return abc


def unavailable(registry, name, reason):
    registry.register(name, register_fn=lambda: None, availability=lambda: reason)


def never(*_):
    pytest.fail("nothing is to be awaited")


# At the first call on a GPU


def test_the_first_call_activates_what_is_pending(pending, kernels):
    assert pending.request.settle()
    assert (pending.current(), kernels.running, pending.request.pending) == ("c", "c", ())


def test_later_calls_activate_nothing(pending):
    assert pending.request.settle()
    pending.restore()
    assert pending.request.settle()
    assert pending.current() is None


def test_a_failure_at_the_first_call_is_one_warning(abc, asked):
    asked("c")
    abc.request.honour(lambda *_: None)
    abc.unregister("c")
    with pytest.warns(RegistryWarning, match="Unknown flash attention impl 'c'") as given:
        assert abc.request.settle()
    assert len(given) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert abc.request.settle()
    assert (abc.current(), abc.request.pending) == (None, ())


def test_a_failure_at_the_first_call_is_raised_at_every_call_in_a_strict_environment(
    pending, asked
):
    unavailable(pending, "c", "needs another GPU")
    asked("c", strict="1")
    for _ in range(3):
        with pytest.raises(RequestUnavailableError, match="needs another GPU"):
            pending.request.settle()
        assert pending.request.pending == ("c",)
    unavailable(pending, "c", None)
    assert pending.request.settle()
    assert pending.current() == "c"


@pytest.mark.parametrize(
    ("decide", "active"),
    [
        (lambda registry: registry.activate("a"), "a"),
        (lambda registry: registry.restore(), None),
        (lambda registry: ImplScope(registry, "a").__enter__(), "a"),
        (lambda registry: registry.request.activate(), "b"),
    ],
    ids=["activate", "restore", "use", "activate what is asked for by now"],
)
def test_what_the_program_decides_itself_supersedes_it(pending, asked, decide, active):
    asked("b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there was something to decide, though nothing is active
        decide(pending)
    assert pending.request.pending == ()
    assert pending.request.settle()
    assert pending.current() == active


def test_a_failed_attempt_of_the_program_supersedes_nothing(pending):
    with pytest.raises(ValueError, match="nobody"):
        pending.activate("nobody")
    assert pending.request.pending == ("c",)


def test_what_was_activated_in_torchs_registry_supersedes_it(torchs, asked, kernels):
    nowhere = Discovery(prefix="nothing.is.declared.in.such.a.group")
    registry = Registry(nowhere, in_step_with_torch=True)
    registry.register("c", register_fn=kernels.installer("c"), availability=before_using_cuda)
    asked("c")
    registry.request.honour(lambda *_: None)
    torchs._FLASH_ATTENTION_ACTIVE = ("FA3", types.SimpleNamespace(remove=never))
    assert registry.request.settle()
    assert (registry.current(), kernels.installed) == ("torch:FA3", [])


def test_an_interrupt_at_the_first_call_leaves_it_pending(pending, kernels, failing):
    pending.register("c", register_fn=failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        pending.request.settle()
    assert pending.request.pending == ("c",)
    pending.register("c", register_fn=kernels.installer("c"))
    assert pending.request.settle()
    assert pending.current() == "c"


def test_a_call_that_the_provider_itself_makes_settles_nothing(pending, site, monkeypatch):
    """While the provider is loaded no transition has begun, and the same thread may come again."""
    seen = []
    load = pending.discovery.load

    def load_and_call(name, is_registered):
        seen.append(pending.request.settle())
        load(name, is_registered)

    monkeypatch.setattr(pending.discovery, "load", load_and_call)
    monkeypatch.setattr(pending.discovery, "entries", lambda: {"x": None})
    monkeypatch.setattr(pending.discovery, "failure", lambda name: None)
    pending.request.ask(("not registered",))
    with pytest.warns(RegistryWarning, match="not registered"):
        assert pending.request.settle()
    assert seen == [False]


# In code that a transition runs


def test_torch_imported_by_a_check_settles_nothing_in_the_middle_of_a_transition(
    abc, asked, kernels
):
    asked("b")
    states = []

    def check():
        abc.request.honour(never)
        states.append((abc.current(), abc.request.pending))

    abc.register("importer", register_fn=kernels.installer("x"), availability=check)
    abc.activate("importer")
    assert states == [(None, ("b",))]
    assert (abc.current(), abc.request.pending) == ("importer", ())


def test_torch_imported_by_an_explanation_settles_it_afterwards(abc, asked):
    asked("b")
    checked = []

    def check():
        if not checked:
            checked.append(abc.request.honour(never))

    abc.register("importer", register_fn=lambda: None, availability=check)
    abc.explain()
    assert (abc.current(), abc.request.pending) == ("b", ())


def test_an_explanation_alone_activates_nothing(abc, asked):
    asked("b")
    abc.explain()
    assert abc.current() is None


def test_an_explanation_leaves_pending_what_is_pending(pending):
    awaited = []
    pending.request.honour(lambda *_: awaited.append(1))
    pending.explain()
    assert (pending.current(), pending.request.pending) == (None, ("c",))
    assert awaited == [1]


def test_a_call_in_the_middle_of_a_transition_leaves_it_pending(pending, failing):
    states = []

    def prepare():
        states.append((pending.request.settle(), pending.request.pending))
        raise OSError("no kernels")

    pending.register("a", register_fn=lambda: None, prepare=prepare)
    with pytest.raises(OSError, match="no kernels"):
        pending.activate("a")
    assert states == [(False, ("c",))]
    assert pending.request.settle()
    assert pending.current() == "c"


# In a provider that is being loaded or imported


def loading(name, calls):
    """An entry point whose loading calls something, as if it imported torch."""
    return types.SimpleNamespace(
        name=name,
        value=f"{name}:register",
        distribution=name,
        version="1.0",
        conflict=None,
        register=calls,
        origin=lambda: f"{name} 1.0",
    )


def test_torch_imported_by_the_provider_that_is_loaded_leaves_it_pending(abc, asked, kernels):
    asked("late")
    states = []

    def register():
        abc.request.honour(never)
        states.append((abc.request.settle(), abc.current(), abc.request.pending))
        abc.register("late", register_fn=kernels.installer("late"))

    abc.discovery.restore((Scan({"late": loading("late", register)}, ()), {}))
    abc.explain()
    assert states == [(False, None, ("late",))]
    assert (abc.current(), abc.request.pending) == ("late", ())


@pytest.fixture
def half_imported(abc, monkeypatch):
    """The registry of a program in which the import of a provider's package imports torch."""
    abc.discovery.restore((Scan({"c": loading("some_package", never)}, ()), {}))
    part = types.ModuleType("some_package.part")
    part.__spec__ = types.SimpleNamespace(_initializing=True)
    monkeypatch.setitem(sys.modules, part.__name__, part)
    abc.finish = lambda: setattr(part.__spec__, "_initializing", False)
    return abc


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_torch_imported_by_the_providers_own_import_leaves_it_to_the_first_call(
    half_imported, asked, device_type
):
    asked("b")
    awaited = {}
    half_imported.request.honour(awaited.__setitem__)
    assert (half_imported.current(), half_imported.request.pending) == (None, ("b",))
    assert not awaited[device_type]()
    half_imported.finish()
    assert awaited[device_type]()
    assert half_imported.current() == "b"
    assert awaited[device_type]()


def test_it_is_settled_by_the_first_transition_after_that_import(half_imported, asked):
    asked("b")
    half_imported.request.honour(lambda *_: None)
    half_imported.explain()
    assert half_imported.current() is None
    half_imported.finish()
    half_imported.explain()
    assert half_imported.current() == "b"


def test_a_first_call_on_the_cpu_leaves_what_needs_cuda_to_the_first_on_a_gpu(half_imported, asked):
    asked("c")
    awaited = {}
    half_imported.request.honour(awaited.__setitem__)
    half_imported.finish()
    awaited.pop("cuda")
    assert awaited["cpu"]()
    assert (half_imported.current(), half_imported.request.pending) == (None, ("c",))
    assert awaited["cuda"]()
    assert half_imported.current() == "c"


# Threads and processes


def test_two_first_calls_at_once_activate_once_and_both_wait_for_it(pending, kernels):
    inside, go_on = threading.Event(), threading.Event()

    def check():
        before_using_cuda()
        inside.set()
        assert go_on.wait(WAIT)

    installs = []

    def install():
        installs.append(1)
        return kernels.installer("c")()

    pending.register("c", register_fn=install, availability=check)
    seen = []
    threads = [
        threading.Thread(target=lambda: seen.append((pending.request.settle(), pending.current())))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    assert inside.wait(WAIT)
    threads[1].join(0.1)
    assert seen == []
    go_on.set()
    for thread in threads:
        thread.join(WAIT)
    assert seen == [(True, "c"), (True, "c")]
    assert installs == [1]


def activate_and_restore(registry):
    registry.activate("a")
    registry.restore()


@pytest.mark.parametrize(
    ("wanted", "when"),
    [
        *((name, when) for name in ("c", "native", "missing") for when in ("before", "after")),
        ("missing", "failed"),
    ],
)
@pytest.mark.parametrize(
    ("decide", "active"),
    [
        (Registry.restore, None),
        (lambda registry: registry.activate("a"), "a"),
        (activate_and_restore, None),
    ],
    ids=["restore", "activate", "activate and restore"],
)
@pytest.mark.filterwarnings("ignore:No flash attention impl is active")
def test_what_another_thread_decides_while_it_is_settled_supersedes_it(
    abc, asked, monkeypatch, wanted, decide, active, when
):
    failed = when == "failed"  # in a strict environment, where the next call fails again
    asked(wanted, strict="1" if failed else "")
    if failed:
        abc.request.ask((wanted,))
    else:
        abc.activate("b")
    reached, go_on = threading.Event(), threading.Event()

    def stop(place):
        if place == when and threading.current_thread() is settling:
            reached.set()
            assert go_on.wait(WAIT)

    def stopping(change):
        def stops(*names, **options):
            stop("before")
            try:
                change(*names, **options)
            finally:
                stop("after")

        return stops

    is_strict = environment.strict

    def strict():
        stop("failed")
        return is_strict()

    errors = []

    def settle():
        try:
            if failed:
                abc.request.settle()
            else:
                abc.request.activate()
        except Exception as error:
            errors.append(type(error))

    monkeypatch.setattr(environment, "strict", strict)
    for change in ("activate", "restore_if_active"):
        monkeypatch.setattr(abc, change, stopping(getattr(abc, change)))
    settling = threading.Thread(target=settle, daemon=True)
    settling.start()
    assert reached.wait(WAIT)
    decide(abc)
    go_on.set()
    settling.join(WAIT)
    assert not settling.is_alive()
    assert (abc.current(), abc.request.pending) == (active, ())
    assert errors == ([RequestUnavailableError] if failed else [])
    assert abc.request.settle()  # the next call, which has nothing to say


def test_a_call_that_comes_while_another_one_fails_raises_too_in_a_strict_environment(
    pending, asked, monkeypatch
):
    unavailable(pending, "c", "needs another GPU")
    asked("c", strict="1")
    raised = []

    def call():
        try:
            pending.request.settle()
        except RequestUnavailableError:
            raised.append(threading.current_thread())

    other = threading.Thread(target=call)

    def strict():
        if not other.ident:  # the first one has failed, and what it says is being decided
            other.start()
            other.join(0.1)
        return True

    monkeypatch.setattr(environment, "strict", strict)
    call()
    other.join(WAIT)
    assert set(raised) == {threading.current_thread(), other}
    assert pending.request.pending == ("c",)


def test_a_first_call_and_a_transition_of_another_thread_do_not_wait_for_each_other(
    pending, kernels, monkeypatch
):
    activate, activating = pending.activate, threading.Event()

    def noticed(impl, **options):
        activating.set()  # the first call holds the lock of the request from here on
        activate(impl, **options)

    calls = []
    other = threading.Thread(target=lambda: calls.append(pending.request.settle()), daemon=True)

    def prepare():
        other.start()
        assert activating.wait(WAIT)
        calls.append(pending.request.settle())

    monkeypatch.setattr(pending, "activate", noticed)
    pending.register("a", register_fn=kernels.installer("a"), prepare=prepare)
    mine = threading.Thread(target=lambda: activate("a"), daemon=True)
    mine.start()
    mine.join(WAIT)
    other.join(WAIT)
    assert not mine.is_alive()
    assert not other.is_alive()
    assert calls == [False, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_what_is_pending_is_pending_in_a_forked_child_that_another_thread_was_settling(
    pending, kernels
):
    inside, go_on = threading.Event(), threading.Event()

    def slow():
        inside.set()
        assert go_on.wait(WAIT)

    pending.register("c", register_fn=kernels.installer("c"), prepare=slow)
    thread = threading.Thread(target=pending.request.settle)
    thread.start()
    assert inside.wait(WAIT)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            go_on.set()
            was_pending = pending.request.pending
            settled = pending.request.settle()
            status = 0 if (was_pending, settled, pending.current()) == (("c",), True, "c") else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    go_on.set()
    thread.join(WAIT)
    assert pending.current() == "c"
