"""The standard tests of the testkit: on a Hopper GPU with `pytest -m gpu`, and without one.

Without one, a CPU stands in for it (`cpu_device.cpp`): of the kernels nothing is tested then, but
all that leads to them, in both directions.
"""

from __future__ import annotations

from typing import Any

import pytest

from fa4_cuda import kernel_set
from flash_attention_registry import register_flash_attention_impl
from flash_attention_registry.sdpa import install
from flash_attention_testkit import ProviderTests

ON_CPU = "fa4-cuda-on-cpu"


@pytest.mark.gpu
class TestOnGpu(ProviderTests):
    """On a Hopper GPU."""

    @pytest.fixture
    def provider(self) -> str:
        """What users activate."""
        return "fa4-cuda"


class TestOnCpu(ProviderTests):
    """With a CPU in the GPU's place."""

    @pytest.fixture
    def provider(self, anywhere: Any, monkeypatch: pytest.MonkeyPatch) -> str:
        """The same kernel set, installed for the ops of a CPU."""
        monkeypatch.setattr(kernel_set.CudaKernels, "capabilities", kernel_set.CAPABILITIES)
        register_flash_attention_impl(ON_CPU, register_fn=lambda: install(anywhere, "cpu"))
        return ON_CPU
