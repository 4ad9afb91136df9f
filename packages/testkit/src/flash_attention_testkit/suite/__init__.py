"""The standard tests of a provider: one class to subclass."""

from __future__ import annotations

from flash_attention_testkit.suite._base import ProviderTestsBase

__all__ = ["ProviderTests"]


class ProviderTests(ProviderTestsBase):
    """The standard tests of a provider."""
