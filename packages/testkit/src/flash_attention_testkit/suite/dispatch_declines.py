"""What is declared is served; what is not is declined with a reason, and runs on torch's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from flash_attention_registry import Registry
from flash_attention_registry.sdpa import AttentionCall, Feature, dispatch_counts
from flash_attention_testkit.suite._base import ProviderTestsBase
from flash_attention_testkit.suite._subject import (
    Subject,
    plain_inputs,
    run_sdpa,
    usual_form,
)
from flash_attention_testkit.suite.dispatch_base import skip_unless_declared

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_HEAD_DIMS = (1, 4, 20, 36, 64, 72, 100, 128, 256, 264, 512)
"""Among them ones that hardly any kernel set serves."""


class DeclineTests(ProviderTestsBase):
    """``supports`` says what ``Capabilities`` say, and why not; declined calls are torch's."""

    @pytest.mark.parametrize("dtype", list(_DTYPES))
    def test_dtypes_are_served_as_declared(self, subject: Subject, dtype: str) -> None:
        """A declared dtype is served, any other declined with a reason."""
        wanted = _DTYPES[dtype]
        call = _call(subject, dtype=wanted)
        _assert_as_declared(subject, call, wanted in subject.capabilities.dtypes)

    @pytest.mark.parametrize("head_dim", _HEAD_DIMS)
    def test_head_dims_are_served_as_declared(self, subject: Subject, head_dim: int) -> None:
        """Likewise for the head dimension."""
        call = _call(subject, head_dim=head_dim)
        _assert_as_declared(subject, call, head_dim in subject.capabilities.head_dims)

    @pytest.mark.parametrize(
        "feature", [feature for feature in get_args(Feature) if feature != "backward"]
    )
    def test_features_are_served_as_declared(self, subject: Subject, feature: Feature) -> None:
        """Likewise for everything that a call may ask for."""
        call = _ASKS_FOR[feature](_call(subject))
        declared = subject.capabilities.features
        if feature in declared and feature == "block_table":
            skip_unless_declared(subject, "varlen")  # pages are of packed sequences
        _assert_as_declared(subject, call, feature in declared)

    def test_another_device_is_declined(self, subject: Subject) -> None:
        """A device type that is not declared is declined with a reason."""
        meta = [tensor.to("meta") for tensor in _call(subject)[:3]]
        call = _call(subject)._replace(query=meta[0], key=meta[1], value=meta[2])
        _assert_as_declared(subject, call, "meta" in subject.capabilities.device_types)

    def test_reasons_name_no_length(self, subject: Subject) -> None:
        """Calls are counted by reason, so a reason must not differ from call to call."""
        undeclared = [dtype for dtype in _DTYPES.values() if dtype not in _declared_dtypes(subject)]
        if not undeclared:
            pytest.skip(f"{subject.name} serves every dtype that is tried")
        reasons = {
            subject.kernel_set.supports(_call(subject, dtype=undeclared[0], rows=rows))
            for rows in (5, 1031)
        }
        assert len(reasons) == 1, f"one reason differs by the length: {reasons}"

    @pytest.mark.parametrize("asks_for", ["float64", "dropout", "mask", "head_dim"])
    def test_declined_calls_are_torchs_own(
        self, subject: Subject, registry: Registry, asks_for: str
    ) -> None:
        """They give what they give without the subject: the same bits, or the same error."""
        run = _declined_call(subject, asks_for)
        active = _outcome(run)
        counts = dispatch_counts()
        registry.restore()
        assert _same(active, _outcome(run)), f"a call that asks for {asks_for} is not torch's"
        assert counts.served == 0, str(counts)

    @pytest.mark.parametrize("asks_for", ["float64", "dropout", "mask", "head_dim"])
    def test_declined_calls_are_counted_with_a_reason(
        self, subject: Subject, asks_for: str
    ) -> None:
        """``dispatch_counts()`` has each of them, once, and not as an error of the kernel set."""
        _outcome(_declined_call(subject, asks_for))
        declined: Mapping[str, int] = dispatch_counts()[_op_of(subject)].declined
        assert list(declined.values()) == [1], f"one call was declined: {dict(declined)}"
        assert all(reason.strip() for reason in declined)
        errors = [reason for reason in declined if reason.startswith("kernel raised")]
        assert not errors, f"the call was not declined, the kernel set failed: {errors}"

    def test_gradients_are_served_if_declared(self, subject: Subject) -> None:
        """Where gradients are declared, they are served too."""
        skip_unless_declared(subject, "backward")
        inputs = plain_inputs(subject)
        tensors = inputs.query, inputs.key, inputs.value
        result = run_sdpa(subject, *tensors, grad_out=inputs.grad_out)
        assert result.dq is not None

    def test_undeclared_gradients_are_torchs_own(self, subject: Subject) -> None:
        """Where they are not, torch's backward follows, and counts why."""
        if subject.has_backward:
            pytest.skip(f"{subject.name} declares gradients")
        inputs = plain_inputs(subject)
        leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
        q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.autograd.grad(out.transpose(1, 2), leaves, inputs.grad_out)
        declined = dispatch_counts()[f"{_op_of(subject)}_backward"].declined
        assert list(declined.values()) == [1]


