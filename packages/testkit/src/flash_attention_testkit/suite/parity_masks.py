"""Which keys a row sees, read off exactly: values that are one-hot show up in out or they do not.

All queries are zero, so all weights of a row are equal and none is lost in rounding. Head c of the
value is one-hot for keys ``c * D`` to ``(c + 1) * D - 1``, as many heads as that takes.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attention_testkit.inputs import SdpaInputs
from flash_attention_testkit.reference import AttentionOptions
from flash_attention_testkit.suite._base import ProviderTestsBase
from flash_attention_testkit.suite._subject import Subject, call_of, run_kernels, usual_form

MASKS: dict[str, AttentionOptions] = {
    "full": {},
    "causal": {"causal": True},
    "causal with a window": {"causal": True, "window_left": 30},
    "window": {"window_left": 9, "window_right": 70},
    "window to the left": {"window_left": 0},
    "window to the right": {"window_right": 3},
}

SEQUENCES = {
    "fewer rows": ((40, 130),),
    "more rows": ((130, 40),),
    "one row": ((1, 70),),
    "packed": ((33, 65), (0, 4), (1, 97), (70, 70), (5, 0)),
    "packed, one row each": ((1, 65), (1, 4), (1, 40)),
}
"""Query rows and keys; the first three are dense. For one row kernels often have another way."""

every_mask = pytest.mark.parametrize("mask", MASKS)
every_length = pytest.mark.parametrize("lengths", SEQUENCES)


class MaskTests(ProviderTestsBase):
    """Masks, in the forward and in the backward."""

    @every_length
    @every_mask
    def test_rows_see_exactly_the_keys_that_the_mask_shows(
        self, subject: Subject, mask: str, lengths: str
    ) -> None:
        """Each row has a share of the values that it sees, and none of any other."""
        options = _options(subject, mask, lengths)
        rows, keys = (sum(side) for side in zip(*SEQUENCES[lengths], strict=True))
        inputs = _inputs(subject, lengths, rows, keys, heads_for=keys, options=options)
        _one_hot(inputs.value)
        out = run_kernels(subject, inputs, grads=False).out  # [.., Tq, C, D]
        seen = (out.reshape(rows, -1) != 0)[:, :keys]
        _assert_mask(seen, _expected(lengths, options, subject.device))

    @every_length
    @every_mask
    def test_gradients_of_value_come_from_exactly_the_rows_that_see_it(
        self, subject: Subject, mask: str, lengths: str
    ) -> None:
        """The dv of each key has a share of the gradients of rows that see it, and of no other."""
        if not subject.has_backward:
            pytest.skip(f"{subject.name} declares no backward")
        options = _options(subject, mask, lengths)
        rows, keys = (sum(side) for side in zip(*SEQUENCES[lengths], strict=True))
        inputs = _inputs(subject, lengths, rows, keys, heads_for=rows, options=options)
        _one_hot(inputs.grad_out)
        expected = _expected(lengths, options, subject.device)
        # The forward's results are known: the mean of values that are all zero, log of a count.
        heads = inputs.query.shape[-2]
        lse = expected.sum(-1).float().log().expand(heads, rows).contiguous()
        if inputs.query.dim() == 4:
            lse = lse[None]
        with torch.no_grad():
            _, _, dv = subject.kernel_set.backward(
                call_of(inputs), inputs.grad_out, torch.zeros_like(inputs.query), lse
            )
        seen = (dv.reshape(keys, -1) != 0)[:, :rows].mT
        _assert_mask(seen, expected)


def _options(subject: Subject, mask: str, lengths: str) -> AttentionOptions:
    """The options of a mask; skips what is not declared."""
    options = MASKS[mask]
    window = options.get("window_left") is not None or options.get("window_right") is not None
    asked = {"causal": options.get("causal", False), "window": window}
    asked["varlen"] = _is_packed(lengths)
    missing = [name for name, wanted in asked.items() if wanted]
    missing = sorted(set(missing) - subject.capabilities.features)
    if missing:
        pytest.skip(f"{subject.name} does not declare {', '.join(missing)}")
    return options


def _inputs(
    subject: Subject,
    lengths: str,
    rows: int,
    keys: int,
    *,
    heads_for: int,
    options: AttentionOptions,
) -> SdpaInputs:
    """All zeros but the keys, which queries of zero do not look at."""
    head_dim, dtype = usual_form(subject)
    heads = -(-heads_for // head_dim)
    batch = () if _is_packed(lengths) else (1,)
    kind: dict[str, Any] = {"dtype": dtype, "device": subject.device}
    shapes = [(*batch, length, heads, head_dim) for length in (rows, keys, keys, rows)]
    query, key, value, grad_out = (torch.zeros(shape, **kind) for shape in shapes)
    key.copy_(torch.linspace(-1, 1, key.numel()).view(key.shape))
    if _is_packed(lengths):
        offsets = [
            torch.tensor([0, *accumulate(side)], dtype=torch.int32, device=subject.device)
            for side in zip(*SEQUENCES[lengths], strict=True)
        ]
        options = {**options, "cu_seqlens_query": offsets[0], "cu_seqlens_key": offsets[1]}
    return SdpaInputs(query, key, value, grad_out, options)


def _is_packed(lengths: str) -> bool:
    return len(SEQUENCES[lengths]) > 1


def _one_hot(tensor: Tensor) -> None:
    """Write 1 into column ``i`` of row ``i``, all heads being one row of columns."""
    rows = tensor.flatten(-2).view(-1, tensor.shape[-2] * tensor.shape[-1])
    place = torch.arange(len(rows), device=tensor.device)
    rows[place, place] = 1.0


def _expected(lengths: str, options: AttentionOptions, device: torch.device) -> Tensor:
    """Which keys each row sees, all sequences in one: bool ``[Tq, Tk]``."""
    totals = [sum(side) for side in zip(*SEQUENCES[lengths], strict=True)]
    seen = torch.zeros(totals, dtype=torch.bool)
    right = 0 if options.get("causal") else options.get("window_right")
    left = options.get("window_left")
    row = key = 0
    for queries, keys in SEQUENCES[lengths]:
        diagonal = torch.arange(queries)[:, None] + keys - queries
        place = torch.arange(keys)
        part = seen[row : row + queries, key : key + keys]
        part |= (place >= diagonal - left) if left is not None else True
        part &= (place <= diagonal + right) if right is not None else True
        row, key = row + queries, key + keys
    return seen.to(device)


def _assert_mask(seen: Tensor, expected: Tensor) -> None:
    __tracebackhide__ = True
    wrong = (seen != expected).any(-1).nonzero().flatten().tolist()
    if wrong:
        row = wrong[0]
        extra = (seen[row] & ~expected[row]).nonzero().flatten().tolist()
        missing = (~seen[row] & expected[row]).nonzero().flatten().tolist()
        raise AssertionError(
            f"{len(wrong)} of {len(seen)} rows do not see the keys that they should. Row {row} "
            f"sees {extra or 'no key'} that it should not, and does not see {missing or 'no key'} "
            "that it should (rows and keys of all sequences counted on)"
        )
