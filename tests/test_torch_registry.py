"""Our registry and torch's, with kernels in torch's dispatcher: who is named is who runs.

Calls go to the CUDA key of the flash op, on a GPU if there is one; else with CPU tensors, which the
kernels of these tests do not mind.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention as theirs
from torch import Tensor
from torch.nn.attention import _fa4

import flash_attention_registry as ours
from flash_attention_registry import torch_state
from flash_attention_registry.sdpa import (
    AttentionCall,
    Capabilities,
    install,
    reset_dispatch_counts,
    router,
    uninstall,
)

# Torch's FA4 overrides kernels, and torch warns of that once.
pytestmark = pytest.mark.filterwarnings("ignore:.*may also be overridden")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OP = "_scaled_dot_product_flash_attention"


class Marked:
    """A kernel set whose output is one number, its mark."""

    capabilities = Capabilities(
        device_types=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({torch.bfloat16}),
        head_dims=(64,),
        features=frozenset(),
        deterministic="always",
    )

    def __init__(self, name: str, mark: float) -> None:
        self.name = name
        self.mark = mark

    def supports(self, call: AttentionCall) -> str | None:
        return self.capabilities.reason_to_decline(call)

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        batch, rows, heads, _ = call.query.shape
        assert call.out is not None
        return call.out.fill_(self.mark), call.query.new_zeros(
            batch, heads, rows, dtype=torch.float32
        )

    def backward(self, *_: object) -> Any:
        raise NotImplementedError


MARKS = {"a": 11.0, "b": 22.0}


class FakeFA4Error(Exception):
    """What torch's FA4 raises in these tests when it is reached."""


def running() -> str | None:
    """The name of what a call of the flash op reaches; None for torch's own kernel."""
    x = torch.zeros(1, 1, 16, 64, dtype=torch.bfloat16, device=DEVICE)
    keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    try:
        with torch.no_grad():
            kernel = torch.library.get_kernel(f"aten::{OP}", "CUDA")
            out = kernel.call_boxed(keyset, x, x, x)[0]
    except FakeFA4Error:
        return "torch:FA4"
    except RuntimeError as error:
        on_cpu_builds = ("no CUDA kernel to fall back to", "no kernel for CUDA")
        if any(text in str(error) for text in on_cpu_builds):
            return None
        raise
    mark = out.flatten()[0].item()
    return next((name for name, known in MARKS.items() if known == mark), None)


@pytest.fixture(autouse=True)
def _clean(flash_attention_registry_reset: Any) -> Iterator[None]:
    reset_dispatch_counts()
    yield
    ours.default_registry().restore_if_active()
    if router._slots["cuda"].kernels is None:
        uninstall("cuda")


@pytest.fixture
def a_and_b(_clean: None) -> None:
    """The implementations `a` and `b`, registered on our side."""
    for name, mark in MARKS.items():
        kernels = Marked(name, mark)
        ours.register_flash_attention_impl(
            name, register_fn=lambda kernels=kernels: install(kernels, "cuda")
        )


@pytest.fixture(params=["as this torch registers", "without allow_override, as 2.11 and 2.12 do"])
def fake_fa4(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _clean: None
) -> Iterator[None]:
    """The module that torch's FA4 imports; torch registers its kernels as two versions do."""

    def ran(*_: object, **__: object) -> Any:
        raise FakeFA4Error

    module = types.ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd = module._flash_attn_bwd = ran  # type: ignore[attr-defined]  # a made-up module
    monkeypatch.setattr(_fa4, "_fa4_forward_support_error", ran)
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", module)
    if request.param.startswith("without"):
        impl = torch.library.Library.impl

        def old_impl(self: Any, *args: Any, allow_override: bool = False, **kwargs: Any) -> Any:
            return impl(self, *args, allow_override=allow_override, **kwargs)

        monkeypatch.setattr(torch.library.Library, "impl", old_impl)
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0"))
    _fa4._fa4_import_module.cache_clear()
    yield
    _fa4._fa4_import_module.cache_clear()


def assert_both_name(name: str | None) -> None:
    own_name = None if name is None else name.removeprefix("torch:")
    assert ours.current_flash_attention_impl() == name
    assert theirs.current_flash_attention_impl() == own_name
    assert running() == name


def test_torch_activates_its_fa4_on_top_of_our_router(a_and_b: None, fake_fa4: None) -> None:
    ours.activate_flash_attention_impl("a")
    assert_both_name("a")
    theirs.activate_flash_attention_impl("FA4")
    assert_both_name("torch:FA4")
    ours.activate_flash_attention_impl("b")
    assert_both_name("b")
    theirs.restore_flash_attention_impl()
    assert_both_name(None)


CALLS: dict[str, tuple[Callable[[], None], str | None]] = {
    "ours a": (lambda: ours.activate_flash_attention_impl("a"), "a"),
    "ours torch:FA4": (lambda: ours.activate_flash_attention_impl("torch:FA4"), "torch:FA4"),
    "ours restore": (lambda: ours.default_registry().restore_if_active(), None),
    "torch b": (lambda: theirs.activate_flash_attention_impl("b"), "b"),
    "torch FA4": (lambda: theirs.activate_flash_attention_impl("FA4"), "torch:FA4"),
    "torch restore": (lambda: theirs.restore_flash_attention_impl(), None),
}


