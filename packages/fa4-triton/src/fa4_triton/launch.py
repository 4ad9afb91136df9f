"""Cached launches: after the first launch of a kernel variant, no binder and no specialisation.

`kernel[grid](...)` spends most of its host time on finding out which variant the arguments ask for.
A plan knows: whatever a variant depends on is in its tile and constants.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.runtime import driver

from fa4_triton import interpreter
from fa4_triton.plan import Constants
from fa4_triton.tiles import Tile

__all__ = ["DIRECT_LAUNCH", "Variant"]

# CompiledKernel.run is not public; these versions take the arguments given to it below.
DIRECT_LAUNCH = triton.__version__.startswith("3.6.")


def _constant_arguments(kernel: Any, tile: Tile, constants: Constants) -> tuple[Any, ...]:
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

    __slots__ = ("_kernel", "_launchers", "_options", "constants")

    def __init__(self, kernel: Any, tile: Tile, constants: Constants) -> None:
        """Compile nothing yet. `constants` are the kernel's last arguments, the constexpr ones."""
        self._kernel = kernel
        self.constants = _constant_arguments(kernel, tile, constants)
        self._options = {"num_warps": tile.warps, "num_stages": tile.stages}
        self._launchers: dict[int, tuple[Any, Any, Any, Any]] = {}

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
            programs: How many.
            tensors: The kernel's first arguments; None for an absent one.
            pointers: Their addresses, 0 for an absent one.
            scalars: The arguments after these.
        """
        known = self._launchers.get(device)
        if known is not None:
            run, current_stream, function, metadata = known
            # Addresses: for a tensor object the launcher would ask the driver what it points to.
            run(
                programs,
                1,
                1,
                current_stream(device),
                function,
                metadata,
                None,
                None,
                None,
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
            if DIRECT_LAUNCH:
                self._launchers[device] = (
                    compiled.run,
                    driver.active.get_current_stream,
                    compiled.function,
                    compiled.packed_metadata,
                )
