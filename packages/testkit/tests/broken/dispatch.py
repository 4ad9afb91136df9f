"""Kernel sets that take a call for another one than it is, or give results another form."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from plain_kernel_set import PlainKernelSet
from standard_run import Stage, offer
from torch import Tensor

from broken.promises import (
    DK,
    DV,
    EVERYTHING,
    FORWARD,
    MASKS,
    NEGATIVE_SCALE,
    SCALE,
    SCALE_IS_A_FACTOR,
    SCALE_OF_BACKWARD,
    TORCH,
    WINDOWS,
    ZERO_SCALE,
    of,
)
from broken.table import found_by
from flash_attention_registry.sdpa import AttentionCall, cpu, flash_general

# What is declined


@found_by("test_dtypes_are_served_as_declared[float64]")
class ForgetsToDeclineADtype(PlainKernelSet):
    def supports(self, call: AttentionCall) -> str | None:
        return super().supports(call._replace(query=call.query.float()))


@found_by(
    "test_head_dims_are_served_as_declared",
    also=(
        "test_declared_cases_are_served_and_others_declined[*-d256-*]",
        "test_declined_calls_are_torchs_own[head_dim]",
        "test_declined_calls_are_counted_with_a_reason[head_dim]",
    ),
)
class ForgetsToDeclineAHeadDim(PlainKernelSet):
    def supports(self, call: AttentionCall) -> str | None:
        return super().supports(call._replace(query=call.query.new_empty(1, 1, 2, 64)))


@found_by(
    "test_features_are_served_as_declared[attn_bias]",
    also=(
        "test_declined_calls_are_torchs_own[mask]",
        "test_declined_calls_are_counted_with_a_reason[mask]",
    ),
)
class ForgetsToDeclineABias(PlainKernelSet):
    def supports(self, call: AttentionCall) -> str | None:
        return super().supports(call._replace(attn_bias=None))


@found_by("test_features_are_served_as_declared[seqused_key]")
class ForgetsThatNotAllKeysAreUsed(PlainKernelSet):
    def supports(self, call: AttentionCall) -> str | None:
        return super().supports(call._replace(seqused_key=None))


@found_by("test_dtypes_are_served_as_declared[float32]")
class DeclinesADtypeThatItDeclares(PlainKernelSet):
    def supports(self, call: AttentionCall) -> str | None:
        wide = call.query.dtype is torch.float32
        return "float32 has no kernels yet" if wide else super().supports(call)


@found_by(
    "test_dtypes_are_served_as_declared",
    "test_head_dims_are_served_as_declared",
    "test_features_are_served_as_declared",
    "test_another_device_is_declined",
    "test_declined_calls_are_counted_with_a_reason",
    "test_declared_cases_are_served_and_others_declined",
)
class DeclinesWithoutAReason(PlainKernelSet):
    def supports(self, call: AttentionCall) -> str | None:
        return None if super().supports(call) is None else ""


@found_by("test_reasons_name_no_length")
class NamesALengthInItsReason(PlainKernelSet):
    def supports(self, call: AttentionCall) -> str | None:
        reason = super().supports(call)
        return None if reason is None else f"{reason} for {call.query.shape[-3]} rows"


# What arguments mean


@found_by(
    SCALE,
    SCALE_OF_BACKWARD,
    SCALE_IS_A_FACTOR,
    also=(
        NEGATIVE_SCALE,
        ZERO_SCALE,
        *of("*-scale*", EVERYTHING),
        "test_keys_far_below_the_best_have_no_weight",
    ),
)
class TakesTheScaleFromTheHeadDim(PlainKernelSet):
    def scores(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        return super().scores(call._replace(scale=call.query.shape[-1] ** -0.5), query, key)


@found_by(
    f"{SCALE}[0.0-*]",
    f"{SCALE_OF_BACKWARD}[0.0-*]",
    ZERO_SCALE,
    also=of("*-scale0.0-*", (*FORWARD, *DV)),
)
class TakesAScaleOfZeroForNone(PlainKernelSet):
    def scores(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        scale = call.scale or call.query.shape[-1] ** -0.5
        return super().scores(call._replace(scale=scale), query, key)


@found_by(
    f"{SCALE}[-1.0-*]",
    f"{SCALE_OF_BACKWARD}[-1.0-*]",
    NEGATIVE_SCALE,
    also=of("*-scale-0.2-*", EVERYTHING),
)
class TakesTheScaleForPositive(PlainKernelSet):
    def scores(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        return super().scores(call._replace(scale=abs(call.scale)), query, key)


@found_by("test_missing_arguments_mean_their_defaults", also=TORCH)
def a_missing_scale_is_one(stage: Stage) -> None:
    served = cpu.serve_bhsd

    def serve(kernels: Any, query: Any, key: Any, value: Any, scale: Any, *rest: Any) -> Any:
        return served(kernels, query, key, value, 1.0 if scale is None else scale, *rest)

    stage.patch.setattr(cpu, "serve_bhsd", serve)
    offer(PlainKernelSet)


@found_by("test_no_window_may_be_said_otherwise", also=(WINDOWS,))
def a_window_of_minus_one_hides_keys(stage: Stage) -> None:
    def normalised(causal: bool, left: Any, right: Any, rows: int, keys: int) -> Any:
        return (True, left, None) if causal or right == 0 else (causal, left, right)

    stage.patch.setattr(flash_general, "normalised_window", normalised)
    offer(PlainKernelSet)


@found_by(
    f"{WINDOWS}[*diagonal*]",
    *of("window to the left*", MASKS),
    also=of("*-left0-*", EVERYTHING),
)
class TakesAWindowOfZeroForNone(PlainKernelSet):
    def visible(self, call: AttentionCall) -> Tensor:
        return super().visible(call._replace(window_left=call.window_left or None))


@found_by(
    "test_lse_of_rows_without_keys_is_the_calls",
    "test_rows_without_keys_read_as_torchs",
)
class HasItsOwnLseOfEmptyRows(PlainKernelSet):
    def lse(self, call: AttentionCall, top: Tensor, total: Tensor) -> Tensor:
        return super().lse(call._replace(lse_of_empty_rows=-torch.inf), top, total)


# The form of results, and whose memory it is


@found_by("test_out_has_the_declared_form")
def out_is_contiguous_whatever_the_query(stage: Stage) -> None:
    served = cpu.serve_bhsd

    def serve(*args: Any) -> Any:
        result = served(*args)
        if isinstance(result, str):
            return result  # the reason to decline
        out, lse = result
        return out.contiguous(), lse

    stage.patch.setattr(cpu, "serve_bhsd", serve)
    offer(PlainKernelSet)


@found_by("test_lse_has_the_declared_form")
class LseWithHeadsLastInMemory(PlainKernelSet):
    def store_lse(self, call: AttentionCall, lse: Tensor) -> Tensor:
        return super().store_lse(call, lse).mT.contiguous().mT


@found_by("test_gradients_have_the_declared_form", also=DK)
class GradientInFloat32(PlainKernelSet):
    def store_dk(self, call: AttentionCall, dk: Tensor) -> Tensor:
        return super().store_dk(call, dk).float()


@found_by("test_given_out_is_written_as_it_lies")
class IgnoresTheOutItIsGiven(PlainKernelSet):
    def store_out(self, call: AttentionCall, out: Tensor) -> Tensor:
        return super().store_out(call._replace(out=None), out)


@found_by("test_out_is_allocated_where_none_is_given", also=("test_longest_lengths_are_bounds",))
class InsistsOnAnOut(PlainKernelSet):
    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        if call.out is None:
            raise ValueError("there is no out")
        return super().forward(call)


@found_by(
    "test_forward_leaves_its_arguments_alone",
    also=("test_forward_repeats_bit_for_bit",),
    perhaps=(
        "test_inputs_may_be_expanded",
        "test_inputs_may_be_one_tensor",
        "test_restore_gives_stocks_bits",
    ),
)
class WritesToTheValue(PlainKernelSet):
    """Its scratch overlaps the first element, of which it leaves all bits but one."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        results = super().forward(call)
        first = call.value[..., :1, :1, :1][:1]
        first.mul_(1 + torch.finfo(first.dtype).eps)
        return results


