"""The buffers that kernels read and write, preallocated so that their addresses in a captured graph stay valid."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmq.kernels.primitives import Tensors

LISTED = 32  # entries of a list of outliers that may be read without knowing how many there are
PEAKS = 32  # of the values noted by different writers, so that few wait for one another
TALLY = 64  # numbers: the peaks, and after them how many outliers
SHORTEST_PART, LONGEST_PART = 32, 512  # positions
PARTS = 16  # between the two: 16 parts of 32 heads fill 132 multiprocessors four times
COUNTERS = 1024  # numbers after the marks of rows that have outliers of their own


@dataclass(frozen=True)
class SplitVector(Tensors):
    """One token's activations for an int8 product: codes, and beside them the values that keep their 16 bits.

    `codes`: int8 (in,), 0 at an outlier. `absmax`: float32 (1,) over the values below the threshold, infinite where a
    value is not finite. `count`: int32 (1,) outliers, whose positions and values are the first entries, in any order,
    of `index` int32 and `value` float32 (in, or LISTED if that is more).
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    count: torch.Tensor
    index: torch.Tensor
    value: torch.Tensor

    @classmethod
    def empty(cls, width: int, device: str) -> SplitVector:
        sizes = width, 1, 1, max(width, LISTED), max(width, LISTED)
        types = torch.int8, torch.float32, torch.int32, torch.int32, torch.float32
        return cls(*(torch.zeros(size, dtype=kind, device=device) for size, kind in zip(sizes, types, strict=True)))


@dataclass(frozen=True)
class NotedVector(Tensors):
    """One token's 16-bit activations for an int8 product that makes the codes itself, from what their writers noted.

    `x`: (in,). `threshold`: as for `reference.split`. `tally`: int32 (TALLY,), emptied before they are written: PEAKS
    numbers, the bits of non-negative float32 values, of which the largest is the `absmax` of a SplitVector, then the
    `count`; `index` and `value` as there.
    """

    x: torch.Tensor
    threshold: float
    tally: torch.Tensor
    index: torch.Tensor
    value: torch.Tensor

    @property
    def count(self) -> torch.Tensor:
        return self.tally[PEAKS : PEAKS + 1]

    @classmethod
    def empty(cls, x: torch.Tensor, threshold: float, tally: torch.Tensor) -> NotedVector:
        """Note what is written into `x` in `tally`, which several vectors may have side by side."""
        numbers = torch.zeros(2, max(len(x), LISTED), dtype=torch.int32, device=x.device)
        return cls(x, threshold, tally, numbers[0], numbers[1].view(torch.float32))


@dataclass(frozen=True)
class Noting:
    """What is noted of a call's rows while they are written. `threshold`: float for LLM.int8(), None where they keep
    their 16 bits. `outlier_marks`: int8 zeros, at least (in,): the columns that are multiplied in 16 bit become 1, then
    or at the latest in `linear_rows`. `used`: None, or int32 (1,): so many rows are the prompt's, and outliers are
    looked for in those alone.

    `by_row`: each row has outliers of its own, as if it were alone in the call. `outlier_marks` is then int32 zeros, at
    least (in + COUNTERS,): its last COUNTERS numbers are the kernels' own, the first of them counts the marked columns.
    """

    threshold: float | None = None
    outlier_marks: torch.Tensor | None = None
    used: torch.Tensor | None = None
    by_row: bool = False


@dataclass(frozen=True)
class Rows:
    """Activations of a call, (rows, in), on their way into linear layers.

    `threshold`, `by_row`: as in `Noting`. With a threshold an implementation may note what it saw while it wrote `x`:
    `absmax` float32 (rows,) over the values below the threshold, and `outlier_marks`; by row also the `codes`, int8
    (rows, in), and `columns`, int32 (in,), of which the first are the marked ones, in no particular order.
    """

    x: torch.Tensor
    threshold: float | None = None
    absmax: torch.Tensor | None = None
    outlier_marks: torch.Tensor | None = None
    by_row: bool = False
    codes: torch.Tensor | None = None
    columns: torch.Tensor | None = None


@dataclass(frozen=True)
class Cache(Tensors):
    """Keys and values of one layer. `keys`, `values`: (kv_heads, capacity, head_dim), of several sequences
    (sequences, kv_heads, capacity, head_dim)."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class Partials(Tensors):
    """Attention over parts of the context, to be combined: float32 `sums` (heads, parts, head_dim), `peaks` and
    `weights` (heads, parts), the largest score and the sum of exponentials of each part; `arrived`: int32 (heads,),
    how many parts of this token are done, 0 between two tokens.

    Of several sequences, the heads of each in turn; `sequence_parts`, int32 (sequences,), then stands for `part`, so
    that the sums of each are in the order in which they are alone.
    """

    sums: torch.Tensor
    peaks: torch.Tensor
    weights: torch.Tensor
    arrived: torch.Tensor
    part: int  # positions in one part
    sequence_parts: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, heads: int, head_dim: int, capacity: int, device: str, *, part: int | None = None, sequences: int = 0
    ) -> Partials:
        """Cut `capacity` positions into parts, of `part` positions each or of as many as suit one sequence; for one
        sequence, or with a part of its own for each of several `sequences`."""
        part, rows = part or part_of(capacity), heads * max(1, sequences)
        parts = -(-capacity // part)
        peaks, weights = torch.empty(2, rows, parts, device=device)
        arrived = torch.zeros(rows, dtype=torch.int32, device=device)
        own = torch.full((sequences,), part, dtype=torch.int32, device=device) if sequences else None
        return cls(torch.empty(rows, parts, head_dim, device=device), peaks, weights, arrived, part, own)


def part_of(capacity: int) -> int:
    """Return how many positions of a context are one part."""
    return min(max(SHORTEST_PART, capacity // PARTS), LONGEST_PART)
