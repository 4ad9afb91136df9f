"""In step with torch's registry, on a stand-in for it: torch is not needed, nor any kernel."""

from __future__ import annotations

import sys
import types

import pytest

from flash_attention_registry import (
    ImplUnavailableError,
    NotRegisteredError,
    ReentrantTransitionError,
    Registry,
    RegistryWarning,
    RestoreError,
    torch_registry,
    torch_state,
)
from flash_attention_registry.discovery import Discovery


@pytest.fixture(autouse=True)
def _real_torch_is_left_alone(monkeypatch):
    """Where it has been imported, by other tests."""
    monkeypatch.delitem(sys.modules, torch_state.MODULE, raising=False)


@pytest.fixture
def ours(torchs, kernels):
    """A registry in step with it, with the implementation `a`."""
    registry = Registry(
        Discovery(prefix="nothing.is.declared.in.such.a.group"), in_step_with_torch=True
    )
    registry.register("a", register_fn=kernels.installer("a"))
    torchs.register_flash_attention_impl("X", register_fn=kernels.installer("X"))
    return registry


def test_each_lists_what_the_other_has(ours, torchs):
    assert ours.names() == ["a", "torch:X"]
    assert sorted(torchs._FLASH_ATTENTION_IMPLS) == ["X", "a"]
    ours.unregister("a")
    assert sorted(torchs._FLASH_ATTENTION_IMPLS) == ["X"]


@pytest.mark.parametrize("side", ["ours", "torch's"])
def test_what_one_side_activates_the_other_names_and_restores(ours, torchs, kernels, side):
    if side == "ours":
        ours.activate("a")
    else:
        torchs.activate_flash_attention_impl("a")
    assert (ours.current(), torchs.current(), kernels.running) == ("a", "a", "a")
    torchs.restore_flash_attention_impl()
    assert (ours.current(), torchs.current(), kernels.running) == (None, None, "stock")


@pytest.mark.parametrize("side", ["ours", "torch's"])
def test_torchs_are_known_by_a_name_of_their_own(ours, torchs, kernels, side):
    if side == "ours":
        ours.activate("torch:X")
    else:
        torchs.activate_flash_attention_impl("X")
    assert (ours.current(), torchs.current(), kernels.running) == ("torch:X", "X", "X")
    ours.activate("a")
    assert (ours.current(), torchs.current(), kernels.installed) == ("a", "a", ["a"])
    torchs.activate_flash_attention_impl("X")
    ours.restore()
    assert (ours.current(), torchs.current(), kernels.running) == (None, None, "stock")


def test_restoring_torchs_on_its_side_is_seen_by_the_next_transition(ours, torchs):
    heard = []
    ours.activate("torch:X")
    ours.add_listener(lambda before, after: heard.append((before, after)))
    torchs.restore_flash_attention_impl()
    assert ours.current() is None
    ours.show_to_torch()
    assert heard == [("torch:X", None)]


def test_torch_imported_while_ours_is_active_learns_of_it(
    monkeypatch, kernels, torchs_registry_type
):
    registry = Registry(Discovery(prefix="no.such.group"), in_step_with_torch=True)
    registry.register("a", register_fn=kernels.installer("a"))
    registry.activate("a")
    module = torchs_registry_type()
    monkeypatch.setitem(sys.modules, torch_state.MODULE, module)
    registry.show_to_torch()
    assert (registry.current(), module.current()) == ("a", "a")


@pytest.mark.parametrize("remove_raises", [False, True])
def test_torchs_on_top_of_one_that_torch_did_not_know_of(
    monkeypatch, kernels, torchs_registry_type, remove_raises
):
    registry = Registry(Discovery(prefix="no.such.group"), in_step_with_torch=True)
    stuck = kernels.installer_with_stuck_handle("a", OSError("busy"))
    registry.register("a", register_fn=stuck if remove_raises else kernels.installer("a"))
    registry.activate("a")
    module = torchs_registry_type()
    monkeypatch.setitem(sys.modules, torch_state.MODULE, module)
    module.register_flash_attention_impl("X", register_fn=kernels.installer("X"))
    module.activate_flash_attention_impl("X")
    if remove_raises:
        with pytest.raises(RestoreError, match="busy"):
            registry.show_to_torch()
    else:
        registry.show_to_torch()
        assert kernels.installed == ["X"]
    assert (registry.current(), module.current(), kernels.running) == ("torch:X", "X", "X")