@found_by(
    "test_backward_leaves_its_arguments_alone",
    "test_backward_may_run_twice",
    also=(
        ZERO_SCALE,
        "test_activation_checkpointing_changes_nothing",
        "test_gradients_repeat",
        "test_out_may_have_any_strides",
    ),
)
class BackwardWritesToOut(PlainKernelSet):
    """It has no further use for it; others do."""

    def backward(self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> Any:
        grads = super().backward(call, grad_out, out, lse)
        out.mul_(grad_out)
        return grads


@found_by(
    "test_gradients_share_no_memory",
    also=("test_backward_leaves_its_arguments_alone", "test_gradients_repeat"),
)
class WritesDqWhereTheGradientOfOutLies(PlainKernelSet):
    """Of few rows; else everybody who uses it twice would run into that."""

    def backward(self, call: AttentionCall, grad_out: Tensor, out: Tensor, lse: Tensor) -> Any:
        dq, dk, dv = super().backward(call, grad_out, out, lse)
        if grad_out.is_contiguous() and grad_out.shape[-3] < 16:
            dq = grad_out.copy_(dq)
        return dq, dk, dv


@found_by("test_a_second_forward_leaves_the_firsts_results_alone")
class KeepsItsLse(PlainKernelSet):
    kept: ClassVar[dict[torch.Size, Tensor]] = {}

    def store_lse(self, call: AttentionCall, lse: Tensor) -> Tensor:
        lse = super().store_lse(call, lse)
        return self.kept.setdefault(lse.shape, torch.empty_like(lse)).copy_(lse)


@found_by("test_a_second_backward_leaves_the_firsts_gradients_alone", perhaps=DV)
class KeepsItsGradients(PlainKernelSet):
    kept: ClassVar[dict[torch.Size, Tensor]] = {}

    def store_dv(self, call: AttentionCall, dv: Tensor) -> Tensor:
        dv = super().store_dv(call, dv)
        return self.kept.setdefault(dv.shape, torch.empty_like(dv)).copy_(dv)
