"""A lock that nobody can leave behind, and the steps that it is made of."""

from __future__ import annotations

import sys
import threading

import pytest

from flash_attention_registry.indivisible import Call, call_and_finish, compare_and_set
from flash_attention_registry.lock import Lock, _Holding

SECONDS = 20  # a test that waits longer than this hangs


def leave_behind(lock):
    """Take a lock as if several interrupts in a row had kept it from being given back."""
    assert lock._state.take(_Holding(), 0.0)


def in_thread(function):
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_it_is_held_during_the_call_and_free_afterwards():
    lock = Lock()
    assert lock.hold(lambda: (lock.is_mine(), lock.is_free())) == (True, False)
    assert (lock.is_mine(), lock.is_free()) == (False, True)


def test_an_error_gives_it_back():
    lock = Lock()
    with pytest.raises(ZeroDivisionError) as caught:
        lock.hold(lambda: 1 / 0)
    assert lock.is_free()
    assert caught.value.__context__ is None


def test_the_thread_that_holds_it_may_ask_for_it_again():
    lock = Lock()
    assert lock.hold(lambda: lock.hold(lock.is_mine)) is True
    assert lock.is_free()


def test_another_thread_gets_it_as_soon_as_it_is_given_back():
    lock, inside, go_on = Lock(), threading.Event(), threading.Event()
    order = []

    def first():
        inside.set()
        assert go_on.wait(SECONDS)
        order.append("first")

    threads = [in_thread(lambda: lock.hold(first))]
    assert inside.wait(SECONDS)
    assert not lock.is_mine()
    threads.append(in_thread(lambda: lock.hold(lambda: order.append("second"))))
    threads[1].join(0.1)
    assert order == []
    go_on.set()
    for thread in threads:
        thread.join(SECONDS)
    assert order == ["first", "second"]


def test_a_thread_is_waited_for_as_long_as_it_is_at_it(monkeypatch):
    monkeypatch.setattr("flash_attention_registry.lock.PATIENCE", 0.01)
    lock, inside, go_on = Lock(), threading.Event(), threading.Event()

    def first():
        inside.set()
        assert go_on.wait(SECONDS)

    holder = in_thread(lambda: lock.hold(first))
    assert inside.wait(SECONDS)
    got_it = []
    waiter = in_thread(lambda: lock.hold(lambda: got_it.append(go_on.is_set())))
    waiter.join(0.2)
    assert got_it == []
    go_on.set()
    for thread in (holder, waiter):
        thread.join(SECONDS)
    assert got_it == [True]


def test_what_this_thread_has_left_behind_is_free_for_it():
    lock = Lock()
    leave_behind(lock)
    assert not lock.is_mine()
    assert lock.hold(lock.is_mine)
    assert lock.is_free()


def test_what_a_thread_that_has_ended_has_left_behind_is_taken_away():
    lock = Lock()
    in_thread(lambda: leave_behind(lock)).join(SECONDS)
    assert not lock.is_free()
    assert lock.hold(lock.is_mine)


@pytest.fixture
def elsewhere():
    """Does something in a thread that lives on until the test is over."""
    done, over = threading.Event(), threading.Event()

    def do(action):
        def act_and_wait():
            action()
            done.set()
            assert over.wait(SECONDS)

        in_thread(act_and_wait)
        assert done.wait(SECONDS)

    yield do
    over.set()


def test_what_a_thread_that_is_at_something_else_has_left_behind_is_taken_away(elsewhere):
    lock = Lock()
    elsewhere(lambda: leave_behind(lock))
    assert lock.hold(lock.is_mine)


def test_with_greenlets_nobody_can_tell_who_has_left_it_behind(monkeypatch):
    """The frames of a greenlet that waits are on no thread's stack."""
    monkeypatch.setitem(sys.modules, "greenlet", sys)
    lock = Lock()
    leave_behind(lock)
    assert lock.is_mine()
    other = Lock()
    in_thread(lambda: leave_behind(other)).join(SECONDS)
    assert other.hold(other.is_mine)  # that thread has ended, and its greenlets with it


def test_giving_back_what_has_been_taken_away_does_nothing():
    lock = Lock()
    holding = _Holding()
    lock._state.give_back(holding)
    assert lock.hold(lambda: lock._state.give_back(holding) or lock.is_mine())


# The steps


def test_a_call_knows_how_far_it_got():
    call = Call()
    assert (call.begun, call.finished) == (False, False)
    call.run(lambda *given: (call.begun, call.finished, given), 1, 2)
    assert (call.begun, call.finished, call.result) == (True, True, (True, False, (1, 2)))
    call.forget_result()
    assert (call.begun, call.finished) == (True, False)


def test_a_call_that_raises_has_begun():
    call = Call()
    with pytest.raises(ZeroDivisionError):
        call.run(lambda: 1 / 0)
    assert (call.begun, call.finished) == (True, False)


def test_a_variable_is_set_only_in_the_place_of_what_was_seen():
    seen, other = (1, 2), (1, 2, 3)[:2]
    assert seen == other
    namespace = {"name": other}
    assert not compare_and_set(namespace, "name", seen, "new")
    assert namespace == {"name": other}
    assert compare_and_set(namespace, "name", other, "new")
    assert namespace == {"name": "new"}


@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupt_in_the_end_does_not_keep_it_from_being_done(fails):
    done = []

    def finish():
        done.append(1)
        if len(done) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_and_finish(lambda: 1 / 0 if fails else None, finish)
    assert done == [1, 1]
