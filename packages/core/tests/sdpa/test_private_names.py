"""Private names of torch: each is of the form that the code expects, and may be gone one day.

If a test of `HOLDS` fails, torch has changed what stands behind a name: the code goes on without
it, as the tests below it show, and should learn the new form.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import flash_attention_registry
from flash_attention_registry.sdpa import (
    dispatch_counts,
    install,
    overrides,
    router,
    torch_internals,
    uninstall,
)
from flash_attention_registry.sdpa.torch_internals import UnknownTorchError

PACKAGE = Path(flash_attention_registry.__file__).parent
OP = "_scaled_dot_product_flash_attention_for_cpu"
KEY = f"aten/{OP}/CPU"
TORCHS_REGISTRY = "torch.nn.attention._registry"


# What they are in this torch


def a_library() -> Any:
    """A library with one kernel, which is never called."""
    library = torch.library.Library("aten", "IMPL")
    library.impl(OP, lambda *_: None, "CPU", allow_override=True)
    return library


def bookkeeping_lists_python_kernels() -> bool:
    library = a_library()
    listed = KEY in torch.library._impls and isinstance(torch.library._impls, set)
    library._destroy()
    return listed and KEY not in torch.library._impls


def a_library_lists_its_own() -> bool:
    library = a_library()
    listed = library._op_impls == {KEY}
    library._destroy()
    return listed


def a_library_can_be_taken_out() -> bool:
    before = repr(torch.library.get_kernel(f"aten::{OP}", "CPU"))
    library = a_library()
    meanwhile = repr(torch.library.get_kernel(f"aten::{OP}", "CPU"))
    library._destroy()
    return before == repr(torch.library.get_kernel(f"aten::{OP}", "CPU")) != meanwhile


def ops_tell_their_schemas() -> bool:
    schema = getattr(torch.ops.aten, OP).default._schema
    return isinstance(schema, torch.FunctionSchema) and schema.arguments[0].name == "query"


def the_choice_of_a_backend_can_be_asked_for() -> bool:
    query = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16)
    chosen = torch._fused_sdp_choice(query, query, query, None, dropout_p=0.0, is_causal=True)
    return chosen == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value


def inductors_configuration_has_the_switch() -> bool:
    return importlib.import_module(torch_internals.INDUCTOR_CONFIG).cpp_wrapper is False


def internals_have_the_switch_of_fa3() -> bool:
    before = torch._C._get_fa3_sdp_enabled()
    torch._C._set_sdp_use_fa3(before)
    return before is False and torch._C._get_fa3_sdp_enabled() is before


def torchs_registry() -> Any:
    return sys.modules[TORCHS_REGISTRY]


def torchs_registry_names_what_is_active() -> bool:
    class Handle:
        remove = staticmethod(lambda: None)

    torch.nn.attention.register_flash_attention_impl("for this test", register_fn=Handle)
    before = torchs_registry()._FLASH_ATTENTION_ACTIVE
    torch.nn.attention.activate_flash_attention_impl("for this test")
    name, handle = torchs_registry()._FLASH_ATTENTION_ACTIVE
    torch.nn.attention.restore_flash_attention_impl()
    del torchs_registry()._FLASH_ATTENTION_IMPLS["for this test"]
    after = torchs_registry()._FLASH_ATTENTION_ACTIVE
    return (before, name, type(handle), after) == (None, "for this test", Handle, None)


def torchs_registry_is_a_table() -> bool:
    table = torchs_registry()._FLASH_ATTENTION_IMPLS
    return (
        type(table) is dict and {"FA3", "FA4"} <= set(table) and all(map(callable, table.values()))
    )


HOLDS: dict[str, Callable[[], bool]] = {
    "_impls": bookkeeping_lists_python_kernels,
    "_op_impls": a_library_lists_its_own,
    "_destroy": a_library_can_be_taken_out,
    "_schema": ops_tell_their_schemas,
    "_fused_sdp_choice": the_choice_of_a_backend_can_be_asked_for,
    torch_internals.INDUCTOR_CONFIG: inductors_configuration_has_the_switch,
    "_C": lambda: type(torch._C) is type(sys),
    "torch._C": lambda: sys.modules["torch._C"] is torch._C,
    "_get_fa3_sdp_enabled": internals_have_the_switch_of_fa3,
    "_set_sdp_use_fa3": internals_have_the_switch_of_fa3,
    TORCHS_REGISTRY: lambda: TORCHS_REGISTRY in sys.modules,
    "_FLASH_ATTENTION_ACTIVE": torchs_registry_names_what_is_active,
    "_FLASH_ATTENTION_IMPLS": torchs_registry_is_a_table,
}


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("name", HOLDS)
def test_it_is_what_the_code_takes_it_for(name: str) -> None:
    assert HOLDS[name]()


# That these are all


PYTHONS = {
    "_current_frames",
    "_getframe",
    "_initializing",
    "_local",
    "_normalized_name",
    "_path",
}
"""Private names of Python's own modules; tests of those who use them see to them."""


def trees() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier()


def names_defined() -> set[str]:
    """Every private name that the package gives to something of its own."""
    found = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id == "self":
                    found.add(node.attr)
            elif isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == "__slots__" for target in node.targets
            ):
                found |= {
                    one.value for one in ast.walk(node.value) if isinstance(one, ast.Constant)
                }
    return set(filter(is_private, found))


