"""The shared library that holds the kernels: found, loaded, declared to ctypes."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

__all__ = ["LIBRARY", "NotBuiltError", "load"]

LIBRARY = Path(__file__).with_name("lib") / "libfa4_cuda.so"


class NotBuiltError(ImportError):
    """The package was installed from its source tree, and its kernels are not compiled."""


@cache
def load() -> ctypes.CDLL:
    """Load the library; it needs neither a GPU nor a driver.

    Raises:
        NotBuiltError: It is not there.
        OSError: It cannot be loaded.
    """
    if not LIBRARY.exists():
        raise NotBuiltError(
            f"the kernels of fa4-cuda are not built: {LIBRARY} does not exist. In a checkout, "
            "build them with: hatch run build-cuda. Elsewhere install the wheel again: "
            "pip install --force-reinstall fa4-cuda"
        )
    library = ctypes.CDLL(str(LIBRARY))
    for name, result, parameters in (
        ("fa4_torch_find", ctypes.c_char_p, ()),
        ("fa4_torch_put_in", ctypes.c_int, (ctypes.c_char_p,) * 3),
        ("fa4_torch_take_out", None, ()),
        ("fa4_torch_switch", None, (ctypes.c_int,)),
        ("fa4_torch_served", ctypes.c_int64, (ctypes.c_char_p,)),
        ("fa4_torch_raise", None, (ctypes.c_void_p, ctypes.c_char_p)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, parameters
    return library
