"""What the registry relies on: names, activation, and the way back to stock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attention_registry import FlashAttentionHandle, Registry
from flash_attention_registry.registration import Registration
from flash_attention_registry.sdpa import (
    AttentionCall,
    Capabilities,
    Determinism,
    Feature,
    dispatch_counts,
    install,
    installed_kernel_sets,
)
from flash_attention_testkit.fakes import FakeProvider
from flash_attention_testkit.suite._subject import Subject, assert_serves, plain_inputs
from flash_attention_testkit.suite.contract_distribution import DistributionTests


class ContractTests(DistributionTests):
    """Registration, activation, removal, what is declared; and what the distribution says."""

    @pytest.fixture
    def handle(self, subject: Subject, registry: Registry) -> Iterator[FlashAttentionHandle]:
        """What ``register_fn`` returns, called past the registry with nothing active."""
        registry.restore()
        registration = registry.registration(subject.name)
        assert registration is not None
        handle = registration.register_fn()
        assert handle is not None, f"the register_fn of {subject.name} returns no handle"
        yield handle
        handle.remove()

    def test_name_is_registered(self, registry: Registry, provider: str) -> None:
        """The registry lists an implementation of this very name, and its provider registers it."""
        found = _registration(registry, provider)
        why = registry.discovery.failure(provider) or "nobody registers or offers it"
        assert found is not None, f"{provider} is not registered: {why}"
        assert provider in registry.names()

    def test_availability_check_answers(self, registry: Registry, provider: str) -> None:
        """``availability`` returns None or a reason, and does not raise."""
        found = _registration(registry, provider)
        reason = None if found is None else found.why_unavailable()
        assert reason is None or not reason.startswith("availability check "), reason

    def test_recommendation_check_answers(self, subject: Subject, registry: Registry) -> None:
        """``recommended``, asked where the implementation is available, does likewise."""
        registration = registry.registration(subject.name)
        assert registration is not None
        reason = registration.why_not_recommended()
        assert reason is None or not reason.startswith("recommendation check "), reason

    def test_activation_makes_it_current(self, subject: Subject, registry: Registry) -> None:
        """The registry names it as active."""
        assert registry.current() == subject.name

    def test_activation_serves_torchs_attention(self, subject: Subject) -> None:
        """Calls through torch reach its kernels."""
        assert_serves(subject)

    def test_restore_leaves_no_kernels(self, subject: Subject, registry: Registry) -> None:
        """Once stock is restored, no kernel set serves any device type."""
        registry.restore()
        left = ", ".join(installed_kernel_sets())
        assert not left, f"the handle of {subject.name} has left kernels installed for {left}"

    def test_restore_gives_stocks_bits(self, subject: Subject, registry: Registry) -> None:
        """Attention gives what it gave before the activation, bit for bit, and counts no call."""
        inputs = plain_inputs(subject)
        q, k, v = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))
        registry.restore()
        before = F.scaled_dot_product_attention(q, k, v)
        registry.activate(subject.name)
        F.scaled_dot_product_attention(q, k, v)
        registry.restore()
        counts = dispatch_counts()
        after = F.scaled_dot_product_attention(q, k, v)
        assert torch.equal(after, before)
        assert dispatch_counts().served == counts.served

    def test_activation_after_restore_serves_again(
        self, subject: Subject, registry: Registry
    ) -> None:
        """``register_fn`` may be called again."""
        registry.restore()
        registry.activate(subject.name)
        assert_serves(subject)

    def test_failed_activation_of_another_keeps_it_active(
        self, subject: Subject, registry: Registry
    ) -> None:
        """It is put back where the implementation that was to replace it fails."""
        FakeProvider("failing", fails={"register_fn": OSError("no kernels")}).register(registry)
        with pytest.raises(OSError, match="no kernels"):
            registry.activate("failing")
        assert registry.current() == subject.name
        assert_serves(subject)

    def test_handle_can_be_removed_twice(self, handle: FlashAttentionHandle) -> None:
        """A second ``remove()`` is harmless."""
        handle.remove()
        handle.remove()

    def test_second_removal_leaves_others_alone(
        self, subject: Subject, handle: FlashAttentionHandle
    ) -> None:
        """A handle that was removed does not remove what somebody has installed since."""
        handle.remove()
        device_type = subject.device.type
        bystander = _Bystander(device_type)
        other = install(bystander, device_type)
        try:
            handle.remove()
            assert installed_kernel_sets().get(device_type) is bystander
        finally:
            other.remove()

    def test_kernel_set_has_a_name(self, subject: Subject) -> None:
        """Warnings and errors name it."""
        name: object = subject.kernel_set.name
        assert isinstance(name, str)
        assert name.strip()

    def test_capabilities_are_well_formed(self, subject: Subject) -> None:
        """What is declared is of the types and values that ``Capabilities`` documents."""
        declared = subject.capabilities
        assert isinstance(declared, Capabilities)
        assert declared.dtypes
        assert all(isinstance(dtype, torch.dtype) for dtype in declared.dtypes)
        assert len(declared.head_dims) > 0
        assert all(isinstance(dim, int) and dim > 0 for dim in declared.head_dims)
        assert declared.features <= set(get_args(Feature))
        assert declared.deterministic in get_args(Determinism)


def _registration(registry: Registry, provider: str) -> Registration | None:
    """What the provider has told the registry, once it was loaded."""
    registry.discovery.load(provider, lambda name: registry.registration(name) is not None)
    return registry.registration(provider)


class _Bystander:
    """A kernel set of somebody else, which serves nothing."""

    name = "bystander"

    def __init__(self, device_type: str) -> None:
        self.capabilities = Capabilities(
            device_types=frozenset({device_type}),
            dtypes=frozenset(),
            head_dims=(),
            features=frozenset(),
            deterministic="never",
        )

    def supports(self, call: AttentionCall) -> str | None:
        return "it serves nothing"

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def backward(
        self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError
