"""Which aten ops are taken over, at which dispatch key, by which adapter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch

from . import cpu, cudnn, flash, flash_general

__all__ = ["ROUTED_OPS", "Adapter", "RoutedOps", "difference_to_schema"]

Adapter: TypeAlias = Callable[..., Any]
"""Takes the active kernels and an op's arguments; returns its results or a reason to decline."""


@dataclass(frozen=True, slots=True)
class RoutedOps:
    """The ops of one device type.

    Attributes:
        dispatch_key: Where their kernels stand.
        adapters: By op name, without `aten::` and overload. The `.quantized` overloads that some
            of them have are left alone.
    """

    dispatch_key: str
    adapters: Mapping[str, Adapter]


ROUTED_OPS: Mapping[str, RoutedOps] = MappingProxyType(
    {
        "cuda": RoutedOps(
            "CUDA",
            MappingProxyType(
                {
                    "_scaled_dot_product_flash_attention": flash.sdpa_flash,
                    "_scaled_dot_product_flash_attention_backward": flash.sdpa_flash_backward,
                    "_flash_attention_forward": flash_general.flash_forward,
                    "_flash_attention_backward": flash_general.flash_backward,
                    # torch 2.12 and newer
                    "_flash_attention_forward_no_dropout_inplace": (
                        flash_general.flash_forward_no_dropout_inplace
                    ),
                    "_scaled_dot_product_cudnn_attention": cudnn.sdpa_cudnn,
                    "_scaled_dot_product_cudnn_attention_backward": cudnn.sdpa_cudnn_backward,
                }
            ),
        ),
        "cpu": RoutedOps(
            "CPU",
            MappingProxyType(
                {
                    "_scaled_dot_product_flash_attention_for_cpu": cpu.sdpa_cpu,
                    "_scaled_dot_product_flash_attention_for_cpu_backward": cpu.sdpa_cpu_backward,
                }
            ),
        ),
    }
)


def difference_to_schema(adapter: Adapter, schema: torch.FunctionSchema) -> str | None:
    """How an adapter's signature contradicts a schema, or None if calls can be routed.

    A schema may have more arguments than the adapter (their use is declined call by call) and
    fewer keyword arguments (those of newer torch versions, None by default here).
    """
    parameters = list(inspect.signature(adapter).parameters.values())[1:]
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    arguments = [a for a in schema.arguments if not a.kwarg_only]
    if len(arguments) < len(positional):
        return f"argument {positional[len(arguments)].name} is missing"
    # Positional arguments that the schema adds at its end have no partner here.
    pairs = list(zip(arguments, positional, strict=False))
    pairs += [
        (a, keywords[a.name]) for a in schema.arguments if a.kwarg_only and a.name in keywords
    ]
    for argument, parameter in pairs:
        if argument.name != parameter.name:
            return f"argument {parameter.name} is called {argument.name}"
        default = argument.default_value if argument.has_default_value() else parameter.empty
        if default != parameter.default:
            return f"argument {argument.name} has another default"
    return None
