"""Capabilities decline what they do not declare, with a reason that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flash_attention_registry.sdpa import AttentionCall, Capabilities, KernelSet
from flash_attention_registry.sdpa import capabilities as module

EXTRA = torch.zeros(2, dtype=torch.int32)


def call(head_dim: int = 64, kv_heads: int = 4, **changes: Any) -> AttentionCall:
    query = torch.empty(2, 16, 4, head_dim, dtype=changes.pop("dtype", torch.bfloat16))
    key = torch.empty(2, 24, kv_heads, head_dim, dtype=query.dtype)
    return AttentionCall(query, key, key, 1.0, changes.pop("causal", False), **changes)


CALLS = {
    "causal": call(causal=True),
    "gqa": call(kv_heads=2),
    "window": call(window_left=3),
    "varlen": call(cu_seqlens_query=EXTRA, cu_seqlens_key=EXTRA),
    "attn_bias": call(attn_bias=EXTRA),
    "alibi_slopes": call(alibi_slopes=EXTRA),
    "seqused_key": call(seqused_key=EXTRA),
    "block_table": call(block_table=EXTRA),
    "num_splits": call(num_splits=2),
}


@pytest.mark.parametrize("feature", CALLS)
def test_feature_is_served_exactly_if_declared(
    feature: str, make_capabilities: Callable[..., Capabilities]
) -> None:
    undeclared = make_capabilities(features=frozenset(CALLS) - {feature})
    declared = make_capabilities(features=frozenset({feature}))
    assert str(undeclared.reason_to_decline(CALLS[feature])).startswith(feature)
    assert declared.reason_to_decline(CALLS[feature]) is None


def test_right_window_alone_is_a_window(make_capabilities: Callable[..., Capabilities]) -> None:
    bare = make_capabilities(features=frozenset())
    assert bare.reason_to_decline(call(window_right=3)) == "window is not supported"


@pytest.mark.parametrize("num_splits", [None, 0, 1])
def test_one_split_is_no_feature(
    num_splits: int | None, make_capabilities: Callable[..., Capabilities]
) -> None:
    bare = make_capabilities(features=frozenset())
    assert bare.reason_to_decline(call(num_splits=num_splits)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"dtype": torch.float32}, "dtype torch.float32 is not supported", id="dtype"),
        pytest.param({"head_dim": 512}, "head_dim 512 is not supported", id="too-large"),
        pytest.param({"head_dim": 33}, "head_dim 33 is not supported", id="odd"),
    ],
)
def test_dtype_and_head_dim_are_named(
    changes: dict[str, Any], reason: str, make_capabilities: Callable[..., Capabilities]
) -> None:
    assert make_capabilities().reason_to_decline(call(**changes)) == reason


def test_device_type_is_named(make_capabilities: Callable[..., Capabilities]) -> None:
    cuda_only = make_capabilities(device_types=frozenset({"cuda"}))
    assert cuda_only.reason_to_decline(call()) == "device type cpu is not supported"


def test_compute_capability_says_nothing_of_a_cpu(
    make_capabilities: Callable[..., Capabilities],
) -> None:
    hopper = make_capabilities(min_compute_capability=(9, 0))
    assert hopper.reason_to_decline(call()) is None


class CudaQuery:
    """What capabilities read of a query, on device 1, an A100."""

    dtype, shape, is_cuda = torch.bfloat16, (2, 16, 4, 64), True

    def get_device(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("lowest", "highest", "served"),
    [
        pytest.param(None, None, True, id="any"),
        pytest.param((8, 0), None, True, id="at-least"),
        pytest.param((9, 0), None, False, id="too-old"),
        pytest.param(None, (8, 0), True, id="at-most"),
        pytest.param((7, 0), (7, 5), False, id="too-new"),
    ],
)
def test_compute_capability_is_asked_once_per_device(
    lowest: tuple[int, int] | None,
    highest: tuple[int, int] | None,
    served: bool,
    monkeypatch: pytest.MonkeyPatch,
    make_capabilities: Callable[..., Capabilities],
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(module, "_compute_capability_of", {})
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: asked.append(index) or (8, 0)
    )
    declared = make_capabilities(min_compute_capability=lowest, max_compute_capability=highest)
    request = call()._replace(query=CudaQuery())
    reasons = {declared.reason_to_decline(request) for _ in range(3)}
    assert reasons == {None if served else "compute capability 8.0 is not supported"}
    assert asked == ([] if lowest is highest is None else [1])


@pytest.mark.parametrize("deterministic", ["always", "on_request", "never"])
def test_only_a_set_that_never_repeats_declines_deterministic_gradients(
    deterministic: str, make_capabilities: Callable[..., Capabilities]
) -> None:
    declared = make_capabilities(deterministic=deterministic)
    assert declared.reason_to_decline_backward() is None
    torch.use_deterministic_algorithms(True)
    try:
        declines = declared.reason_to_decline_backward() is not None
    finally:
        torch.use_deterministic_algorithms(False)
    assert declines == (deterministic == "never")


def test_backward_is_declined_where_it_is_not_declared(
    make_capabilities: Callable[..., Capabilities],
) -> None:
    forward_only = make_capabilities(features=frozenset({"causal"}))
    assert forward_only.reason_to_decline_backward() == "backward is not supported"


def test_kernel_set_is_recognised_by_its_parts(plain_kernels: type) -> None:
    assert isinstance(plain_kernels(), KernelSet)
    assert not isinstance(object(), KernelSet)
