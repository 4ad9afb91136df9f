"""Snapshots: a test goes back to where it began, through real removals."""

from __future__ import annotations

import pytest

from flash_attention_registry import RestoreError


def test_reset_removes_what_was_activated_since(ab, kernels):
    ab.restore()
    snapshot = ab.snapshot()
    ab.register("c", register_fn=kernels.installer("c"))
    ab.activate("c")
    ab.reset(snapshot)
    assert (ab.current(), ab.names(), kernels.running) == (None, ["a", "b"], "stock")


def test_reset_brings_back_what_was_active(ab, kernels):
    snapshot = ab.snapshot()
    ab.activate("b")
    ab.unregister("a")
    ab.reset(snapshot)
    assert (ab.current(), ab.names(), kernels.installed) == ("a", ["a", "b"], ["a"])
    ab.restore()
    ab.reset(snapshot)
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_reset_does_not_touch_what_is_still_active(ab, kernels):
    snapshot = ab.snapshot()
    ab.unregister("b")
    ab.reset(snapshot)
    assert (ab.names(), kernels.removals) == (["a", "b"], [])


def test_reset_undoes_a_reregistration(ab, kernels):
    snapshot = ab.snapshot()
    ab.register("a", register_fn=kernels.installer("a2"))
    ab.activate("a")
    ab.reset(snapshot)
    assert (ab.current(), kernels.installed) == ("a", ["a"])


def test_reset_brings_back_listeners(ab):
    heard = []
    kept = ab.add_listener(lambda before, after: heard.append(("kept", after)))
    snapshot = ab.snapshot()
    kept.remove()
    ab.add_listener(lambda before, after: heard.append(("new", after)))
    ab.reset(snapshot)
    ab.activate("b")
    assert heard == [("kept", "b")]
    kept.remove()
    ab.activate("a")
    assert heard == [("kept", "b")]


def test_reset_completes_although_a_removal_fails(ab, kernels):
    snapshot = ab.snapshot()
    ab.register("s", register_fn=kernels.installer_with_stuck_handle("s", OSError("no")))
    ab.activate("s")
    with pytest.raises(RestoreError):
        ab.reset(snapshot)
    assert (ab.current(), ab.names(), kernels.running) == ("a", ["a", "b"], "a")
    assert [handle.name for handle in ab.stuck_handles()] == ["s"]  # its kernels may be in still


def test_reset_brings_back_the_scan_of_entry_points(registry):
    registry.names()
    snapshot = registry.snapshot()
    before = registry.discovery.entries()
    registry.discovery.refresh()
    registry.discovery.entries()
    registry.reset(snapshot)
    assert registry.discovery.entries() is before
