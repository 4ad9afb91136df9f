"""Cached launches: after the first launch of a kernel variant, no binder and no specialisation.

`kernel[grid](...)` spends most of its host time on finding out which variant the arguments ask for.
A plan knows: whatever a variant depends on is in its tile and constants.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

from fa4_triton import interpreter
from fa4_triton.plan import Constants
from fa4_triton.tiles import Tile

__all__ = ["Launcher", "Variant", "constant_arguments", "launcher_of"]

# What stands behind CompiledKernel.run is not public; in these versions it is as used below.
_DIRECT_LAUNCH = triton.__version__.startswith("3.6.")


class Launcher(NamedTuple):
    """Triton's C function for one compiled kernel: `launch(x, y, z, stream, *fixed, *arguments)`.

    `CompiledKernel.run` comes to the same call by way of a check for scratch memory, which these
    kernels have none of, and of encoding each tensor descriptor anew. Of a descriptor the function
    takes the encoded tensor map, the sizes and the strides.
    """

    launch: Callable[..., None]
    fixed: tuple[Any, ...]
    """Function, flags, scratch memory, metadata and hooks."""


def launcher_of(compiled: Any) -> Launcher | None:
    """The launcher of a `CompiledKernel`, loaded on the current device; None if it is not known."""
    run = compiled.run
    if not _DIRECT_LAUNCH or run.global_scratch_size or run.profile_scratch_size:
        return None
    # Where a kernel takes descriptors, a function that encodes them stands before the C function.
    launch = run.launch
    if inspect.isfunction(launch):
        launch = inspect.getclosurevars(launch).nonlocals.get("launcher")
        if launch is None:
            return None
    fixed = (
        *(compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None),
        *(compiled.packed_metadata, None, None, None),
    )
    return Launcher(launch, fixed)


def constant_arguments(kernel: Any, tile: Tile, constants: Constants) -> tuple[Any, ...]:
    """The kernel's constexpr arguments in its order; they come last."""
    values = {
        "M": tile.m,
        "N": tile.n,
        "D0": constants.d0,
        "D1": constants.d1,
        "HEAD_DIM": constants.head_dim,
        "HAS_LEFT": constants.has_left,
        "HAS_RIGHT": constants.has_right,
        "VARLEN": constants.varlen,
        "UNIT": constants.unit,
        "WIDE": constants.wide,
        "NEGATIVE_SCALE": constants.negative_scale,
        "MHA": constants.mha,
        "DK": constants.gradients != "dv",
        "DV": constants.gradients != "dk",
    }
    return tuple(values[name] for name in kernel.arg_names if name in values)


class Variant:
    """One kernel for one tile, one set of constants and one dtype, compiled once per device."""

    __slots__ = ("_dtype", "_kernel", "_launchers", "_options", "_varlen", "constants")

    def __init__(self, kernel: Any, tile: Tile, constants: Constants, dtype: torch.dtype) -> None:
        """Compile nothing yet. `constants` are the kernel's last arguments, the constexpr ones."""
        self._kernel = kernel
        self._dtype = dtype
        self._varlen = constants.varlen
        self.constants = constant_arguments(kernel, tile, constants)
        self._options = {"num_warps": tile.warps, "num_stages": tile.stages}
        self._launchers: dict[int, Launcher] = {}

    def compile(self) -> Any:
        """Compile for the current device and tensors that start at multiples of 16 bytes.

        Returns:
            Triton's `CompiledKernel`, or inside of its `AsyncCompileMode` a `FutureKernel`.
        """
        scalars = {"tl.int32": 0, "tl.int64": 0, "tl.float32": 0.0}
        offsets = torch.int32 if self._varlen else None
        arrays = {
            **dict.fromkeys(("lse", "delta"), torch.float32),
            **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), offsets),
        }
        kinds = self._kernel.fn.__annotations__
        arguments = [
            scalars[kinds[name]] if name in kinds else arrays.get(name, self._dtype)
            for name in self._kernel.arg_names[: -len(self.constants)]
        ]
        return self._kernel.warmup(*arguments, *self.constants, grid=(1,), **self._options)

    def keep(self, device: int, compiled: Any) -> None:
        """Launch `compiled` from now on, on `device`, which is current."""
        launcher = launcher_of(compiled)
        if launcher is not None:
            self._launchers[device] = launcher

    def launch(
        self,
        device: int,
        programs: int,
        tensors: tuple[Any, ...],
        pointers: list[int],
        scalars: tuple[float, ...],
    ) -> None:
        """Launch on the current stream of CUDA device `device`, which is current; -1 interprets.

        Args:
            device: Index.
            programs: How many; none where there are no rows, or no sequences: nothing is launched.
            tensors: The kernel's first arguments; None for an absent one.
            pointers: Their addresses, 0 for an absent one.
            scalars: The arguments after these.
        """
        if programs == 0:
            return
        known = self._launchers.get(device)
        if known is not None:
            # Addresses: for a tensor object the launcher would ask the driver what it points to.
            known.launch(
                programs,
                1,
                1,
                driver.active.get_current_stream(device),
                *known.fixed,
                *pointers,
                *scalars,
                *self.constants,
            )
        elif interpreter.INTERPRETED:
            with interpreter.running():
                self._kernel[(programs,)](*tensors, *scalars, *self.constants)
        else:
            compiled = self._kernel[(programs,)](
                *tensors, *scalars, *self.constants, **self._options
            )
            self.keep(device, compiled)
