"""Cached launches: after the first launch of a kernel variant, no binder and no specialisation run again.

`kernel[grid](...)` takes about 30 us of host time a launch, most of it to find out which variant the arguments ask
for. The callers here know: whatever a variant depends on is in its key.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
from triton.runtime import driver

from fa4_triton import interpreter
from fa4_triton.tiles import Tile

__all__ = ["Constants", "Variant", "variant"]

# `CompiledKernel.run` is not public; these are the versions whose argument list is known to be the one below.
_DIRECT_LAUNCH = triton.__version__.startswith("3.6.")


class Constants(NamedTuple):
    """What all three kernels are compiled for, beside the tile and the tensors' dtype."""

    d0: int
    d1: int
    head_dim: int
    has_left: bool
    has_right: bool
    varlen: bool
    negative_scale: bool  # forward
    mha: bool  # dkdv: one query head a key head
    dk: bool  # dkdv: which gradients this launch computes
    dv: bool
    stride_unit: int
    wide: bool
    alignment: int  # bit i: pointer i is a multiple of 16 bytes; the compiler may rely on it


class Variant:
    """One kernel compiled for one set of constants, and how to launch it on each device."""

    __slots__ = ("_constants", "_kernel", "_launchers", "_options")

    def __init__(self, kernel: Any, tile: Tile, constants: Constants) -> None:
        values = {
            "M": tile.m,
            "N": tile.n,
            "D0": constants.d0,
            "D1": constants.d1,
            "HEAD_DIM": constants.head_dim,
            "HAS_LEFT": constants.has_left,
            "HAS_RIGHT": constants.has_right,
            "VARLEN": constants.varlen,
            "NEGATIVE_SCALE": constants.negative_scale,
            "MHA": constants.mha,
            "DK": constants.dk,
            "DV": constants.dv,
            "STRIDE_UNIT": constants.stride_unit,
            "WIDE": constants.wide,
        }
        self._kernel = kernel
        self._constants = tuple(values[name] for name in kernel.arg_names if name in values)
        self._options = {"num_warps": tile.warps, "num_stages": tile.stages}
        self._launchers: dict[int, tuple[Any, Any, Any]] = {}

    def launch(self, device: int, programs: int, tensors: tuple[Any, ...], others: tuple[Any, ...]) -> None:
        """Launch `programs` programs on the current stream of CUDA device `device`, which is the current one.

        `tensors` (some may be None) come first in the kernel's arguments, `others` after them.
        """
        known = self._launchers.get(device)
        if known is not None:
            run, function, metadata = known
            stream = driver.active.get_current_stream(device)
            pointers = [tensor if tensor is None else tensor.data_ptr() for tensor in tensors]
            run(programs, 1, 1, stream, function, metadata, None, None, None, *pointers, *others, *self._constants)
        elif interpreter.INTERPRETED:
            with interpreter.lock:
                self._kernel[(programs,)](*tensors, *others, *self._constants)
        else:
            compiled = self._kernel[(programs,)](*tensors, *others, *self._constants, **self._options)
            if _DIRECT_LAUNCH:
                self._launchers[device] = compiled.run, compiled.function, compiled.packed_metadata


@functools.lru_cache(maxsize=None)
def variant(kernel: Any, tile: Tile, dtype: Any, constants: Constants) -> Variant:
    """The `Variant` for these constants; `dtype` is part of what it is compiled for."""
    del dtype
    return Variant(kernel, tile, constants)
