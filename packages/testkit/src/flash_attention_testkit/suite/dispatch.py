"""What torch's ops rely on: the form of results, the meaning of arguments, what is declined."""

from __future__ import annotations

from flash_attention_testkit.suite.dispatch_declines import DeclineTests
from flash_attention_testkit.suite.dispatch_extras import ExtraTests
from flash_attention_testkit.suite.dispatch_form import FormTests
from flash_attention_testkit.suite.dispatch_heads_first import HeadsFirstTests
from flash_attention_testkit.suite.dispatch_meaning import MeaningTests


class DispatchTests(FormTests, MeaningTests, HeadsFirstTests, ExtraTests, DeclineTests):
    """Every op by which attention comes, in every schema that this torch has."""
