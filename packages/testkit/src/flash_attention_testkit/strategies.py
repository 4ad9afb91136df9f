"""Cases that nobody thought of: a hypothesis strategy over everything that is declared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from flash_attention_testkit.cases import Family, Layout, SdpaCase
from flash_attention_testkit.grids import USUAL_CAPABILITIES

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

    from flash_attention_registry.sdpa import Capabilities


def legal_cases(
    capabilities: Capabilities | None = None, *, longest: int = 200, most_heads: int = 4
) -> SearchStrategy[SdpaCase]:
    """A strategy of the cases that a kernel set has declared to serve; it shrinks to small ones.

    Args:
        capabilities: What the kernel set declares. None for what flash-attention kernels usually
            serve, as in ``case_grid``.
        longest: The largest number of rows or keys of a sequence.
        most_heads: The largest number of query heads.

    Raises:
        ModuleNotFoundError: hypothesis is not installed.
    """
    try:
        from hypothesis import strategies as st
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "flash_attention_testkit.legal_cases needs hypothesis, which is not installed; "
            "install it with: pip install hypothesis",
            name="hypothesis",
        ) from error
    declared = USUAL_CAPABILITIES if capabilities is None else capabilities
    features = declared.features
    dtypes = sorted(declared.dtypes, key=str)
    head_dims = sorted(declared.head_dims)

    def asked(draw: DrawFn, feature: Any) -> bool:
        return feature in features and draw(st.booleans())

    @st.composite
    def cases(draw: DrawFn) -> SdpaCase:
        kv_heads = draw(st.integers(1, most_heads))
        group = draw(st.integers(1, most_heads // kv_heads)) if asked(draw, "gqa") else 1
        measures: dict[str, Any] = {
            "heads": kv_heads * group,
            "kv_heads": kv_heads,
            "head_dim": draw(st.sampled_from(head_dims)),
            "dtype": draw(st.sampled_from(dtypes)),
            "causal": asked(draw, "causal"),
            "scale": draw(st.none() | st.sampled_from([0.0, -0.2, 0.05, 0.5])),
        }
        if asked(draw, "window"):
            sizes = st.integers(0, longest)
            measures["window_left"] = draw(st.none() | sizes)
            if not measures["causal"]:
                measures["window_right"] = draw(st.none() | sizes.filter(bool))
        measures |= _packed(draw) if asked(draw, "varlen") else _dense(draw)
        families = list(get_args(Family))
        if not SdpaCase(**measures).has_masked_rows:
            families.remove("masked-rows")
        return SdpaCase(**measures, family=draw(st.sampled_from(families)))

    def _dense(draw: DrawFn) -> dict[str, Any]:
        layout = draw(st.sampled_from(get_args(Layout)))
        rows = draw(st.integers(1, longest))
        keys = rows if layout == "packed QKV slice" else draw(st.integers(1, longest))
        batch = draw(st.integers(1, 3))
        return {"batch": batch, "seq_q": rows, "seq_k": keys, "layout": layout}

    def _packed(draw: DrawFn) -> dict[str, Any]:
        layout = draw(st.sampled_from(["BSHD", "packed QKV slice"]))
        length = st.integers(0, longest) | st.sampled_from([0, 1])  # where kernels go wrong
        pair = (
            length.map(lambda rows: (rows, rows)) if "QKV" in layout else st.tuples(length, length)
        )
        lengths = tuple(draw(st.lists(pair, min_size=1, max_size=5).filter(_has_rows_and_keys)))
        longest_q, longest_k = (max(side) for side in zip(*lengths, strict=True))
        return {
            "batch": len(lengths),
            "seq_q": longest_q,
            "seq_k": longest_k,
            "lengths": lengths,
            "layout": layout,
        }

    return cases()


def _has_rows_and_keys(lengths: list[tuple[int, int]]) -> bool:
    """Whether neither side is empty as a whole, which torch's ops take no part in."""
    return all(any(side) for side in zip(*lengths, strict=True))
