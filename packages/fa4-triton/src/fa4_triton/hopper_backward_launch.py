"""Launches of the Hopper backward's kernels, each compiled once.

Nothing here is imported where the Hopper kernels are not chosen: Gluon may be missing there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from fa4_triton.hopper_backward import OPERANDS, BackwardConstants, View
from fa4_triton.hopper_launch import LAYOUT, Address
from fa4_triton.kernels.hopper_backward import BackwardConfig, hopper_backward_kernel
from fa4_triton.kernels.hopper_backward_rows import (
    finish_kernel,
    prepare_kernel,
    repair_kernel,
)
from fa4_triton.kernels.hopper_backward_wide import (
    WideConfig,
    hopper_wide_dkdv_kernel,
    hopper_wide_dq_kernel,
)
from fa4_triton.launch import Launcher, launcher_of

if TYPE_CHECKING:
    from torch import Tensor

    from fa4_triton.hopper_backward import BackwardKernel, HopperBackwardPlan, KernelPlan

__all__ = [
    "KERNELS",
    "HopperBackwardVariant",
    "backward_config_of",
    "launch_backward",
    "layout_of",
]

KERNELS: dict[BackwardKernel, Any] = {
    "prepare": prepare_kernel,
    "fused": hopper_backward_kernel,
    "dkdv": hopper_wide_dkdv_kernel,
    "dq": hopper_wide_dq_kernel,
    "finish": finish_kernel,
    "repair": repair_kernel,
}

_OF_FLOATS = {
    1: gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1),
    2: gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2),
}
"""Row statistics, and the sums of dQ."""

# Registers of a thread: with the producer's they fill an SM's 65536.
_CONSUMER_REGISTERS = 240
_PRODUCER_REGISTERS = 24


def backward_config_of(constants: BackwardConstants) -> BackwardConfig | WideConfig:
    """What a Gluon kernel is compiled for."""
    tile, causal, tail = constants
    if tile.own_dq:
        return WideConfig(
            d=tile.d,
            causal=causal,
            tail=tail,
            consumer_registers=_CONSUMER_REGISTERS,
            producer_registers=_PRODUCER_REGISTERS,
        )
    return BackwardConfig(
        m=tile.m,
        d=tile.d,
        q_stages=tile.q_stages,
        do_stages=tile.do_stages,
        causal=causal,
        tail=tail,
        consumer_registers=_CONSUMER_REGISTERS,
        producer_registers=_PRODUCER_REGISTERS,
    )


def layout_of(view: View) -> Any:
    """How a block of an operand lies in shared memory."""
    return LAYOUT if len(view.shape) == 4 else _OF_FLOATS[len(view.shape)]


def _descriptor(tensor: Any, view: View) -> TensorDescriptor:
    shape, strides, block = map(list, view[1:])
    return TensorDescriptor(tensor, shape, strides, block, layout_of(view))


@lru_cache(maxsize=8192)
def _encoded(
    variant: HopperBackwardVariant, plan: KernelPlan, number: int, pointer: int
) -> tuple[Any, ...]:
    """What the C function takes of view `number`; see `hopper_launch`."""
    view = plan.views[number]
    descriptor = _descriptor(Address(pointer, variant.dtype_of(view.operand)), view)
    return tuple(make_tensordesc_arg(descriptor, variant.descriptions[number]))


class HopperBackwardVariant:
    """One kernel for one set of constants and one dtype, compiled once per device.

    Attributes:
        descriptions: How Triton encodes each descriptor, once a device has a launcher.
    """

    __slots__ = ("_constants", "_dtype", "_kernel", "_launchers", "_plan", "descriptions")

    def __init__(self, plan: KernelPlan, dtype: torch.dtype) -> None:
        """Compile nothing yet. `plan` is one of those that this kernel serves."""
        self._kernel = KERNELS[plan.kernel]
        self._plan = plan
        self._constants = tuple(
            backward_config_of(constant) if isinstance(constant, BackwardConstants) else constant
            for constant in plan.constants
        )
        self._dtype = dtype
        self.descriptions: list[Any] = []
        self._launchers: dict[int, Launcher] = {}

    def dtype_of(self, operand: int) -> torch.dtype:
        """Of an operand."""
        name = OPERANDS[operand]
        if name == "counters":
            return torch.int32
        floats = ("lse", "negative_lse", "delta", "sums")
        return torch.float32 if name in floats else self._dtype

    def compile(self) -> Any:
        """Compile for the current device.

        Returns:
            Triton's `CompiledKernel`, or inside of its `AsyncCompileMode` a `FutureKernel`.
        """
        plan = self._plan
        return self._kernel.warmup(
            *(_descriptor(Address(0, self.dtype_of(view.operand)), view) for view in plan.views),
            *map(self.dtype_of, plan.addresses),
            *(0.0,) * plan.floats,
            *(0,) * len(plan.ints),
            *self._constants,
            grid=(1,),
            num_warps=4,
        )

    def keep(self, device: int, compiled: Any) -> None:
        """Launch `compiled` from now on, on `device`, which is current."""
        launcher = launcher_of(compiled)
        if launcher is not None:
            self.descriptions = getattr(compiled.metadata, "tensordesc_meta", None) or []
            self._launchers[device] = launcher

    def launch(
        self,
        device: int,
        stream: int,
        plan: KernelPlan,
        tensor_of: Callable[[int], Tensor],
        pointers: list[int],
        floats: tuple[float, ...],
    ) -> None:
        """Launch on `stream`.

        Args:
            device: Index; that device is current.
            stream: Its current stream.
            plan: How.
            tensor_of: `OPERANDS`, by number.
            pointers: Their addresses.
            floats: scale and scale * log2(e).
        """
        known = self._launchers.get(device)
        if known is None:
            compiled = self._kernel[(plan.programs,)](
                *(_descriptor(tensor_of(view.operand), view) for view in plan.views),
                *map(tensor_of, plan.addresses),
                *floats[: plan.floats],
                *plan.ints,
                *self._constants,
                num_warps=4,
            )
            self.keep(device, compiled)
            return
        described: list[Any] = []
        for number, view in enumerate(plan.views):
            described += _encoded(self, plan, number, pointers[view.operand])
        known.launch(
            plan.programs,
            1,
            1,
            stream,
            *known.fixed,
            *described,
            *[pointers[operand] for operand in plan.addresses],
            *floats[: plan.floats],
            *plan.ints,
            *self._constants,
        )


def launch_backward(
    device: int,
    plan: HopperBackwardPlan,
    variants: tuple[HopperBackwardVariant, ...],
    given: tuple[Tensor, ...],
    floats: tuple[float, float],
) -> None:
    """Launch a backward on the current stream.

    Args:
        device: Index; that device is current.
        plan: How.
        variants: Of its kernels.
        given: `OPERANDS`, the workspaces left out.
        floats: scale and scale * log2(e).
    """
    workspace = given[0].new_empty(plan.workspace, dtype=torch.float32)
    start = workspace.data_ptr()

    def tensor_of(operand: int) -> Tensor:
        if operand < len(given):
            return given[operand]
        part = workspace[plan.offsets[operand - len(given)] :]
        return part.view(torch.int32) if OPERANDS[operand] == "counters" else part

    pointers = [tensor.data_ptr() for tensor in given]
    pointers += [start + 4 * offset for offset in plan.offsets]
    stream = driver.active.get_current_stream(device)
    for variant, kernel in zip(variants, plan.kernels, strict=True):
        variant.launch(device, stream, kernel, tensor_of, pointers, floats)
