"""The standard tests without a file: of an implementation that is named on the command line.

    pytest --pyargs flash_attention_testkit.standalone --flash-attention-impl NAME

An implementation that is asked for by name and cannot run on this machine is a failure here, with
the reason, and not skipped.
"""

from __future__ import annotations

from flash_attention_testkit.suite import ProviderTests


class TestProvider(ProviderTests):
    """The standard tests of ``--flash-attention-impl``."""