def names_used() -> dict[str, set[str]]:
    """Every private name that is an attribute or all of a text, or a module's path; and where."""
    found: dict[str, set[str]] = {}
    for file, tree in trees():
        documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            name = ""
            if isinstance(node, ast.Attribute):
                name = node.attr
            elif isinstance(node, ast.Constant) and id(node) not in documentation:
                # The ops that are routed have such names too; their schemas are checked.
                name = "" if hasattr(torch.ops.aten, str(node.value)) else str(node.value)
            is_module = name.startswith("torch.") and any(map(is_private, name.split(".")))
            if is_module or is_private(name):
                found.setdefault(name, set()).add(file)
    return found


def test_no_other_private_name_of_torch_is_used() -> None:
    """If this fails, a new one is used: read it in `torch_internals`, and add it to `HOLDS`."""
    strange = names_used().keys() - names_defined() - PYTHONS
    assert strange == HOLDS.keys()


def test_they_are_used_where_their_forms_are_checked() -> None:
    rooms = {"sdpa/torch_internals.py", "torch_state.py", "torch_impls.py"}
    used = {name: files for name, files in names_used().items() if name in HOLDS}
    elsewhere = {name: files - rooms for name, files in used.items() if files - rooms}
    # Where the doctor only looks whether an import had come that far.
    assert elsewhere == {"torch._C": {"doctor/__init__.py"}}


# What happens without them; of torch's registry, tests of `torch_registry` show it


Kernels = Callable[[], Any]
STRANGE: dict[str, Any] = {
    "a list": [KEY],
    "keys of another form": {OP},
    "keys of another type": {("aten", OP, "CPU")},
}
each_strange_form = pytest.mark.parametrize(
    "form",
    [{}, *({"_impls": form, "_op_impls": form} for form in STRANGE.values())],
    ids=["gone", *STRANGE],
)


def served_calls() -> int:
    query = torch.ones(1, 1, 8, 64, dtype=torch.bfloat16)
    F.scaled_dot_product_attention(query, query, query)
    return dispatch_counts().served


@each_strange_form
def test_bookkeeping_of_an_unknown_form_is_not_read(
    form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = SimpleNamespace(library=SimpleNamespace(**form), ops=torch.ops)
    monkeypatch.setattr(torch_internals, "torch", strange)
    assert torch_internals.python_kernels() is None
    assert not overrides.is_overridden_from_python(OP, "CPU")
    overrides.forget_python_overrides(a_library())


@each_strange_form
def test_a_library_of_an_unknown_form_keeps_its_keys(
    form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overrides, "_registers_without_override", lambda: True)
    before = set(torch.library._impls)
    library = SimpleNamespace(**form)
    assert torch_internals.keys_of(library) is None
    overrides.forget_python_overrides(library)
    assert torch.library._impls == before


def test_an_empty_bookkeeping_is_of_the_known_form() -> None:
    assert torch_internals.keys_of(SimpleNamespace(_op_impls=set())) == set()


def test_routers_that_cannot_be_taken_out_are_when_they_are_freed(
    monkeypatch: pytest.MonkeyPatch, plain_kernels: Kernels
) -> None:
    before = repr(torch.library.get_kernel(f"aten::{OP}", "CPU"))
    monkeypatch.delattr(torch.library.Library, "_destroy")
    install(plain_kernels(), "cpu").remove()
    assert repr(torch.library.get_kernel(f"aten::{OP}", "CPU")) != before
    uninstall("cpu")
    assert repr(torch.library.get_kernel(f"aten::{OP}", "CPU")) == before


@pytest.mark.parametrize("default", [SimpleNamespace(), SimpleNamespace(_schema="aten::...")])
def test_where_schemas_are_not_told_installing_says_so_and_stock_runs(
    default: object, monkeypatch: pytest.MonkeyPatch, plain_kernels: Kernels
) -> None:
    aten = SimpleNamespace(**{OP: SimpleNamespace(default=default)})
    strange = SimpleNamespace(
        ops=SimpleNamespace(aten=aten),
        FunctionSchema=torch.FunctionSchema,
        __version__=torch.__version__,
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch_internals, "torch", strange)
        with pytest.raises(UnknownTorchError, match=f"does not tell the schema of aten::{OP}"):
            install(plain_kernels(), "cpu")
    assert router.installed_kernel_sets() == {}
    assert served_calls() == 0
    install(plain_kernels(), "cpu")
    assert served_calls() == 1


def refuse(*_arguments: object, **_options: object) -> int:
    raise TypeError("unknown argument")


@pytest.mark.parametrize("change", ["gone", "other arguments", "another result"])
def test_a_choice_that_is_not_told_is_unknown(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if change == "gone":
        monkeypatch.delattr(torch, "_fused_sdp_choice")
    else:
        new = refuse if change == "other arguments" else lambda *_, **__: "flash"
        monkeypatch.setattr(torch, "_fused_sdp_choice", new)
    query = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16)
    assert torch_internals.chosen_backend(query, None, 0.0, True) is None


@pytest.mark.parametrize("config", [None, SimpleNamespace()])
def test_a_configuration_without_the_switch_decides_nothing(
    config: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, torch_internals.INDUCTOR_CONFIG, config)
    assert torch_internals.cpp_wrapper() is None
