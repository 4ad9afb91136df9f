"""Blocks of rows: what a kernel works on at a time, and where a fault of its own would be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = 32
"""No more rows than the smallest usual tile has, so that a wrong tile fills at least one block."""


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """The rows of packed sequences in blocks of 32, the remainder joined to the last block.

    A block thus has 32 to 63 rows, or all rows of a sequence shorter than that: one row left over
    has an error that is the luck of few roundings.

    Attributes:
        block_of_row: Block that each row belongs to, int64 ``[T]``; they ascend.
        count: How many blocks there are; an empty sequence has none.
        starts: First row of every sequence.
    """

    block_of_row: Tensor
    count: int
    starts: tuple[int, ...]

    @classmethod
    def of(cls, rows: list[slice], device: torch.device) -> Blocks:
        """The blocks of sequences that lie one after another at ``rows``."""
        starts = torch.tensor([part.start for part in rows], dtype=torch.int64, device=device)
        stops = torch.tensor([part.stop for part in rows], dtype=torch.int64, device=device)
        lengths = stops - starts
        blocks = (lengths // BLOCK_ROWS).clamp(min=1) * (lengths > 0)
        before = blocks.cumsum(0) - blocks  # blocks of the sequences before
        sequence = torch.repeat_interleave(lengths)  # [T]
        place = torch.arange(len(sequence), device=device) - starts[sequence]
        place = torch.minimum(place // BLOCK_ROWS, blocks[sequence] - 1)
        return cls(
            block_of_row=before[sequence] + place,
            count=int(blocks.sum()),
            starts=tuple(part.start for part in rows),
        )

    def rms(self, values: Tensor) -> Tensor:
        """Root mean square over every block and head: float64 ``[blocks, H]``.

        Args:
            values: ``[T, H, D]``, or ``[B, S, H, D]`` with the B sequences packed.
        """
        packed = values.double().flatten(0, -3)
        sums = packed.new_zeros((self.count, packed.shape[1]))
        sums.index_add_(0, self.block_of_row, packed.square().sum(-1))
        rows = self.block_of_row.bincount(minlength=self.count)
        return (sums / (rows[:, None] * packed.shape[2])).sqrt()

    def describe(self, block: int, rows: str) -> str:
        """Where a block is, as in ``sequence 0, keys 32 to 63``; ``rows`` names what it holds."""
        packed = (self.block_of_row == block).nonzero().flatten()
        first, last = int(packed[0]), int(packed[-1])
        # Empty sequences start where the next does: the last that starts there is meant.
        sequence = max(place for place, start in enumerate(self.starts) if start <= first)
        start = self.starts[sequence]
        return f"sequence {sequence}, {rows} {first - start} to {last - start}"
