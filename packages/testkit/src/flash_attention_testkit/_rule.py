"""The constants of the parity rule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParityRule:
    """How much worse than the faithful reference a kernel may be.

    A provider may ask for larger factors where its precision is lower, never for an absolute
    tolerance. What correct implementations need of the defaults is recorded in the testkit's
    README.

    Attributes:
        k_max: Factor of the largest error.
        k_rms: Factor of the root mean square error.
        k_local: Factor of the root mean square error of every block of 32 rows of every head. It
            is wider than ``k_rms`` because few rows average less; what it is to find, a block that
            is missing or wrong, is off by far more.
        lse_tolerance: Error of lse, absolute up to 1 and relative beyond. Sums in fp32 and
            approximate exp2 and log2 stay below the default. To it come two units in the last
            place of the largest score that the inputs' norms allow: a score near zero can be the
            sum of large products.
    """

    k_max: float = 2.0
    k_rms: float = 1.5
    k_local: float = 3.0
    lse_tolerance: float = 2e-5


DEFAULT_RULE = ParityRule()
