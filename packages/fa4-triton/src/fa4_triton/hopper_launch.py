"""Launches of the Hopper kernels: compiled once, then started with four addresses.

Nothing here is imported where the Hopper kernels are not chosen: Gluon may be missing there.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from fa4_triton.hopper import Tensor4
from fa4_triton.kernels.hopper_forward import Config, hopper_forward_kernel
from fa4_triton.launch import Launcher, launcher_of

if TYPE_CHECKING:
    from torch import Tensor

    from fa4_triton.hopper import HopperPlan, HopperTile, Mask

__all__ = ["HopperForward", "config_of"]

LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)

# Registers of a thread by the number of consumers: (consumer, producer). They fill an SM's 65536.
_REGISTERS = {2: (240, 24), 3: (160, 32)}


def config_of(tile: HopperTile, mask: Mask, varlen: bool, tail: bool) -> Config:
    """What the kernel is compiled for."""
    consumer_registers, producer_registers = _REGISTERS[tile.m // 64]
    return Config(
        m=tile.m,
        n=tile.n,
        d=tile.d,
        stages=tile.stages,
        causal=mask == "causal",
        window=mask == "window",
        varlen=varlen,
        tail=tail,
        drawn=tile.drawn,
        own_o=tile.own_o,
        consumer_registers=consumer_registers,
        producer_registers=producer_registers,
    )


class Address:
    """A base of a `TensorDescriptor` that is no tensor: an address is all that is encoded of it."""

    __slots__ = ("_pointer", "dtype")

    def __init__(self, pointer: int, dtype: torch.dtype) -> None:
        self._pointer = pointer
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self._pointer


def _descriptor(tensor: Any, view: Tensor4) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(view.shape), list(view.strides), list(view.block), LAYOUT)


@lru_cache(maxsize=4096)
def _encoded(
    variant: HopperForward, plan: HopperPlan, number: int, pointer: int
) -> tuple[Any, ...]:
    """What the C function takes of tensor `number`: its tensor map, sizes and strides.

    A tensor map holds nothing but what the arguments say, so it never goes out of date. Torch's
    allocator gives the same few addresses again and again.
    """
    view = plan.tensors[number]
    descriptor = _descriptor(Address(pointer, variant.dtype), view)
    return tuple(make_tensordesc_arg(descriptor, variant.descriptions[number]))


_standing_counters: dict[tuple[int, int], Tensor] = {}
"""By device and stream: zero whenever no kernel runs on the stream.

Torch's streams only, which are few and never destroyed.
"""


def _counter(device: int, stream: int) -> Tensor:
    """A counter of tiles that is zero when the next kernel on the current stream starts.

    Kernels leave it zero, and on one stream they run one after the other, so that a stream needs
    one. A captured graph may be replayed on another stream; a handle that is not torch's may be
    another stream in each thread, or after its stream was destroyed. Launches there get a counter
    of their own.
    """
    if torch.cuda.is_current_stream_capturing():
        return _new_counter(device)
    counter = _standing_counters.get((device, stream))
    if counter is not None:
        return counter
    current = torch.cuda.current_stream(device)
    if not _is_of_torch(current):
        return _new_counter(device)
    # Of two threads that come here at once both get the same one.
    return _standing_counters.setdefault((device, stream), _lasting_counter(device, current))


def _new_counter(device: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))


def _is_of_torch(stream: torch.cuda.Stream) -> bool:
    """Whether torch made the stream: its id is odd, or 0 for the default one.

    The id of any other stream is its handle: an address, or 2 for CUDA's stream of each thread.
    """
    return stream.stream_id == 0 or stream.stream_id % 2 == 1


def _lasting_counter(device: int, stream: torch.cuda.Stream) -> Tensor:
    """A counter in memory that is in no pool, and zero for what `stream` runs from now on.

    The caller may allocate from the pool of a graph without capturing it, as the warm-up of
    `torch.compile(mode="reduce-overhead")` does. What is kept from there is taken for a leak, or
    overwritten by the graph. Such a pool is for one thread's allocations, so another makes this.
    """

    def make() -> Tensor:
        with torch.cuda.stream(stream):
            return _new_counter(device)

    with ThreadPoolExecutor(1) as helper:
        return helper.submit(make).result()


class HopperForward:
    """The forward for one configuration and dtype, compiled once per device.

    Attributes:
        dtype: Of query, key, value and out.
        descriptions: How Triton encodes each descriptor, once a device has a launcher.
    """

    __slots__ = ("_config", "_launchers", "descriptions", "dtype")

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        """Compile nothing yet."""
        self._config = config
        self.dtype = dtype
        self.descriptions: list[Any] = []
        self._launchers: dict[int, Launcher] = {}

    def launch(
        self,
        device: int,
        plan: HopperPlan,
        tensors: tuple[Any, ...],
        pointers: list[int],
        floats: tuple[float, ...],
    ) -> None:
        """Launch on the current stream of CUDA device `device`, which is current.

        Args:
            device: Index.
            plan: How.
            tensors: Query, key, value, out, lse and the offsets of packed sequences, or None.
            pointers: Their addresses; 0 for None.
            floats: |scale| * log2(e), and lse of rows without keys.
        """
        stream = driver.active.get_current_stream(device)
        # What is not read may have any address: the counter of tiles that are dealt, and the
        # offsets of a dense batch.
        counter = _counter(device, stream) if self._config.drawn else tensors[4]
        known = self._launchers.get(device)
        if known is not None:
            known.launch(
                plan.programs,
                1,
                1,
                stream,
                *known.fixed,
                *_encoded(self, plan, 0, pointers[0]),
                *_encoded(self, plan, 1, pointers[1]),
                *_encoded(self, plan, 2, pointers[2]),
                *_encoded(self, plan, 3, pointers[3]),
                *pointers,
                counter.data_ptr(),
                *floats,
                *plan.scalars,
                self._config,
            )
            return
        unused = tensors[4].view(torch.int32)
        compiled = hopper_forward_kernel[(plan.programs,)](
            *map(_descriptor, tensors[:4], plan.tensors),
            *(unused if tensor is None else tensor for tensor in tensors),
            counter.view(torch.int32),
            *floats,
            *plan.scalars,
            self._config,
            num_warps=4,
        )
        self.keep(device, compiled)

    def compile(self) -> Any:
        """Compile for the current device.

        Returns:
            Triton's `CompiledKernel`, or inside of its `AsyncCompileMode` a `FutureKernel`.
        """
        anywhere = Address(0, self.dtype)
        shape, strides = (
            (1, 1, 64, self._config.d),
            (64 * self._config.d,) * 2 + (self._config.d, 1),
        )
        rows, keys = (
            _descriptor(anywhere, Tensor4(shape, strides, (1, 1, count, self._config.d)))
            for count in (64, self._config.n)
        )
        names = hopper_forward_kernel.arg_names
        ints = len(names) - names.index("heads") - 1  # between the floats and the configuration
        return hopper_forward_kernel.warmup(
            *(rows, keys, keys, rows),
            *(self.dtype,) * 4,
            torch.float32,
            *(torch.int32,) * 3,
            0.0,
            0.0,
            *(0,) * ints,
            self._config,
            grid=(1,),
            num_warps=4,
        )

    def keep(self, device: int, compiled: Any) -> None:
        """Launch `compiled` from now on, on `device`, which is current."""
        launcher = launcher_of(compiled)
        if launcher is not None:
            self.descriptions = compiled.metadata.tensordesc_meta
            self._launchers[device] = launcher
