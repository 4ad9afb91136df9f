"""The table of promises: one test per row, and what a row needs besides."""

from __future__ import annotations

import warnings

import pytest

from flash_attention_registry import (
    HandleError,
    ImplUnavailableError,
    NotRegisteredError,
    RegistryWarning,
    RestoreError,
    UnknownImplError,
)


def test_activation_installs_and_restore_removes(ab, kernels):
    assert (ab.current(), kernels.running) == ("a", "a")
    ab.restore()
    assert (ab.current(), kernels.running) == (None, "stock")


def test_activating_an_unknown_name_changes_nothing_and_lists_what_there_is(ab, kernels):
    with pytest.raises(UnknownImplError) as caught:
        ab.activate("FA9")
    expected = "Unknown flash attention impl 'FA9'. Available implementations: ['a', 'b']"
    assert str(caught.value) == expected
    assert isinstance(caught.value, ValueError)
    assert (ab.current(), kernels.installed, kernels.removals) == ("a", ["a"], [])


def test_activating_an_unavailable_implementation_changes_nothing_and_says_why(ab, kernels):
    ab.register("c", register_fn=kernels.installer("c"), availability=lambda: "needs sm_90")
    with pytest.raises(ImplUnavailableError, match=r"'c' is not available: needs sm_90\..*'a'"):
        ab.activate("c")
    assert (ab.current(), kernels.installed, kernels.removals) == ("a", ["a"], [])


def test_the_error_says_that_stock_still_runs_if_nothing_was_active(registry, kernels):
    registry.register("c", register_fn=kernels.installer("c"), availability=lambda: "no GPU")
    with pytest.raises(ImplUnavailableError, match="Stock kernels still run"):
        registry.activate("c")
    assert registry.current() is None


def test_switching_removes_the_old_before_it_installs_the_new(ab, kernels):
    seen = []

    def install():
        seen.append(list(kernels.installed))
        return kernels.installer("c")()

    ab.register("c", register_fn=install)
    ab.activate("c")
    assert seen == [[]]
    assert (ab.current(), kernels.installed) == ("c", ["c"])


def test_preparation_runs_before_anything_is_removed(ab, kernels):
    seen = []
    ab.register(
        "c",
        register_fn=kernels.installer("c"),
        prepare=lambda: seen.append((ab.current(), kernels.running)),
    )
    ab.activate("c")
    assert seen == [("a", "a")]
    assert ab.current() == "c"


def test_failed_preparation_touches_nothing(ab, kernels, failing):
    ab.register("c", register_fn=kernels.installer("c"), prepare=failing(ImportError("no kernels")))
    with pytest.raises(ImportError, match="no kernels"):
        ab.activate("c")
    assert (ab.current(), kernels.installed, kernels.removals) == ("a", ["a"], [])


def test_activating_the_active_name_does_nothing(ab, kernels):
    before = kernels.installed, kernels.removals
    ab.activate("a")
    assert (kernels.installed, kernels.removals) == before == (["a"], [])


def test_reregistering_the_active_name_keeps_it_until_it_is_activated_again(ab, kernels):
    ab.register("a", register_fn=kernels.installer("a2"))
    assert (ab.current(), kernels.running) == ("a", "a")
    ab.activate("a")
    assert (ab.current(), kernels.installed, kernels.removals) == ("a", ["a2"], ["a"])