def _call(
    subject: Subject,
    *,
    dtype: torch.dtype | None = None,
    head_dim: int | None = None,
    rows: int = 6,
) -> AttentionCall:
    """A plain call with ``[1, rows, 2, D]`` of zeros, of the usual form but for the changes."""
    usual_dim, usual_dtype = usual_form(subject)
    shape = 1, rows, 2, head_dim or usual_dim
    zeros = torch.zeros(shape, dtype=dtype or usual_dtype, device=subject.device)
    return AttentionCall(zeros, zeros, zeros, shape[-1] ** -0.5, False, out=torch.zeros_like(zeros))


def _grouped(call: AttentionCall) -> AttentionCall:
    return call._replace(key=call.key[:, :, :1], value=call.value[:, :, :1])


def _packed(call: AttentionCall) -> AttentionCall:
    rows = call.query.shape[1]
    edges = torch.tensor([0, rows], dtype=torch.int32, device=call.query.device)
    out = None if call.out is None else call.out[0]
    return call._replace(
        query=call.query[0],
        key=call.key[0],
        value=call.value[0],
        out=out,
        cu_seqlens_query=edges,
        cu_seqlens_key=edges,
        max_seqlen_query=rows,
        max_seqlen_key=rows,
    )


def _paged(call: AttentionCall) -> AttentionCall:
    packed = _packed(call)
    table = torch.zeros(1, 1, dtype=torch.int32, device=call.query.device)
    return packed._replace(key=call.key, value=call.value, block_table=table)


def _new(call: AttentionCall, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=call.query.device)


_ASKS_FOR: dict[str, Callable[[AttentionCall], AttentionCall]] = {
    "alibi_slopes": lambda call: call._replace(alibi_slopes=_new(call, 2, dtype=torch.float32)),
    "attn_bias": lambda call: call._replace(
        attn_bias=_new(call, 1, 1, *(call.query.shape[1],) * 2, dtype=call.query.dtype)
    ),
    "block_table": _paged,
    "causal": lambda call: call._replace(causal=True),
    "gqa": _grouped,
    "num_splits": lambda call: call._replace(num_splits=2),
    "seqused_key": lambda call: call._replace(seqused_key=_new(call, 1, dtype=torch.int32)),
    "varlen": _packed,
    "window": lambda call: call._replace(window_left=2),
}


def _assert_as_declared(subject: Subject, call: AttentionCall, declared: bool) -> None:
    __tracebackhide__ = True
    reason: object = subject.kernel_set.supports(call)
    if declared:
        assert reason is None, f"{subject.name} declares what it declines: {reason}"
        return
    assert reason is not None, f"{subject.name} takes a call that asks for what it has not declared"
    assert isinstance(reason, str)
    assert reason.strip(), f"{subject.name} declines a call without a reason"


def _declared_dtypes(subject: Subject) -> frozenset[torch.dtype]:
    return subject.capabilities.dtypes


def _op_of(subject: Subject) -> str:
    cpu = subject.device.type == "cpu"
    return f"_scaled_dot_product_flash_attention{'_for_cpu' if cpu else ''}"


def _declined_call(subject: Subject, asks_for: str) -> Callable[[], Any]:
    """A call of torch's op that asks for what no router or this subject does not serve."""
    head_dim, dtype = usual_form(subject)
    keywords: dict[str, Any] = {}
    if asks_for == "float64":
        if subject.device.type == "cuda" and torch.float64 in _declared_dtypes(subject):
            pytest.skip(f"{subject.name} serves float64")
        dtype = torch.float64
    elif asks_for == "dropout":
        keywords["dropout_p"] = 0.5
    elif asks_for == "mask":
        if subject.device.type == "cuda":
            pytest.skip("the CUDA op takes no mask")
        if "attn_bias" in subject.capabilities.features:
            pytest.skip(f"{subject.name} serves masks")
        keywords["attn_mask"] = torch.zeros(8, 8, dtype=dtype, device=subject.device)
    else:
        undeclared = [dim for dim in _HEAD_DIMS if dim not in subject.capabilities.head_dims]
        if not undeclared:
            pytest.skip(f"{subject.name} serves every head_dim that is tried")
        head_dim = undeclared[0]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 8, head_dim, generator=generator) for _ in range(3))
    tensors = [tensor.to(dtype).to(subject.device) for tensor in (q, k, v)]

    def call() -> Any:
        torch.manual_seed(0)  # of dropout
        with torch.no_grad():
            return getattr(torch.ops.aten, _op_of(subject))(*tensors, **keywords)

    return call


def _outcome(call: Callable[[], Any]) -> Any:
    """Out and lse, or the type and the first line of the error."""
    try:
        return call()[:2]
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return type(error), str(error).partition("\n")[0]


def _same(one: Any, other: Any) -> bool:
    if len(one) != len(other):
        return False
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(one, other, strict=True)
    )
