"""Kernel sets that are right but for their shortcut for SDPA's layout."""

from __future__ import annotations

import torch
from plain_kernel_set import PlainHeadsFirst
from torch import Tensor

from broken.promises import SCALE, TORCH
from broken.table import found_by
from flash_attention_registry.sdpa import AttentionCall

BITS = "test_heads_first_gives_the_bits_of_forward"
DTYPES = "test_heads_first_agrees_on_dtypes"
SERVED = (
    BITS,
    DTYPES,
    "test_heads_first_agrees_on_head_dims",
    "test_heads_first_lse_may_have_a_last_dimension",
)


@found_by(*SERVED, also=TORCH)
class ShortcutDoublesOut(PlainHeadsFirst):
    def shortcut_runs(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        out, lse = super().shortcut_runs(call)
        return out.mul_(2), lse


@found_by(*SERVED, also=TORCH)
class ShortcutFlipsHeads(PlainHeadsFirst):
    def shortcut_runs(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        out, lse = super().shortcut_runs(call)
        return out.copy_(out.flip(2)), lse.flip(1)


@found_by(*SERVED)
class ShortcutIsOneUnitOff(PlainHeadsFirst):
    """In the last place of the first element."""

    def shortcut_runs(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        out, lse = super().shortcut_runs(call)
        out[0, 0, 0, 0] *= 1 + torch.finfo(out.dtype).eps
        return out, lse


@found_by(*SERVED)
class ShortcutScalesByOnePercentMore(PlainHeadsFirst):
    def shortcut_runs(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        return super().shortcut_runs(call._replace(scale=1.01 * call.scale))


@found_by(*SERVED, also=(*TORCH, "test_missing_arguments_mean_their_defaults", SCALE))
class ShortcutWritesNoLse(PlainHeadsFirst):
    def shortcut_runs(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        out, lse = super().shortcut_runs(call)
        return out, torch.full_like(lse, torch.nan)


@found_by(f"{BITS}[*-masked-rows]", also=(f"{BITS}[*-1x150x97-*-causal-*]",))
class ShortcutHasItsOwnLseOfEmptyRows(PlainHeadsFirst):
    def shortcut_runs(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        return super().shortcut_runs(call._replace(lse_of_empty_rows=-torch.inf))


@found_by(f"{DTYPES}[float64]")
class ShortcutServesADtypeThatIsDeclined(PlainHeadsFirst):
    def shortcut_declines(self, call: AttentionCall) -> str | None:
        return super().shortcut_declines(call._replace(query=call.query.float()))


@found_by(f"{BITS}[*-4x5x9-*]")
class ShortcutDeclinesLargeBatches(PlainHeadsFirst):
    def shortcut_declines(self, call: AttentionCall) -> str | None:
        large = call.query.shape[0] > 3
        return "batch is too large" if large else super().shortcut_declines(call)
