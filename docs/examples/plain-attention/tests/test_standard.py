"""The standard tests of every provider."""

import pytest

from flash_attention_testkit import ProviderTests


class TestPlain(ProviderTests):
    """Of `plain`."""

    @pytest.fixture
    def provider(self) -> str:
        """What users activate."""
        return "plain"
