"""Adapters read arguments as torch's schemas give them."""

from __future__ import annotations

import inspect

import pytest
import torch

from flash_attention_registry.sdpa.ops import ROUTED_OPS, difference_to_schema
from flash_attention_registry.sdpa.torch_internals import schema_of

ADAPTERS = {op: f for routed in ROUTED_OPS.values() for op, f in routed.adapters.items()}

# The schemas of torch 2.11, where they differ from those of 2.13.
FORWARD_OF_2_11 = (
    "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, "
    "Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, "
    "bool return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, "
    "SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None) -> "
    "(Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, "
    "Tensor debug_attn_mask)"
)


def with_op_of_this_torch(op: str) -> torch.FunctionSchema:
    schema = schema_of(op)
    if schema is None:
        pytest.skip(f"torch {torch.__version__} has no {op}")
    return schema


@pytest.mark.parametrize("op", ADAPTERS)
def test_adapter_has_the_names_order_and_defaults_of_the_schema(op: str) -> None:
    schema = with_op_of_this_torch(op)
    parameters = list(inspect.signature(ADAPTERS[op]).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    assert [p.name for p in positional] == [a.name for a in schema.arguments if not a.kwarg_only]
    for parameter, argument in zip(positional, schema.arguments, strict=False):
        assert (parameter.default is not parameter.empty) == argument.has_default_value()
        if argument.has_default_value():
            assert parameter.default == argument.default_value

    of_schema = {a.name: a.default_value for a in schema.arguments if a.kwarg_only}
    assert {name: keywords[name] for name in of_schema} == of_schema
    assert all(keywords[name] is None for name in keywords.keys() - of_schema.keys())


@pytest.mark.parametrize("op", ADAPTERS)
def test_schema_of_this_torch_is_routed(op: str) -> None:
    assert difference_to_schema(ADAPTERS[op], with_op_of_this_torch(op)) is None


def test_schema_of_torch_2_11_is_routed() -> None:
    schema = torch._C.parse_schema(FORWARD_OF_2_11)
    assert difference_to_schema(ADAPTERS["_flash_attention_forward"], schema) is None


def test_schema_with_more_arguments_is_routed() -> None:
    schema = torch._C.parse_schema(
        FORWARD_OF_2_11.replace("debug_mask, *", "debug_mask, int tiles=1, *")
    )
    assert difference_to_schema(ADAPTERS["_flash_attention_forward"], schema) is None


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        pytest.param("Tensor key, Tensor value", "Tensor value, Tensor key", "called", id="order"),
        pytest.param(", bool return_debug_mask", "", "missing", id="fewer"),
        pytest.param("float? scale=None", "float? scale=1.0", "another default", id="default"),
        pytest.param("debug_mask, *", "debug_mask=False, *", "another default", id="new-default"),
    ],
)
def test_contradicting_schema_is_told(old: str, new: str, difference: str) -> None:
    schema = torch._C.parse_schema(FORWARD_OF_2_11.replace(old, new))
    assert difference in str(difference_to_schema(ADAPTERS["_flash_attention_forward"], schema))


def test_op_with_contradicting_schema_stays_on_stock(
    monkeypatch: pytest.MonkeyPatch, plain_kernels: type
) -> None:
    from flash_attention_registry.sdpa import install, router

    op = "_scaled_dot_product_flash_attention_for_cpu"
    changed = str(schema_of(op)).replace("Tensor key, Tensor value", "Tensor value, Tensor key")
    monkeypatch.setattr(
        router,
        "schema_of",
        lambda name: torch._C.parse_schema(changed) if name == op else schema_of(name),
    )
    with pytest.warns(RuntimeWarning, match=f"aten::{op} stays on torch's own kernel"):
        install(plain_kernels(), "cpu")
    query = torch.randn(1, 2, 4, 8, dtype=torch.bfloat16)
    kernels = torch.library.get_kernel(f"aten::{op}", "CPU")
    assert "RegisterCPU" in repr(kernels)
    assert torch.nn.functional.scaled_dot_product_attention(query, query, query).isfinite().all()


def test_op_that_this_torch_lacks_is_left_out(
    monkeypatch: pytest.MonkeyPatch, plain_kernels: type
) -> None:
    from flash_attention_registry.sdpa import install, router

    backward = "_scaled_dot_product_flash_attention_for_cpu_backward"
    monkeypatch.setattr(
        router, "schema_of", lambda name: None if name == backward else schema_of(name)
    )
    install(plain_kernels(), "cpu")
    assert "RegisterCPU" in repr(torch.library.get_kernel(f"aten::{backward}", "CPU"))
