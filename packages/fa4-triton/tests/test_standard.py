"""The standard tests of the testkit: in Triton's interpreter, and on a GPU with `pytest -m gpu`.

Each device in a process of its own; the interpreter is slow, so it does not take all parameters
unless it is asked to: `pytest packages/fa4-triton/tests/test_standard.py --flash-attention-grid
quick`. See `conftest.py`.
"""

from __future__ import annotations

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