def test_a_failed_switch_to_torchs_keeps_ours(ours, torchs, kernels, failing):
    torchs.register_flash_attention_impl("Y", register_fn=failing(OSError("gone")))
    ours.activate("a")
    with pytest.raises(OSError, match="gone"):
        ours.activate("torch:Y")
    assert (ours.current(), torchs.current(), kernels.installed) == ("a", "a", ["a"])


def test_a_failed_switch_from_torchs_brings_back_the_function_it_had(
    ours, torchs, kernels, failing
):
    ours.activate("torch:X")
    torchs.register_flash_attention_impl("X", register_fn=kernels.installer("newer X"))
    newer = torchs._FLASH_ATTENTION_IMPLS["X"]
    ours.register("broken", register_fn=failing(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        ours.activate("broken")
    assert (ours.current(), torchs.current(), kernels.installed) == ("torch:X", "X", ["X"])
    assert torchs._FLASH_ATTENTION_IMPLS["X"] is newer
    ours.activate("torch:X")
    assert kernels.installed == ["newer X"]


def test_what_torch_has_no_function_for_any_more_cannot_be_brought_back(
    ours, torchs, kernels, failing
):
    torchs.activate_flash_attention_impl("X")
    del torchs._FLASH_ATTENTION_IMPLS["X"]
    assert ours.current() == "torch:X"
    ours.register("broken", register_fn=failing(OSError("gone")))
    with (
        pytest.warns(RegistryWarning, match="could not be activated again"),
        pytest.raises(OSError, match="gone"),
    ):
        ours.activate("broken")
    assert (ours.current(), torchs.current(), kernels.running) == (None, None, "stock")
    assert sorted(torchs._FLASH_ATTENTION_IMPLS) == ["a", "broken"]


def test_without_a_handle_it_is_active_until_it_is_left_with_a_warning(ours, torchs, kernels):
    torchs.register_flash_attention_impl("Y", register_fn=kernels.installer_without_handle("Y"))
    ours.activate("torch:Y")
    ours.show_to_torch()
    assert (ours.current(), torchs.current()) == ("torch:Y", "Y")
    with pytest.warns(RegistryWarning, match="cannot be removed"):
        ours.restore()
    assert (ours.current(), torchs.current()) == (None, None)
    ours.activate("torch:Y")
    with pytest.warns(RegistryWarning, match="cannot be removed"):
        torchs.restore_flash_attention_impl()
    assert (ours.current(), torchs.current()) == (None, None)


def test_without_a_handle_it_stays_active_if_the_next_one_fails(ours, torchs, kernels, failing):
    torchs.register_flash_attention_impl("Y", register_fn=kernels.installer_without_handle("Y"))
    torchs.register_flash_attention_impl("Z", register_fn=failing(OSError("gone")))
    ours.activate("torch:Y")
    with pytest.raises(OSError, match="gone"):
        ours.activate("torch:Z")
    assert (ours.current(), torchs.current(), kernels.running) == ("torch:Y", "Y", "Y")


def test_torchs_registry_is_not_stuck_by_a_handle_that_raises(ours, torchs, kernels):
    torchs.register_flash_attention_impl(
        "Y", register_fn=kernels.installer_with_stuck_handle("Y", OSError("busy"))
    )
    torchs.activate_flash_attention_impl("Y")
    with pytest.raises(OSError, match="busy"):
        torchs.restore_flash_attention_impl()
    assert (ours.current(), torchs.current()) == ("torch:Y", "Y")
    with pytest.raises(RestoreError, match="busy"):
        ours.activate("a")
    assert (ours.current(), torchs.current(), kernels.running) == ("a", "a", "a")


def test_a_remove_of_ours_that_raises_does_not_stop_torchs_registry(ours, torchs, kernels):
    ours.register("b", register_fn=kernels.installer_with_stuck_handle("b", OSError("busy")))
    torchs.activate_flash_attention_impl("b")
    with pytest.warns(RegistryWarning, match="busy"):
        torchs.activate_flash_attention_impl("X")
    assert (ours.current(), torchs.current(), kernels.running) == ("torch:X", "X", "X")


def test_a_handle_of_an_earlier_activation_removes_nothing(ours, torchs, kernels):
    torchs.activate_flash_attention_impl("a")
    earlier = torchs._FLASH_ATTENTION_ACTIVE[1]
    ours.restore()
    ours.activate("a")
    earlier.remove()
    assert (ours.current(), kernels.running) == ("a", "a")


def test_what_is_unavailable_here_cannot_be_activated_there(ours, torchs, kernels):
    ours.register("b", register_fn=kernels.installer("b"), availability=lambda: "no GPU")
    with pytest.raises(ImplUnavailableError, match="no GPU"):
        torchs.activate_flash_attention_impl("b")
    assert (ours.current(), torchs.current(), kernels.running) == (None, None, "stock")


def test_torchs_registry_cannot_be_used_by_what_ours_is_calling(ours, torchs, kernels):
    ours.activate("a")
    ours.register("b", register_fn=lambda: torchs.activate_flash_attention_impl("X"))
    with pytest.raises(ReentrantTransitionError):
        ours.activate("b")
    assert (ours.current(), torchs.current(), kernels.installed) == ("a", "a", ["a"])


def test_showing_is_left_to_the_transition_that_is_running(ours, torchs, kernels):
    def install():
        ours.show_to_torch()
        return kernels.installer("b")()

    ours.register("b", register_fn=install)
    ours.activate("b")
    assert torchs.current() == "b"


def test_what_another_thread_activates_there_meanwhile_is_seen_next_time(ours, torchs, kernels):
    def install():
        torchs._FLASH_ATTENTION_ACTIVE = ("X", kernels.installer("X")())
        return kernels.installer("b")()

    ours.register("b", register_fn=install)
    ours.activate("b")
    assert torchs.current() == "X"
    ours.restore()
    assert (ours.current(), torchs.current()) == (None, None)


@pytest.mark.parametrize("name", ["", " spaced ", 7])
def test_names_that_only_torch_takes_do_no_harm(ours, torchs, kernels, name):
    torchs.register_flash_attention_impl(name, register_fn=kernels.installer("odd"))
    here = f"torch:{name}".strip()
    assert here in ours.names()
    torchs.activate_flash_attention_impl(name)
    assert ours.current() == here
    ours.activate("a")
    ours.activate(here)
    assert (ours.current(), torchs.current(), kernels.installed) == (here, name, ["odd"])
    ours.restore()
    assert kernels.running == "stock"


def test_what_torchs_has_meanwhile_is_taken_in_by_the_next_transition(ours, torchs, kernels):
    def install():
        torchs.activate_flash_attention_impl("X")  # by another thread, during this transition
        return kernels.installer("Y")()

    torchs.register_flash_attention_impl("Y", register_fn=install)
    ours.activate("torch:Y")
    assert (ours.current(), torchs.current(), kernels.installed) == ("torch:X", "X", ["X", "Y"])
    ours.show_to_torch()
    assert (ours.current(), torchs.current(), kernels.installed) == ("torch:X", "X", ["X"])


def test_what_another_thread_restores_there_meanwhile_is_seen_next_time(ours, torchs, kernels):
    torchs.activate_flash_attention_impl("X")
    ours.register(
        "b",
        register_fn=kernels.installer("b"),
        availability=torchs.restore_flash_attention_impl,
    )
    ours.explain()
    assert (ours.current(), torchs.current(), kernels.running) == (None, None, "stock")
    ours.activate("a")
    assert (ours.current(), torchs.current(), kernels.installed) == ("a", "a", ["a"])


def test_what_changes_there_at_the_very_end_is_looked_at_again(ours, torchs, monkeypatch):
    replace, seen = torch_registry.replace_active, []

    def too_late_at_first(torch, *entries):
        seen.append(entries)
        return len(seen) > 1 and replace(torch, *entries)

    monkeypatch.setattr(torch_registry, "replace_active", too_late_at_first)
    ours.activate("a")
    assert len(seen) >= 2
    assert torchs.current() == "a"


def test_torchs_cannot_be_unregistered_here(ours):
    with pytest.raises(NotRegisteredError, match="not registered here but in torch"):
        ours.unregister("torch:X")


def test_a_name_that_both_have_stays_torchs_there(ours, torchs, kernels):
    theirs = torchs._FLASH_ATTENTION_IMPLS["X"]
    ours.register("X", register_fn=kernels.installer("our X"))
    assert torchs._FLASH_ATTENTION_IMPLS["X"] is theirs
    ours.activate("X")
    assert (ours.current(), kernels.running) == ("X", "our X")
    ours.unregister("X")
    assert torchs._FLASH_ATTENTION_IMPLS["X"] is theirs


def test_registries_in_step_leave_each_others_implementations_alone(ours, torchs, kernels):
    other = Registry(Discovery(prefix="no.such.group"), in_step_with_torch=True)
    other.register("b", register_fn=kernels.installer("b"))
    assert sorted(torchs._FLASH_ATTENTION_IMPLS) == ["X", "a", "b"]


def test_a_registry_of_its_own_has_nothing_to_do_with_torchs(torchs, registry, kernels):
    torchs.register_flash_attention_impl("X", register_fn=kernels.installer("X"))
    registry.register("a", register_fn=kernels.installer("a"))
    registry.activate("a")
    assert registry.names() == ["a"]
    assert torchs.current() is None
    assert "a" not in torchs._FLASH_ATTENTION_IMPLS


@pytest.mark.parametrize(
    "change",
    [
        lambda module: setattr(module, "_FLASH_ATTENTION_ACTIVE", "a"),  # torch 2.10
        lambda module: delattr(module, "_FLASH_ATTENTION_ACTIVE"),
        lambda module: delattr(module, "_FLASH_ATTENTION_IMPLS"),
    ],
    ids=["active is a name", "nothing says what is active", "no table"],
)
def test_a_registry_of_unknown_form_is_left_alone_and_said_so(torchs, kernels, change):
    change(torchs)
    assert "not of the form" in torch_state.why_apart()
    registry = Registry(Discovery(prefix="no.such.group"), in_step_with_torch=True)
    registry.register("a", register_fn=kernels.installer("a"))
    registry.activate("a")
    assert (registry.current(), registry.names()) == ("a", ["a"])


def test_without_torch_it_says_so(monkeypatch):
    monkeypatch.delitem(sys.modules, torch_state.MODULE, raising=False)
    assert torch_state.why_apart() == "torch has not been imported"
    assert torch_state.loaded() is None


def test_torch_that_is_gone_again_is_no_crash(ours, torchs, kernels, monkeypatch):
    torchs.activate_flash_attention_impl("X")
    ours.show_to_torch()
    monkeypatch.delitem(sys.modules, torch_state.MODULE)
    ours.restore()
    assert (ours.current(), kernels.running) == (None, "stock")


# Whether an implementation of torch's can be used


def needing(module_path):
    def register(module_path=module_path):
        raise AssertionError("must not be called for a question")

    return register


@pytest.mark.parametrize(
    ("register_fn", "reason"),
    [
        (needing("no_such_package.interface"), "no_such_package is not installed"),
        (needing("json.tool"), None),
        (needing("sys"), None),
        (lambda other="no_such_package": None, None),
        (lambda: None, None),
        (len, None),
    ],
)
def test_one_says_which_module_it_lacks_as_far_as_torchs_code_tells(
    ours, torchs, register_fn, reason
):
    torchs.register_flash_attention_impl("Y", register_fn=register_fn)
    (report,) = [report for report in ours.explain() if report.name == "torch:Y"]
    assert report.available is (reason is None)
    assert reason is None or reason in report.unavailable_reason
    assert not report.recommended


def test_the_package_of_an_imported_module_is_not_looked_for(ours, torchs, monkeypatch):
    monkeypatch.setitem(sys.modules, "made_up", types.ModuleType("made_up"))  # without a spec
    torchs.register_flash_attention_impl("Y", register_fn=needing("made_up.interface"))
    (report,) = [report for report in ours.explain() if report.name == "torch:Y"]
    assert report.available


def test_the_switch_for_fa3_is_set_back_after_a_failure(ours, torchs, monkeypatch):
    switch = [False]
    internals = types.SimpleNamespace(
        _get_fa3_sdp_enabled=lambda: switch[0],
        _set_sdp_use_fa3=lambda value: switch.__setitem__(0, value),
    )
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(_C=internals))

    def half_way():
        switch[0] = True
        raise OSError("no such op")

    torchs.register_flash_attention_impl("FA3", register_fn=half_way)
    with pytest.raises(OSError, match="no such op"):
        ours.activate("torch:FA3")
    assert switch == [False]


def test_a_torch_without_that_switch_needs_no_setting_back(ours, torchs, monkeypatch, failing):
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(_C=None))
    torchs.register_flash_attention_impl("Y", register_fn=failing(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        ours.activate("torch:Y")
