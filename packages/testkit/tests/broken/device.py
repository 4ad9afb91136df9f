"""Kernel sets that break what only a CUDA device has: streams, graphs, much memory."""

from __future__ import annotations

import torch
from plain_kernel_set import PlainKernelSet
from torch import Tensor

from broken.table import found_by
from flash_attention_registry.sdpa import AttentionCall

GRAPHS = ("test_graph_replays_with_changed_inputs", "test_graphs_replay_at_once")


@found_by("test_kernels_wait_for_what_their_stream_waits_for", also=GRAPHS, gpu=True)
class RunsOnTheDefaultStream(PlainKernelSet):
    """And is waited for, so that what follows on the caller's stream finds its results."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        stream = torch.cuda.default_stream(call.query.device)
        with torch.cuda.stream(stream):
            results = super().forward(call)
        stream.synchronize()
        return results


@found_by(*GRAPHS, gpu=True)
class AsksTheDeviceForANumber(PlainKernelSet):
    """Which no capture allows."""

    def forward(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        int(call.query.shape[-3] if call.query.isnan().all() else 0)
        return super().forward(call)


@found_by(
    "test_offsets_may_exceed_32_bits",
    perhaps=("test_tensors_may_have_more_than_2_31_elements",),  # if there is the memory for them
    gpu=True,
)
class ReadsTheFirstWhereAnOffsetOverflows(PlainKernelSet):
    def load(self, tensor: Tensor) -> Tensor:
        for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if (size - 1) * stride >= 1 << 31:
                places = torch.arange(size, device=tensor.device)
                within = places.masked_fill(places * stride >= 1 << 31, 0)
                tensor = tensor.index_select(axis, within)
        return super().load(tensor)


@found_by("test_a_batch_may_exceed_16_bits", gpu=True)
class LaunchesNoMoreThan16BitsOfABatch(PlainKernelSet):
    def store_out(self, call: AttentionCall, out: Tensor) -> Tensor:
        out[1 << 16 :] = 0.0
        return super().store_out(call, out)
