"""Testkit for providers of the flash-attention registry.

The names below are imported when they are first used, because most of them need torch and every
pytest run in this environment imports this package for its plugin.

- ``reference_sdpa``: attention, log-sum-exp and gradients in float64.
- ``faithful_sdpa``: the same with a kernel's roundings.
- ``assert_sdpa_parity``, ``measure_sdpa_parity``: compare an implementation with both.
- ``SdpaResult``, ``AttentionOptions``, ``ParityRule``, ``ParityReport``, ``TensorParity``: what
  they take and return.
- ``SdpaCase``, ``case_grid``, ``legal_cases``: attention problems, one by one, as named sets and as
  a hypothesis strategy.
- ``make_inputs``, ``SdpaInputs``: their tensors.
- ``ProviderTests``: the standard tests of a provider, to be subclassed once.
- ``FakeProvider``, ``FakeHandle``, ``FakeEntryPoints``: providers that install nothing; these need
  no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash_attention_testkit.cases import SdpaCase
    from flash_attention_testkit.fake_entry_points import FakeEntryPoints
    from flash_attention_testkit.fakes import FakeHandle, FakeProvider
    from flash_attention_testkit.grids import case_grid
    from flash_attention_testkit.inputs import SdpaInputs, make_inputs
    from flash_attention_testkit.parity import (
        ParityReport,
        ParityRule,
        TensorParity,
        assert_sdpa_parity,
        measure_sdpa_parity,
    )
    from flash_attention_testkit.reference import (
        AttentionOptions,
        SdpaResult,
        faithful_sdpa,
        reference_sdpa,
    )
    from flash_attention_testkit.strategies import legal_cases
    from flash_attention_testkit.suite import ProviderTests

    __version__: str

__all__ = [
    "AttentionOptions",
    "FakeEntryPoints",
    "FakeHandle",
    "FakeProvider",
    "ParityReport",
    "ParityRule",
    "ProviderTests",
    "SdpaCase",
    "SdpaInputs",
    "SdpaResult",
    "TensorParity",
    "assert_sdpa_parity",
    "case_grid",
    "faithful_sdpa",
    "legal_cases",
    "make_inputs",
    "measure_sdpa_parity",
    "reference_sdpa",
]

_MODULES = {
    "FakeEntryPoints": "fake_entry_points",
    "FakeHandle": "fakes",
    "FakeProvider": "fakes",
    "ProviderTests": "suite",
    "SdpaCase": "cases",
    "SdpaInputs": "inputs",
    "case_grid": "grids",
    "legal_cases": "strategies",
    "make_inputs": "inputs",
    "AttentionOptions": "reference",
    "SdpaResult": "reference",
    "faithful_sdpa": "reference",
    "reference_sdpa": "reference",
    "ParityReport": "parity",
    "ParityRule": "parity",
    "TensorParity": "parity",
    "assert_sdpa_parity": "parity",
    "measure_sdpa_parity": "parity",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for; look the version up likewise."""
    if name == "__version__":
        from importlib.metadata import version  # slow to import, and seldom asked for

        return version("flash-attention-testkit")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"{__name__}.{name} needs torch, which is not installed; "
            'install it with: pip install "flash-attention-testkit[torch]"',
            name="torch",
        ) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The lazy names too."""
    return sorted({*globals(), *__all__, "__version__"})
