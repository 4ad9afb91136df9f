"""The standard tests of the testkit: in Triton's interpreter, and on a GPU with `pytest -m gpu`.

Each device in a process of its own; the interpreter is slow, so it does not take all parameters
unless it is asked to: `pytest packages/fa4-triton/tests/test_standard.py --flash-attention-grid
quick`. See `conftest.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flash_attention_testkit import ProviderTests


@pytest.fixture
def provider() -> str:
    """What users activate."""
    return "fa4-triton"


class TestInterpreted(ProviderTests):
    """On the CPU; a third of the parameters."""


@pytest.mark.gpu
class TestOnGpu(ProviderTests):
    """On a CUDA device."""


@pytest.mark.gpu
class TestPortableOnHopper(ProviderTests):
    """On a Hopper GPU, with the kernels that other GPUs get."""

    @pytest.fixture(autouse=True, scope="class")
    def portable(self) -> Iterator[None]:
        """No version of Triton is tested with the Hopper kernels."""
        from fa4_triton import hopper, kernel_set

        if torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("other GPUs have no other kernels")

        def forget() -> None:
            hopper.choose.cache_clear()
            kernel_set._hopper_forward_of.cache_clear()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hopper, "TESTED_TRITON", ("none",))
            forget()
            yield
        forget()
