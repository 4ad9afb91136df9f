"""Triton's interpreter as a CPU device: repairs of what Triton 3.6 gets wrong, and a lock.

With `TRITON_INTERPRET=1` in the environment before Triton is first imported, the kernels run on CPU
tensors in NumPy, program by program. Four things need mending before bf16 kernels can be trusted
there, and a fifth costs 40% of the time; `repair` mends them:

- `tl.dot` multiplies the bit patterns of bf16 operands as if they were integers;
- casts from fp32 to bf16 truncate, where every GPU rounds to nearest even;
- casts from integers to bf16 keep the integer's bits, so that 1 becomes almost nothing;
- NumPy 2.4 refuses the one-element arrays that the interpreter uses as loop bounds;
- the language's functions are searched for those to replace at every call of a device function.

The interpreter also patches module globals while a kernel runs, so two threads cannot be in it at
once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any

from triton import knobs

__all__ = ["INTERPRETED", "repair", "running"]

INTERPRETED: bool = bool(knobs.runtime.interpret)
"""Whether kernels are interpreted. Triton decides where a kernel is defined: this is settled."""

_lock = threading.Lock()


def _renew_lock() -> None:
    """Give a forked child a lock that no thread of its parent holds."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_renew_lock)


@contextlib.contextmanager
def running() -> Iterator[None]:
    """While a kernel is interpreted: the lock is held, and NumPy keeps quiet.

    Kernels meet infinities on purpose, for which a GPU has no warning either.
    """
    import numpy as np

    with _lock, np.errstate(all="ignore"):
        yield


@functools.cache
def repair() -> None:
    """Mend the interpreter, once; without `TRITON_INTERPRET=1` there is nothing to mend."""
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    handle = interpreter.TensorHandle
    builder: Any = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot
    patch_tensor = interpreter._patch_lang_tensor

    def to_float32(bits: Any) -> Any:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def to_bfloat16(values: Any) -> Any:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        # To nearest even: add half of the dropped part, one less where the kept part is even.
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return handle(to_float32(source.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return handle(to_bfloat16(source.data), tl.bfloat16)
        if kinds[0].is_int() and kinds[1] == tl.bfloat16:
            return handle(to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, precision: Any, imprecise: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, acc, precision, imprecise)
        x, y = to_float32(a.data), to_float32(b.data)
        return handle(np.matmul(x, y, dtype=acc.data.dtype) + acc.data, acc.dtype.scalar)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    searched: set[int] = set()  # globals of functions, since the kernel started that runs
    run_grid = interpreter.GridExecutor.__call__

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        searched.clear()
        return run_grid(self, *arguments, **options)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if id(self.fn.__globals__) not in searched:
            interpreter._patch_lang(self.fn)
            searched.add(id(self.fn.__globals__))
        return self.rewrite()(*arguments, **options)

    interpreter.GridExecutor.__call__ = run
    interpreter.InterpretedFunction.__call__ = call
    builder.cast_impl = cast_impl
    builder.create_fp_ext = cast_impl
    builder.create_fp_trunc = cast_impl
    builder.create_dot = create_dot
    interpreter._patch_lang_tensor = patch_lang_tensor
