"""What is measured: cells, how much work each is, and the grids that have a name."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "DIRECTIONS",
    "DTYPE_BYTES",
    "GRAD_LAYOUTS",
    "GRIDS",
    "TOKENS",
    "WIDTH",
    "Cell",
    "own_grid",
]

DIRECTIONS = ("forward", "backward")
DTYPE_BYTES: Mapping[str, int] = MappingProxyType({"bfloat16": 2, "float16": 2, "float32": 4})
GRAD_LAYOUTS = ("bshd", "bhsd")
"""How the gradient of out lies in memory: as out does, or heads before rows."""
TOKENS = 16384
"""Batch times sequence length in the FlashAttention papers' setting."""
WIDTH = 2048
"""Heads times head dimension in that setting."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of a grid.

    Attributes:
        direction: `"forward"` or `"backward"`; the backward alone is timed, without its forward.
        head_dim: D.
        seq_len: Keys of a sequence; of the longest one, if `seq_lens` is given.
        causal: Whether a causal mask applies.
        batch: Sequences.
        heads: Query heads.
        kv_heads: Key heads, a divisor of `heads`.
        dtype: A key of `DTYPE_BYTES`.
        query_len: Query rows of a sequence; None is `seq_len`.
        seq_lens: Lengths of packed sequences; empty for a dense batch.
        grad_layout: Of `GRAD_LAYOUTS`; for the backward of a dense batch only.
        deterministic: Whether the gradients are to repeat: they are computed in the mode that
            `backends.mode_of` sets, from a forward outside of it; backward only.
    """

    direction: str
    head_dim: int
    seq_len: int
    causal: bool
    batch: int
    heads: int
    kv_heads: int
    dtype: str = "bfloat16"
    query_len: int | None = None
    seq_lens: tuple[int, ...] = ()
    grad_layout: str = "bshd"
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Refuse what no kernel could be asked for."""
        sizes = (self.head_dim, self.seq_len, self.batch, self.heads, self.kv_heads, self.rows)
        if min(*sizes, *self.seq_lens) < 1:
            raise ValueError(f"sizes must be at least 1, found {self}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads cannot share {self.kv_heads} key heads evenly; choose a "
                "divisor"
            )
        if self.direction not in DIRECTIONS or self.dtype not in DTYPE_BYTES:
            raise ValueError(
                f"direction must be one of {DIRECTIONS} and dtype one of {tuple(DTYPE_BYTES)}, "
                f"found {self.direction!r} and {self.dtype!r}"
            )
        if self.grad_layout not in GRAD_LAYOUTS:
            raise ValueError(
                f"grad_layout must be one of {GRAD_LAYOUTS}, found {self.grad_layout!r}"
            )
        if self.deterministic and self.direction != "backward":
            raise ValueError("deterministic asks for gradients; measure it with the backward")
        if self.causal and self.rows != self.seq_len:
            raise ValueError(
                f"a causal mask over {self.rows} query rows and {self.seq_len} keys means "
                "different things to different backends; measure it without the mask"
            )

    @property
    def rows(self) -> int:
        """Query rows of one sequence."""
        return self.seq_len if self.query_len is None else self.query_len

    @property
    def is_decode(self) -> bool:
        """Whether one query row reads all keys: bound by memory, so told in GB/s."""
        return self.rows == 1

    @property
    def flops(self) -> float:
        """Operations of one run, as the FlashAttention papers count them.

        Two matrix products forward, 4 D for each pair of a row and a key; half of the pairs under
        a causal mask; 2.5 times that backward.
        """
        lengths = [(length, length) for length in self.seq_lens]
        pairs = sum(q * k for q, k in lengths or [(self.rows, self.seq_len)] * self.batch)
        forward = 4.0 * self.heads * self.head_dim * pairs / (2 if self.causal else 1)
        return forward if self.direction == "forward" else 2.5 * forward

    @property
    def key_value_bytes(self) -> int:
        """Bytes of key and value, which a decoding step has to read."""
        keys = sum(self.seq_lens) or self.batch * self.seq_len
        return 2 * keys * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        """What a progress line shows."""
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        length = f"{self.rows}x{self.seq_len}" if self.query_len else str(self.seq_len)
        return (
            f"{self.direction} B {self.batch} H {heads} S {length} D {self.head_dim} "
            f"{'causal' if self.causal else 'full'}{' packed' if self.seq_lens else ''}"
            f"{' deterministic' if self.deterministic else ''}"
        )


def _anchors() -> Iterator[Cell]:
    """The papers' grid, by which published kernels are compared."""
    return own_grid()


