"""What few kernel sets declare: biases, slopes, keys in use, pages, splits.

The kernel set is called directly. Where queries are zero, all scores are, so that a bias can be
read off lse, and which keys a row sees off values that are one-hot.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flash_attention_registry.sdpa import AttentionCall
from flash_attention_testkit.cases import SdpaCase
from flash_attention_testkit.inputs import SdpaInputs, make_inputs
from flash_attention_testkit.suite._base import ProviderTestsBase
from flash_attention_testkit.suite._subject import Subject, call_of, usual_form
from flash_attention_testkit.suite.dispatch_base import close, problem, skip_unless_declared

PAGE = 256
"""Rows of a page; FlashAttention-2 takes multiples of this."""


class ExtraTests(ProviderTestsBase):
    """Each of these features means the same to all who declare it."""

    @pytest.mark.parametrize("of", ["all", "each-head"])
    def test_attn_bias_is_added_to_scaled_scores(self, subject: Subject, of: str) -> None:
        """It is not scaled itself, and may be one for all sequences and heads."""
        skip_unless_declared(subject, "attn_bias")
        call = call_of(_blank(subject))._replace(scale=0.25)
        bias = torch.linspace(-2, 2, _scores_shape(call).numel()).view(_scores_shape(call))
        bias = (bias[:1, :1] if of == "all" else bias).to(call.query)
        _, lse = _forward(subject, call._replace(attn_bias=bias))
        close(lse, bias.double().logsumexp(-1).expand(lse.shape), "lse of a bias alone")

    def test_attn_bias_of_minus_infinity_hides_keys(self, subject: Subject) -> None:
        """Each row sees the keys that its bias leaves, and no other."""
        skip_unless_declared(subject, "attn_bias")
        call = call_of(_blank(subject))
        shown = _pattern(call)
        out, _ = _forward(subject, call._replace(attn_bias=_hiding(call, shown)))
        _assert_shown(out, shown[..., None, :].expand(*out.shape[:-1], -1))

    def test_attn_bias_of_minus_infinity_hides_keys_from_gradients(self, subject: Subject) -> None:
        """The value of a key that no row sees has a gradient of zero."""
        skip_unless_declared(subject, "attn_bias", "backward")
        inputs = _blank(subject)
        call = call_of(inputs)
        shown = torch.arange(_scores_shape(call)[-1], device=subject.device) % 3 != 1
        hiding = _hiding(call, shown.expand(_scores_shape(call)[-2:]))
        biased = call._replace(attn_bias=hiding)
        out, lse = _forward(subject, biased)
        with torch.no_grad():
            _, _, dv = subject.kernel_set.backward(biased, inputs.grad_out, out, lse)
        found = dv.ne(0).any(-1)  # [B, Sk, Hkv]
        assert torch.equal(found, shown[:, None].expand_as(found))

    @pytest.mark.parametrize("of", ["each-head", "each-sequence"])
    def test_alibi_slopes_count_from_the_diagonal(self, subject: Subject, of: str) -> None:
        """The score of a key falls by the slope with each key between it and the diagonal.

        Of key ``j`` and row ``i`` by ``slope * abs(i + Sk - Sq - j)`` (arXiv 2108.12409).
        """
        skip_unless_declared(subject, "alibi_slopes")
        call = call_of(_blank(subject))
        batch, heads, rows, keys = _scores_shape(call)
        slopes = torch.linspace(0.25, 1.5, batch * heads, device=subject.device)
        slopes = slopes.view(batch, heads)[: 1 if of == "each-head" else batch]
        given = slopes[0] if of == "each-head" else slopes
        _, lse = _forward(subject, call._replace(alibi_slopes=given.contiguous()))
        diagonal = torch.arange(rows, device=subject.device)[:, None] + keys - rows
        distance = (diagonal - torch.arange(keys, device=subject.device)).abs()
        bias = -slopes.double()[:, :, None, None] * distance
        close(lse, bias.logsumexp(-1).expand(lse.shape), "lse of slopes alone")

    def test_seqused_key_hides_the_keys_behind(self, subject: Subject) -> None:
        """Of each sequence the first so many keys are seen."""
        skip_unless_declared(subject, "seqused_key")
        call = call_of(_blank(subject))
        used = torch.tensor([3, 7], dtype=torch.int32, device=subject.device)
        out, _ = _forward(subject, call._replace(seqused_key=used))
        shown = torch.arange(call.key.shape[1], device=subject.device) < used[:, None]
        _assert_shown(out, shown[:, None, None, :].expand(*out.shape[:-1], -1))

    def test_num_splits_changes_no_result(self, subject: Subject) -> None:
        """It is how a kernel divides its work."""
        skip_unless_declared(subject, "num_splits")
        call = call_of(problem(subject, batch=2))
        for one, other in zip(
            _forward(subject, call._replace(num_splits=3)), _forward(subject, call), strict=True
        ):
            close(one, other, "in three splits")

    def test_block_table_says_where_the_keys_are(self, subject: Subject) -> None:
        """Keys and values in pages are the same keys and values."""
        skip_unless_declared(subject, "block_table", "varlen")
        keys = PAGE + 44
        case = SdpaCase(1, 2, 2, 5, keys, *usual_form(subject), lengths=((5, keys),))
        plain = make_inputs(case, subject.seed, subject.device)
        call = call_of(plain)
        order = torch.tensor([[2, 0]], dtype=torch.int32, device=subject.device)
        paged = call._replace(
            key=_in_pages(plain.key, order), value=_in_pages(plain.value, order), block_table=order
        )
        reason = subject.kernel_set.supports(paged)
        if reason is not None:
            pytest.skip(f"{subject.name} declines pages of {PAGE} rows: {reason}")
        for one, other in zip(_forward(subject, paged), _forward(subject, call), strict=True):
            close(one, other, "in pages")


def _blank(subject: Subject) -> SdpaInputs:
    """A dense batch of two without scores; values are one-hot."""
    inputs = problem(subject, batch=2, family="one-hot-values")
    return replace(inputs, query=torch.zeros_like(inputs.query))


def _forward(subject: Subject, call: AttentionCall) -> tuple[Tensor, Tensor]:
    call = call._replace(out=torch.full_like(call.query, math.nan))
    with torch.no_grad():
        return subject.kernel_set.forward(call)


def _scores_shape(call: AttentionCall) -> torch.Size:
    """``[B, Hq, Sq, Sk]``."""
    batch, rows, heads, _ = call.query.shape
    return torch.Size((batch, heads, rows, call.key.shape[1]))


def _pattern(call: AttentionCall) -> Tensor:
    """Some keys for each row: bool ``[Sq, Sk]``."""
    rows, keys = _scores_shape(call)[-2:]
    place = torch.arange(rows * keys, device=call.query.device).view(rows, keys)
    return place % 3 != 1


def _hiding(call: AttentionCall, shown: Tensor) -> Tensor:
    """A bias ``[1, 1, Sq, Sk]`` that leaves these keys."""
    zeros = torch.zeros(shown.shape, dtype=call.query.dtype, device=call.query.device)
    return zeros.masked_fill(~shown, -math.inf)[None, None]


def _assert_shown(out: Tensor, shown: Tensor) -> None:
    """Insist that out ``[B, Sq, Hq, D]`` has a share of these values: bool ``[B, Sq, Hq, Sk]``."""
    __tracebackhide__ = True
    wrong = ((out[..., : shown.shape[-1]] > 0) != shown).nonzero().tolist()
    if wrong:
        sequence, row, head, key = wrong[0]
        sees = "does not see" if shown[sequence, row, head, key] else "sees"
        raise AssertionError(f"row {row} of head {head} of sequence {sequence} {sees} key {key}")


def _in_pages(tensor: Tensor, order: Tensor) -> Tensor:
    """``[T, H, D]`` of one sequence in pages ``[blocks, rows, H, D]``, of which some are NaN."""
    pages = tensor.new_full((int(order.max()) + 1, PAGE, *tensor.shape[1:]), math.nan)
    for number, page in enumerate(order[0].tolist()):
        part = tensor[number * PAGE : (number + 1) * PAGE]
        pages[page, : len(part)] = part
    return pages