@pytest.mark.parametrize("first", CALLS)
def test_any_four_calls_leave_both_naming_what_runs(
    a_and_b: None, fake_fa4: None, first: str
) -> None:
    for rest in itertools.product(CALLS, repeat=3):
        for call in (first, *rest):
            make, after = CALLS[call]
            make()
            assert_both_name(after)


def test_ours_are_listed_activated_and_restored_by_torch(a_and_b: None) -> None:
    assert {"a", "b"} <= set(theirs.list_flash_attention_impls())
    theirs.activate_flash_attention_impl("a")
    assert_both_name("a")
    theirs.activate_flash_attention_impl("a")
    assert_both_name("a")
    theirs.restore_flash_attention_impl()
    assert_both_name(None)


def test_torchs_are_listed_by_ours_and_belong_to_no_family() -> None:
    reports = {report.name: report for report in ours.explain_flash_attention_impls()}
    for name in theirs.list_flash_attention_impls():
        if name in ("FA3", "FA4"):
            report = reports[f"torch:{name}"]
            assert report.family is None
            assert not report.recommended


def test_one_that_is_not_installed_is_unavailable_and_says_what_it_needs() -> None:
    if "flash_attn" in sys.modules:
        pytest.fail("the module must not be there")
    with pytest.raises(ours.ImplUnavailableError, match=r"needs the module flash_attn\.cute"):
        ours.activate_flash_attention_impl("torch:FA4")
    assert_both_name(None)


def test_a_failed_activation_of_torchs_brings_ours_back(
    a_and_b: None, fake_fa4: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours.activate_flash_attention_impl("a")

    def fail() -> None:
        raise RuntimeError("half registered")

    monkeypatch.setattr(_fa4, "_fa4_register_kernels", fail)
    with pytest.raises(RuntimeError, match="half registered"):
        ours.activate_flash_attention_impl("torch:FA4")
    assert_both_name("a")


def test_a_failed_activation_of_fa3_leaves_its_switch_off(
    a_and_b: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention import _fa3

    def fail() -> None:
        assert torch._C._get_fa3_sdp_enabled()
        raise RuntimeError("half registered")

    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("fake"))
    monkeypatch.setattr(_fa3, "_fa3_import_module", lambda path: None)
    monkeypatch.setattr(_fa3, "_fa3_register_kernels", fail)
    ours.activate_flash_attention_impl("a")
    with pytest.raises(RuntimeError, match="half registered"):
        ours.activate_flash_attention_impl("torch:FA3")
    assert not torch._C._get_fa3_sdp_enabled()
    assert_both_name("a")


def test_what_is_active_in_both_is_returned_to(a_and_b: None, fake_fa4: None) -> None:
    theirs.activate_flash_attention_impl("FA4")
    with ours.use_flash_attention_impl("a"):
        assert_both_name("a")
    assert_both_name("torch:FA4")


def test_torch_refuses_what_is_not_available_and_stock_runs(a_and_b: None) -> None:
    ours.register_flash_attention_impl(
        "elsewhere", register_fn=lambda: None, availability=lambda: "needs another GPU"
    )
    with pytest.raises(ours.ImplUnavailableError, match="needs another GPU"):
        theirs.activate_flash_attention_impl("elsewhere")
    assert_both_name(None)


def test_an_unregistered_implementation_is_gone_from_torchs_list(a_and_b: None) -> None:
    theirs.activate_flash_attention_impl("a")
    ours.unregister_flash_attention_impl("a")
    assert "a" not in theirs.list_flash_attention_impls()
    assert_both_name(None)


def test_a_provider_cannot_hide_one_of_torchs(a_and_b: None) -> None:
    before = theirs._registry._FLASH_ATTENTION_IMPLS["FA4"]
    ours.register_flash_attention_impl("FA4", register_fn=lambda: install(Marked("FA4", 11.0)))
    assert theirs._registry._FLASH_ATTENTION_IMPLS["FA4"] is before
    assert {"FA4", "torch:FA4"} <= set(ours.list_flash_attention_impls())


def test_this_torch_has_the_private_names_that_are_used() -> None:
    """If this fails, torch has changed its registry: `torch_state` must learn the new one."""
    module = sys.modules[torch_state.MODULE]
    assert torch_state.why_apart() is None
    assert module._FLASH_ATTENTION_ACTIVE is None
    assert {"FA3", "FA4"} <= set(module._FLASH_ATTENTION_IMPLS)
    handle = types.SimpleNamespace(remove=lambda: None)
    module.register_flash_attention_impl("form", register_fn=lambda: handle)
    try:
        module.activate_flash_attention_impl("form")
        name, held = module._FLASH_ATTENTION_ACTIVE
        assert (name, held) == ("form", handle)
        module.restore_flash_attention_impl()
        assert module._FLASH_ATTENTION_ACTIVE is None
    finally:
        del module._FLASH_ATTENTION_IMPLS["form"]
    for name, needs in (("FA3", "flash_attn_interface"), ("FA4", "flash_attn.cute.interface")):
        register_fn = module._FLASH_ATTENTION_IMPLS[name]
        assert register_fn.__code__.co_varnames[:1] == ("module_path",)
        assert register_fn.__defaults__ == (needs,)
    assert callable(torch._C._get_fa3_sdp_enabled)
    assert callable(torch._C._set_sdp_use_fa3)