def _gqa() -> Iterator[Cell]:
    """Grouped heads as in current models: 4, 8 and all query heads to a key head."""
    for direction, (heads, kv_heads) in itertools.product(DIRECTIONS, ((32, 8), (64, 8), (32, 1))):
        for seq_len in (1024, 8192):
            batch = TOKENS // seq_len
            yield Cell(direction, 128, seq_len, True, batch, heads, kv_heads)


def _varlen() -> Iterator[Cell]:
    """Five sequences of very different lengths in 16384 tokens."""
    lengths = (100, 1000, 2804, 4288, 8192)
    for direction, causal in itertools.product(DIRECTIONS, (False, True)):
        yield Cell(direction, 128, max(lengths), causal, 5, 16, 16, seq_lens=lengths)


def _decode() -> Iterator[Cell]:
    """One query row each, forward only."""
    for batch, heads, kv_heads, seq_len in (
        (1, 32, 8, 4096),
        (8, 32, 8, 8192),
        (1, 32, 8, 65536),
        (32, 32, 8, 4096),
        (1, 32, 32, 16384),
        (8, 64, 8, 32768),
    ):
        yield Cell("forward", 128, seq_len, False, batch, heads, kv_heads, query_len=1)


def _deterministic() -> Iterator[Cell]:
    """The papers' grid, backward, with gradients that are to repeat bit for bit."""
    return (
        dataclasses.replace(cell, deterministic=True) for cell in own_grid(directions=("backward",))
    )


def _small() -> Iterator[Cell]:
    """What Triton's interpreter finishes in seconds."""
    return own_grid(head_dims=(64,), seq_lens=(128,), batches=(1,), heads=(2,))


GRIDS: Mapping[str, Callable[[], Iterator[Cell]]] = MappingProxyType(
    {
        "anchors": _anchors,
        "decode": _decode,
        "varlen": _varlen,
        "gqa": _gqa,
        "deterministic": _deterministic,
        "small": _small,
    }
)
"""The grids that have a name. `small` is for machines without a GPU."""


def own_grid(
    *,
    head_dims: Sequence[int] = (64, 128, 256),
    seq_lens: Sequence[int] = (1024, 4096, 16384),
    batches: Sequence[int] = (),
    heads: Sequence[int] = (),
    kv_heads: Sequence[int] = (),
    causal: Sequence[bool] = (False, True),
    dtypes: Sequence[str] = ("bfloat16",),
    directions: Sequence[str] = DIRECTIONS,
) -> Iterator[Cell]:
    """Every combination of what is given.

    Args:
        head_dims: D.
        seq_lens: Rows and keys of a sequence.
        batches: Empty: as many sequences as make 16384 tokens.
        heads: Empty: as many heads as make 2048 with `head_dims`.
        kv_heads: Empty: as many as query heads.
        causal: With the mask, without it, or both.
        dtypes: Keys of `DTYPE_BYTES`.
        directions: Of `DIRECTIONS`.

    Raises:
        ValueError: A combination is none that a kernel could be asked for.
    """
    if min((*head_dims, *seq_lens), default=1) < 1:  # heads and batches are computed from them
        raise ValueError(
            f"sizes must be at least 1, found head_dims {list(head_dims)} and seq_lens "
            f"{list(seq_lens)}"
        )
    for direction, dtype, head_dim, seq_len, masked in itertools.product(
        directions, dtypes, head_dims, seq_lens, causal
    ):
        for batch in batches or (max(1, TOKENS // seq_len),):
            for count in heads or (max(1, WIDTH // head_dim),):
                for kv_count in kv_heads or (count,):
                    yield Cell(direction, head_dim, seq_len, masked, batch, count, kv_count, dtype)
