"""Compiling ahead: what a program will run, before it runs it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any, Literal, TypeAlias, get_args

import torch
import triton

from fa4_triton import interpreter, provider
from fa4_triton.hopper import Direction
from fa4_triton.kernel_set import CAPABILITIES, variants_of
from fa4_triton.plan import Packed, Request

__all__ = ["warmup"]

WarmupMask: TypeAlias = Literal["none", "causal", "window"]

# (queries, keys) of sequences, so that each tile of the tables is met, with and without a last
# block that is full.
_LENGTHS = ((64, 64), (4096, 4096), (4096, 4097), (16384, 16384), (16384, 16385))
_WINDOW = 128
_HEADS = 32
_HEADS_OF_GROUPS = 8


def warmup(
    *,
    head_dims: Iterable[int],
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    masks: Iterable[WarmupMask] = ("none", "causal"),
    directions: Iterable[Direction] = ("forward", "backward"),
    packed: Iterable[bool] = (False,),
    grouped: Iterable[bool] = (False,),
    device: torch.device | str | int | None = None,
    workers: int | None = None,
) -> int:
    """Compile and load the kernels of all combinations of what is given, in parallel.

    A call whose kernel is not compiled yet waits for the compiler, for seconds; one that was warmed
    up, in this process, does not. Triton keeps what it compiles on disk, so a later process loads
    it faster. Lengths and numbers of heads make no difference to what is compiled. Strides do:
    tensors are taken to start at multiples of 16 bytes and to have strides that are such multiples,
    as those of all usual layouts are; other ones are compiled when they are met. So are the kernels
    of what is seldom asked for: a scale that is zero or negative, a window that is open on one side
    and not causal, and gradients that repeat bit for bit, unless
    `torch.use_deterministic_algorithms(True)` is in force here already.

    Args:
        head_dims: Multiples of 8 up to 256.
        dtypes: `torch.bfloat16`, `torch.float16`.
        masks: "none", "causal", and "window" for one that bounds the keys on both sides, be it
            causal.
        directions: "forward", "backward".
        packed: False for dense batches, True for packed sequences.
        grouped: False for a key head to each query head, True for fewer.
        device: A CUDA device or its index; the current one by default.
        workers: How many to compile at a time; as many as there are processors by default.

    Returns:
        How many kernels are ready.

    Raises:
        TypeError: One thing is given in place of several, or a device is none.
        ValueError: Something that the kernels do not serve is asked for, or a device that is not
            there or too old.
        RuntimeError: Nothing can be compiled here: no GPU, no C compiler, an old package, or
            Triton's interpreter, which compiles nothing.
        ModuleNotFoundError: torch or Triton is not installed.
    """
    head_dims = _several("head_dims", head_dims, CAPABILITIES.head_dims)
    dtypes = _several("dtypes", dtypes, sorted(CAPABILITIES.dtypes, key=str))
    masks = _several("masks", masks, get_args(WarmupMask))
    directions = _several("directions", directions, get_args(Direction))
    packed = _several("packed", packed, (False, True))
    grouped = _several("grouped", grouped, (False, True))
    if interpreter.INTERPRETED:
        raise RuntimeError(
            "warmup() compiles kernels, and TRITON_INTERPRET is set: Triton interprets them and "
            "compiles nothing. Unset it, on a machine with a GPU"
        )
    reason = provider.why_unavailable()
    if reason is not None:
        raise RuntimeError(f"warmup() cannot compile kernels here: {reason}")
    index = _index_of(device)
    variants: dict[Any, None] = {}
    for dtype, direction, request in product(
        dtypes, directions, tuple(_requests(head_dims, masks, packed, grouped))
    ):
        variants.update(dict.fromkeys(variants_of(direction, index, dtype, request)))
    _compile(tuple(variants), index, workers)
    return len(variants)


def _several(name: str, given: Iterable[Any], served: Collection[Any]) -> tuple[Any, ...]:
    """What is given for the argument `name`, all of which is to be among what is served."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(
            f"warmup() takes a list of {name}, and was given {given!r}; give {name}=[{given!r}]"
        )
    values = tuple(given)
    for one in values:
        # 64.0 == 64 and 1 == True, but they are not what is asked for.
        if not any(type(one) is type(other) and one == other for other in served):
            raise ValueError(
                f"warmup() was given {one!r} among its {name}; served are "
                f"{', '.join(map(str, served))}"
            )
    return values


def _index_of(device: torch.device | str | int | None) -> int:
    """The index of a GPU that is there and that the kernels compile for."""
    if isinstance(device, bool):
        raise TypeError(
            f"warmup() takes a CUDA device or its index, and was given {device}; give device=0 or "
            "'cuda:0', or leave it out for the current one"
        )
    if isinstance(device, int):
        index = device
    else:
        chosen = torch.device("cuda") if device is None else torch.device(device)
        if chosen.type != "cuda":
            raise ValueError(
                f"warmup() compiles for a CUDA device, and was given {chosen}; give 'cuda', or "
                "leave it out for the current one"
            )
        index = torch.cuda.current_device() if chosen.index is None else chosen.index
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise ValueError(
            f"warmup() was given the CUDA device {index}, and {count} are visible to torch; give "
            f"an index from 0 to {count - 1}, or leave it out for the current one"
        )
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) < provider.OLDEST_GPU:
        raise ValueError(
            f"warmup() compiles for compute capability {'.'.join(map(str, provider.OLDEST_GPU))} "
            f"or newer, and CUDA device {index} has {major}.{minor}; give the index of a newer one"
        )
    return index


def _requests(
    head_dims: Iterable[int],
    masks: Iterable[WarmupMask],
    packed: Iterable[bool],
    grouped: Iterable[bool],
) -> Iterator[Request]:
    """Requests that meet every kernel of what is asked for."""
    for head_dim, mask, is_packed, in_groups, (rows, keys) in product(
        head_dims, masks, packed, grouped, _LENGTHS
    ):
        query: tuple[int, ...] = (rows, _HEADS, head_dim)
        key: tuple[int, ...] = (keys, _HEADS_OF_GROUPS if in_groups else _HEADS, head_dim)
        sequences = Packed(1, rows, keys) if is_packed else None
        if not is_packed:
            query, key = (1, *query), (1, *key)
        window = _WINDOW if mask == "window" else None
        yield Request(query, key, mask == "causal", window, window, sequences)


def _compile(variants: tuple[Any, ...], index: int, workers: int | None) -> None:
    """Compile in threads: most of a compilation holds no lock of Python's."""

    def load(variant: Any, compiled: Any) -> None:
        with torch.cuda.device(index):
            variant.keep(index, compiled)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool, torch.cuda.device(index):
        with triton.AsyncCompileMode(pool):
            submitted = [variant.compile() for variant in variants]
        compiled = [one.result() if hasattr(one, "result") else one for one in submitted]
        list(pool.map(load, variants, compiled))
