"""The standard tests of the testkit: in Triton's interpreter, and on a GPU with `pytest -m gpu`.

Each device in a process of its own; see `conftest.py`.
"""

from __future__ import annotations

import pytest

from flash_attention_testkit import ProviderTests


@pytest.fixture
def provider() -> str:
    """What users activate."""
    return "fa4-triton"


class TestInterpreted(ProviderTests):
    """On the CPU."""


@pytest.mark.gpu
class TestOnGpu(ProviderTests):
    """On a CUDA device."""
