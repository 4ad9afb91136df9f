"""The standard tests of the testkit: in Triton's interpreter, and on a GPU with `pytest -m gpu`.

Each device in a process of its own; the interpreter is slow, so it does not take all parameters
unless it is asked to: `pytest packages/fa4-triton/tests/test_standard.py --flash-attention-grid
quick`. See `conftest.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

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


class _Asked(ProviderTests):
    """On a Hopper GPU, which has two kinds of kernels: with one of them for all that it serves."""

    asked: str

    @pytest.fixture(autouse=True, scope="class")
    def kind(self, asking_for: Callable[[str], AbstractContextManager[None]]) -> Iterator[None]:
        """As in a process whose environment asks for it, and in those that tests start."""
        with asking_for(self.asked):
            yield


@pytest.mark.gpu
class TestPortableOnHopper(_Asked):
    """With the kernels that other GPUs get."""

    asked = "portable"


@pytest.mark.gpu
class TestHopper(_Asked):
    """With the Hopper kernels also where the portable ones are faster."""

    asked = "hopper"
