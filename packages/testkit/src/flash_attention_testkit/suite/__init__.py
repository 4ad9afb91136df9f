"""The standard tests of a provider: one class to subclass."""

from __future__ import annotations

from flash_attention_testkit.suite._base import ProviderTestsBase
from flash_attention_testkit.suite.contract import ContractTests

__all__ = ["ProviderTests"]


class ProviderTests(ContractTests, ProviderTestsBase):
    """The standard tests of a provider."""
