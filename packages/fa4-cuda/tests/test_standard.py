"""The standard tests of the testkit on a Hopper GPU, with `pytest -m gpu`."""

from __future__ import annotations

import pytest

from flash_attention_testkit import ProviderTests

pytestmark = pytest.mark.gpu


@pytest.fixture
def provider() -> str:
    """What users activate."""
    return "fa4-cuda"


class TestOnGpu(ProviderTests):
    """All of them; xfails is empty."""
