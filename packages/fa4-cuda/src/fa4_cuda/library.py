"""The shared library that holds the kernels: found, loaded, and its C interface (`csrc/api.h`)."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

__all__ = [
    "ABI_VERSION",
    "FUNCTIONS",
    "LIBRARY",
    "BackwardArgs",
    "BackwardPlan",
    "ForwardArgs",
    "ForwardPlan",
    "LibraryError",
    "TensorArg",
    "error_text",
    "load",
    "load_from",
]

LIBRARY = Path(__file__).with_name("lib") / "libfa4_cuda.so"

ABI_VERSION = 2
"""Of the structures below; the library says which it was compiled with."""


class LibraryError(ImportError):
    """The library is not there, or is not the one of this package."""


class TensorArg(ctypes.Structure):
    """`fa4_tensor`: `[B, S, H, D]` or `[T, H, D]`; strides in elements."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride_batch", ctypes.c_int64),
        ("stride_seq", ctypes.c_int64),
        ("stride_head", ctypes.c_int64),
    )


class ForwardArgs(ctypes.Structure):
    """`fa4_forward_args`: what one forward is asked for."""

    _fields_ = (
        ("q", TensorArg),
        ("k", TensorArg),
        ("v", TensorArg),
        ("out", TensorArg),
        ("lse", ctypes.c_void_p),
        ("lse_stride_batch", ctypes.c_int64),
        ("lse_stride_head", ctypes.c_int64),
        ("cu_seqlens_q", ctypes.c_void_p),
        ("cu_seqlens_k", ctypes.c_void_p),
        ("seqused_k", ctypes.c_void_p),
        ("element", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("heads_q", ctypes.c_int32),
        ("heads_k", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("seq_q", ctypes.c_int32),
        ("seq_k", ctypes.c_int32),
        ("total_q", ctypes.c_int32),
        ("total_k", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("window_left", ctypes.c_int32),
        ("window_right", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("empty_lse", ctypes.c_float),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("workspace_is_zero", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    )


class ForwardPlan(ctypes.Structure):
    """`fa4_forward_plan`: how one forward is served."""

    _fields_ = (
        ("tile", ctypes.c_int32),
        ("packed_heads", ctypes.c_int32),
        ("tile_queries", ctypes.c_int32),
        ("tiles", ctypes.c_int32),
        ("grid", ctypes.c_int32),
        ("section_keys", ctypes.c_int32),
        ("dynamic", ctypes.c_int32),
        ("workspace_bytes", ctypes.c_int64),
    )


class BackwardArgs(ctypes.Structure):
    """`fa4_backward_args`: what one backward is asked for."""

    _fields_ = (
        ("q", TensorArg),
        ("k", TensorArg),
        ("v", TensorArg),
        ("out", TensorArg),
        ("grad_out", TensorArg),
        ("lse", ctypes.c_void_p),
        ("lse_stride_batch", ctypes.c_int64),
        ("lse_stride_head", ctypes.c_int64),
        ("dq", TensorArg),
        ("dk", TensorArg),
        ("dv", TensorArg),
        ("cu_seqlens_q", ctypes.c_void_p),
        ("cu_seqlens_k", ctypes.c_void_p),
        ("seqused_k", ctypes.c_void_p),
        ("element", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("heads_q", ctypes.c_int32),
        ("heads_k", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("seq_q", ctypes.c_int32),
        ("seq_k", ctypes.c_int32),
        ("total_q", ctypes.c_int32),
        ("total_k", ctypes.c_int32),
        ("causal", ctypes.c_int32),
        ("window_left", ctypes.c_int32),
        ("window_right", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("deterministic", ctypes.c_int32),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
    )


class BackwardPlan(ctypes.Structure):
    """`fa4_backward_plan`: how one backward is served."""

    _fields_ = (
        ("tile", ctypes.c_int32),
        ("grid", ctypes.c_int32),
        ("deterministic", ctypes.c_int32),
        ("query_grid", ctypes.c_int32),
        ("workspace_bytes", ctypes.c_int64),
    )


FUNCTIONS = (
    # csrc/api.h
    ("fa4_abi_version", ctypes.c_int, ()),
    ("fa4_error_string", ctypes.c_char_p, (ctypes.c_int,)),
    (
        "fa4_plan_forward",
        ctypes.c_int,
        (ctypes.POINTER(ForwardArgs), ctypes.c_int, ctypes.POINTER(ForwardPlan)),
    ),
    (
        "fa4_forward_with_plan",
        ctypes.c_int,
        (ctypes.POINTER(ForwardArgs), ctypes.POINTER(ForwardPlan)),
    ),
    (
        "fa4_plan_backward",
        ctypes.c_int,
        (ctypes.POINTER(BackwardArgs), ctypes.c_int, ctypes.POINTER(BackwardPlan)),
    ),
    (
        "fa4_backward_with_plan",
        ctypes.c_int,
        (ctypes.POINTER(BackwardArgs), ctypes.POINTER(BackwardPlan)),
    ),
    # csrc/glue/dispatch.cpp
    ("fa4_torch_find", ctypes.c_char_p, ()),
    ("fa4_torch_put_in", ctypes.c_int, (ctypes.c_char_p,) * 3),
    ("fa4_torch_take_out", None, ()),
    ("fa4_torch_switch", None, (ctypes.c_int,)),
    ("fa4_torch_served", ctypes.c_int64, (ctypes.c_char_p,)),
    ("fa4_torch_raise", None, (ctypes.c_void_p, ctypes.c_char_p)),
    # csrc/driver.cpp
    ("fa4_driver_version", ctypes.c_int, (ctypes.POINTER(ctypes.c_int),) * 2),
)
"""Name, result and parameters of what the library exports and this package calls."""


@cache
def load() -> ctypes.CDLL:
    """Load the library; it needs neither a GPU, nor a driver, nor torch.

    Raises:
        LibraryError: It is not there, cannot be loaded, or is of another build.
    """
    return load_from(LIBRARY)


def load_from(path: Path) -> ctypes.CDLL:
    """Load a build of the library that may lie elsewhere; see `load`."""
    if not path.exists():
        raise LibraryError(
            "the kernels of fa4-cuda are not compiled. In a checkout, compile them with "
            "`hatch run build-cuda`; elsewhere, install the wheel again: "
            "pip install --force-reinstall fa4-cuda"
        )
    try:
        library = ctypes.CDLL(str(path))
        for name, result, parameters in FUNCTIONS:
            function = getattr(library, name)
            function.restype, function.argtypes = result, parameters
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path.name} cannot be loaded: {error}. {_ANEW}") from error
    found = library.fa4_abi_version()
    if found != ABI_VERSION:
        raise LibraryError(
            f"{path.name} is of another build: its interface has number {found}, and this "
            f"package expects {ABI_VERSION}. {_ANEW}"
        )
    return library


_ANEW = "Install fa4-cuda again or, in a checkout, run `hatch run build-cuda`"


def error_text(status: int) -> str:
    """Say what a status of `csrc/api.h` means."""
    text: bytes = load().fa4_error_string(status)
    return f"{text.decode()} (CUDA error {-status})" if status < 0 else text.decode()
