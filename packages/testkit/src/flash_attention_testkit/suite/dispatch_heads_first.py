"""The shortcut that a kernel set may have for SDPA's layout gives what the kernel set gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_attention_registry.sdpa import AttentionCall
from flash_attention_registry.sdpa.serving import ActiveKernels, run_heads_first
from flash_attention_testkit._compare import place_of
from flash_attention_testkit.cases import SdpaCase
from flash_attention_testkit.suite._base import ProviderTestsBase
from flash_attention_testkit.suite._findings import inputs_of
from flash_attention_testkit.suite._subject import Subject, call_of, usual_form

NAN = float("nan")

LSE_OF_EMPTY_ROWS = 1.5
"""What no kernel writes by itself."""


class HeadsFirstTests(ProviderTestsBase):
    """``forward_heads_first`` serves what ``supports`` and ``forward`` would, with the same bits.

    SDPA runs it in their place, where the other tests call these. It is asked as a router asks it,
    and they on transposed views of the same tensors.
    """

    @pytest.fixture
    def shortcut(self, subject: Subject) -> Callable[..., str | None]:
        """What a router takes; skipped where it finds none."""
        found = ActiveKernels(subject.kernel_set, strict=False).forward_heads_first
        if found is None:
            pytest.skip(f"{subject.name} has no forward_heads_first of its own")
        return found

    def test_heads_first_gives_the_bits_of_forward(
        self, subject: Subject, case: SdpaCase, shortcut: Callable[..., str | None]
    ) -> None:
        """Out and lse, or a reason to decline, of every dense case without a window."""
        if case.features & {"varlen", "window"}:
            pytest.skip("a shortcut is for dense calls without a window")
        _assert_agree(subject, shortcut, call_of(inputs_of(subject, case)))

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_heads_first_agrees_on_dtypes(
        self, subject: Subject, dtype: str, shortcut: Callable[..., str | None]
    ) -> None:
        """A dtype is served or declined as by ``supports``."""
        head_dim, _ = usual_form(subject)
        _assert_agree(subject, shortcut, _call(subject, head_dim, getattr(torch, dtype)))

    @pytest.mark.parametrize("head_dim", [1, 36, 64, 128, 264])
    def test_heads_first_agrees_on_head_dims(
        self, subject: Subject, head_dim: int, shortcut: Callable[..., str | None]
    ) -> None:
        """So is a head dimension."""
        _, dtype = usual_form(subject)
        _assert_agree(subject, shortcut, _call(subject, head_dim, dtype))

    def test_heads_first_lse_may_have_a_last_dimension(
        self, subject: Subject, shortcut: Callable[..., str | None]
    ) -> None:
        """``[B, H, S, 1]``, as some ops return it."""
        _assert_agree(subject, shortcut, _call(subject, *usual_form(subject)), lse_column=True)


def _call(subject: Subject, head_dim: int, dtype: torch.dtype) -> AttentionCall:
    """A plain call of two sequences, two heads and ``[B, H, S, D]`` in memory."""
    generator = torch.Generator().manual_seed(subject.seed)
    query, key, value = (
        torch.randn(2, 2, rows, head_dim, generator=generator).to(subject.device, dtype)
        for rows in (5, 7, 7)
    )
    views = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return AttentionCall(*views, head_dim**-0.5, False)


def _assert_agree(
    subject: Subject,
    shortcut: Callable[..., str | None],
    call: AttentionCall,
    *,
    lse_column: bool = False,
) -> None:
    """Insist that the shortcut does with a dense call what the kernel set does.

    Args:
        subject: Whose ``supports`` and ``forward`` are called.
        shortcut: Its ``forward_heads_first``.
        call: Tensors ``[B, S, H, D]``.
        lse_column: Whether the shortcut is to write ``[B, H, S, 1]``.
    """
    __tracebackhide__ = True
    query, key, value = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    target, out = torch.full_like(query, NAN), torch.full_like(query, NAN)
    call = call._replace(out=target.transpose(1, 2), lse_of_empty_rows=LSE_OF_EMPTY_ROWS)
    rows = (*query.shape[:3], 1) if lse_column else query.shape[:3]
    lse = torch.full(rows, NAN, device=query.device)
    with torch.no_grad():
        expected_reason = subject.kernel_set.supports(call)
        reason = run_heads_first(
            *(shortcut, query, key, value, out, lse, call.scale, call.causal),
            call.lse_of_empty_rows,
        )
        if expected_reason is not None:
            assert reason is not None, (
                f"{subject.name}: forward_heads_first serves what supports declines: "
                f"{expected_reason}"
            )
        if reason is not None:
            assert isinstance(reason, str), (
                f"{subject.name}: forward_heads_first returns None or a reason to decline, and "
                f"writes out and lse; it has returned a {type(reason).__name__}"
            )
            assert reason.strip(), f"{subject.name}: forward_heads_first declines without a reason"
            assert expected_reason is not None, (
                f"{subject.name}: forward_heads_first declines what supports serves: {reason}"
            )
            return
        expected_out, expected_lse = subject.kernel_set.forward(call)
    _assert_same_bits("out", out, expected_out.transpose(1, 2))
    _assert_same_bits("lse", lse.view(expected_lse.shape), expected_lse)


def _assert_same_bits(name: str, found: Tensor, expected: Tensor) -> None:
    __tracebackhide__ = True
    differs = (_bytes(found) != _bytes(expected)).any(-1)
    if differs.any():
        place = place_of(int(differs.int().argmax()), differs.shape)
        raise AssertionError(
            f"{name} of forward_heads_first differs from that of forward in {int(differs.sum())} "
            f"of {differs.numel()} elements, such as {name}{list(place)}, which is "
            f"{float(found[place]):.6g} and should be {float(expected[place]):.6g}"
        )


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of each element, in a last dimension of their own."""
    return tensor.contiguous().unsqueeze(-1).view(torch.uint8)
