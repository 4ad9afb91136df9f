"""What real programs do: memory, numbers, streams and graphs, autograd and compilers."""

from __future__ import annotations

from flash_attention_testkit.suite.robustness_autograd import AutogradTests
from flash_attention_testkit.suite.robustness_concurrency import ConcurrencyTests
from flash_attention_testkit.suite.robustness_memory import MemoryTests
from flash_attention_testkit.suite.robustness_numbers import NumberTests


class RobustnessTests(AutogradTests, ConcurrencyTests, MemoryTests, NumberTests):
    """The same results in circumstances that are not those of a parity test.

    Each test compares the implementation with itself where nothing is special, so that it fails
    for what its name says and not because results are wrong everywhere.
    """
