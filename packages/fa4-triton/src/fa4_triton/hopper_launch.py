"""Launches of the Hopper kernels: compiled once, then started with four addresses.

Nothing here is imported where the Hopper kernels are not chosen: Gluon may be missing there.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from fa4_triton.kernels.hopper_forward import Config, hopper_forward_kernel
from fa4_triton.launch import DIRECT_LAUNCH

if TYPE_CHECKING:
    from torch import Tensor

    from fa4_triton.hopper import HopperPlan, HopperTile

__all__ = ["HopperForward", "config_of"]

LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)

# Registers of a thread by the number of consumers: (consumer, producer). They fill an SM's 65536.
_REGISTERS = {2: (240, 24), 3: (160, 32)}


def config_of(tile: HopperTile, causal: bool, tail: bool) -> Config:
    """What the kernel is compiled for."""
    consumer_registers, producer_registers = _REGISTERS[tile.m // 64]
    return Config(
        m=tile.m,
        n=tile.n,
        d=tile.d,
        stages=tile.stages,
        causal=causal,
        tail=tail,
        drawn=tile.drawn,
        own_o=tile.own_o,
        consumer_registers=consumer_registers,
        producer_registers=producer_registers,
    )


class _Descriptor:
    """What Triton's launcher reads of a `TensorDescriptor`, which checks itself anew each time."""

    __slots__ = ("_pointer", "shape", "strides")

    padding = "zero"

    def __init__(self, pointer: int, shape: list[int], strides: list[int]) -> None:
        self._pointer = pointer
        self.shape = shape
        self.strides = strides

    @property
    def base(self) -> _Descriptor:
        return self

    def data_ptr(self) -> int:
        return self._pointer


@cache
def _standing_counter(device: int, stream: int) -> Tensor:
    """The counter of one stream, zero whenever no kernel runs on it."""
    del stream  # part of the key
    return torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))


def _counter(device: int, stream: int) -> Tensor:
    """A counter of tiles that is zero when the next kernel on the stream starts.

    Kernels leave it zero, and on one stream they run one after the other. A captured graph may be
    replayed on another stream, so each launch in it gets a counter of its own.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))
    return _standing_counter(device, stream)


class HopperForward:
    """The forward for one configuration and dtype, compiled once per device."""

    __slots__ = ("_config", "_drawn", "_launchers")

    def __init__(self, config: Config) -> None:
        """Compile nothing yet."""
        self._config = config
        self._drawn = config.drawn
        self._launchers: dict[int, tuple[Any, Any, Any]] = {}

    def launch(
        self,
        device: int,
        plan: HopperPlan,
        tensors: tuple[Tensor, ...],
        pointers: list[int],
        floats: tuple[float, ...],
    ) -> None:
        """Launch on the current stream of CUDA device `device`, which is current.

        Args:
            device: Index.
            plan: How.
            tensors: Query, key, value, out and lse.
            pointers: Their addresses.
            floats: |scale| * log2(e), and lse of rows without keys.
        """
        stream = driver.active.get_current_stream(device)
        lse = pointers[4]
        # Where tiles are dealt no counter is read: any address will do.
        counter = _counter(device, stream) if self._drawn else tensors[4]
        known = self._launchers.get(device)
        if known is not None:
            run, function, metadata = known
            run(
                plan.programs,
                1,
                1,
                stream,
                function,
                metadata,
                None,
                None,
                None,
                *(
                    _Descriptor(pointer, tensor.shape, tensor.strides)
                    for pointer, tensor in zip(pointers, plan.tensors, strict=False)
                ),
                *pointers[:3],
                lse,
                counter.data_ptr(),
                *floats,
                *plan.scalars,
                self._config,
            )
            return
        descriptors = (
            TensorDescriptor(tensor, view.shape, view.strides, view.block, LAYOUT)
            for tensor, view in zip(tensors, plan.tensors, strict=False)
        )
        compiled = hopper_forward_kernel[(plan.programs,)](
            *descriptors,
            *tensors[:3],
            tensors[4],
            counter.view(torch.int32),
            *floats,
            *plan.scalars,
            self._config,
            num_warps=4,
        )
        if DIRECT_LAUNCH:
            self._launchers[device] = (
                compiled.run,
                compiled.function,
                compiled.packed_metadata,
            )