def test_failed_switch_to_a_reregistered_name_keeps_the_old_function(ab, kernels, failing):
    ab.register("a", register_fn=failing(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        ab.activate("a")
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_implementation_without_handle_is_active(registry, kernels):
    registry.register("n", register_fn=kernels.installer_without_handle("n"))
    registry.activate("n")
    assert (registry.current(), kernels.running) == ("n", "n")


LEAVE = {
    "switch": lambda registry: registry.activate("b"),
    "restore": lambda registry: registry.restore(),
    "unregister": lambda registry: registry.unregister("n"),
}


@pytest.mark.parametrize("leave", LEAVE.values(), ids=LEAVE)
def test_leaving_an_implementation_without_handle_warns(registry, kernels, leave):
    registry.register("n", register_fn=kernels.installer_without_handle("n"))
    registry.register("b", register_fn=kernels.installer("b"))
    registry.activate("n")
    with pytest.warns(RegistryWarning, match="'n'.*cannot be removed"):
        leave(registry)
    assert registry.current() != "n"


def test_failed_switch_from_an_implementation_without_handle_leaves_it_as_it_is(
    registry, kernels, failing
):
    registry.register("n", register_fn=kernels.installer_without_handle("n"))
    registry.register("c", register_fn=failing(OSError("gone")))
    registry.activate("n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match="gone"):
            registry.activate("c")
    assert (registry.current(), kernels.installed) == ("n", ["n"])


@pytest.mark.parametrize("handle", [object(), 7, type("NoCall", (), {"remove": None})()])
def test_handle_without_callable_remove_is_a_failed_activation(ab, kernels, handle):
    ab.register("c", register_fn=lambda: handle)
    with pytest.raises(HandleError, match=r"'c' returned.*without a callable remove"):
        ab.activate("c")
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_remove_that_raises_does_not_stop_a_switch(registry, kernels):
    broken = OSError("cannot unload")
    registry.register("s", register_fn=kernels.installer_with_stuck_handle("s", broken))
    registry.register("b", register_fn=kernels.installer("b"))
    registry.activate("s")
    with pytest.raises(RestoreError, match="'s' raised OSError: cannot unload") as caught:
        registry.activate("b")
    assert caught.value.__cause__ is broken
    assert (registry.current(), kernels.running) == ("b", "b")
    assert [handle.name for handle in registry.stuck_handles()] == ["s"]
    registry.restore()  # the registry is not wedged
    registry.activate("b")
    assert registry.current() == "b"


def test_remove_that_raises_does_not_stop_a_restore(registry, kernels):
    registry.register("s", register_fn=kernels.installer_with_stuck_handle("s", OSError("no")))
    registry.activate("s")
    with pytest.raises(RestoreError):
        registry.restore()
    assert registry.current() is None
    assert len(registry.stuck_handles()) == 1


def test_restoring_with_nothing_active_warns_at_the_caller(registry):
    with pytest.warns(RegistryWarning, match="nothing to restore") as caught:
        registry.restore()
    assert caught[0].filename == __file__


def test_unregistering_what_is_active_restores_first(ab, kernels):
    ab.unregister("a")
    assert (ab.current(), kernels.running, ab.names()) == (None, "stock", ["b"])


def test_unregistering_what_is_active_and_stuck_forgets_it_all_the_same(registry, kernels):
    registry.register("s", register_fn=kernels.installer_with_stuck_handle("s", OSError("no")))
    registry.activate("s")
    with pytest.raises(RestoreError):
        registry.unregister("s")
    assert (registry.current(), registry.names()) == (None, [])


def test_unregistering_what_is_not_active_leaves_the_active_one_alone(ab, kernels):
    ab.unregister("b")
    assert (ab.current(), kernels.running, ab.names()) == ("a", "a", ["a"])


def test_unregistering_an_unknown_name_is_a_key_error_that_lists(ab):
    with pytest.raises(NotRegisteredError) as caught:
        ab.unregister("c")
    assert isinstance(caught.value, KeyError)
    assert str(caught.value).endswith(
        "it is not registered. Registered implementations: ['a', 'b']"
    )


def test_names_are_sorted(registry, kernels):
    for name in ("zeta", "FA4", "alpha"):
        registry.register(name, register_fn=kernels.installer(name))
    assert registry.names() == ["FA4", "alpha", "zeta"]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"impl": 4}, TypeError, "impl must be a str"),
        ({"impl": ""}, ValueError, "not empty"),
        ({"impl": " a"}, ValueError, "no space around it"),
        ({"register_fn": None}, TypeError, "register_fn of flash attention impl 'x'"),
        ({"family": 4}, TypeError, "family of flash attention impl 'x' must be a str"),
        ({"family": ""}, ValueError, "family of flash attention impl 'x'"),
        ({"priority": "high"}, TypeError, "priority of flash attention impl 'x'"),
        ({"priority": True}, TypeError, "priority of flash attention impl 'x'"),
        ({"availability": "sm_90"}, TypeError, "availability of flash attention impl 'x'"),
        ({"recommended": False}, TypeError, "recommended of flash attention impl 'x'"),
        ({"prepare": 1}, TypeError, "prepare of flash attention impl 'x'"),
    ],
)
def test_registration_refuses_what_cannot_work(registry, arguments, error, text):
    with pytest.raises(error, match=text):
        registry.register(**({"impl": "x", "register_fn": lambda: None} | arguments))
    assert registry.names() == []


def test_activation_refuses_what_is_not_a_name(ab):
    with pytest.raises(TypeError, match="named by a str, but 4 was given"):
        ab.activate(4)
    assert ab.current() == "a"
