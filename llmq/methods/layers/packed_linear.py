"""A linear layer whose weight is codes of a few bits in groups, unpacked and multiplied in floating point.

A group of consecutive inputs of one output row shares a scale and a zero-point: w is about (code - zero) · scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from llmq.errors import BadChoice
from llmq.methods.ranges import scale_and_zero


@dataclass(frozen=True)
class Grid:
    """The numbers that `bits` can say within a group of `group` inputs (0: the whole row; a last group may be
    shorter), over a range of the group's weights (`ranges`). 0 is one of them, exactly."""

    bits: int
    group: int
    range: str = "minmax"

    def groups(self, columns: int) -> int:
        """How many groups a row of `columns` inputs has."""
        return -(-columns // (self.group or columns))

    def of(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale, float16, and zero-point, uint8, (out, groups) each, of a weight (out, in). Codes are made with the
        scale as it is stored."""
        if not weight.isfinite().all():
            raise BadChoice("a weight is infinite or not a number: nothing can be rounded to it")
        out, columns = weight.shape
        groups = self.groups(columns)
        padded = functional.pad(weight, (0, groups * (self.group or columns) - columns)).view(out, groups, -1)
        scale, zero = scale_and_zero(padded, self.bits, self.range)
        return scale, zero.to(torch.uint8)

    def spread(self, values: torch.Tensor, columns: int) -> torch.Tensor:
        """(out, groups) -> (out, columns): to every input its group's value."""
        return values.repeat_interleave(self.group or columns, 1)[:, :columns]

    def round(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """The nearest codes, in the dtype of `weight`; `scale` and `zero` broadcast against it."""
        return (torch.round(weight / scale.to(weight.dtype)) + zero).clamp(0, 2**self.bits - 1)

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """The numbers of the grid that are nearest to `weight` (out, in), in its dtype."""
        scale, zero = (self.spread(values.to(weight.dtype), weight.shape[1]) for values in self.of(weight))
        return (self.round(weight, scale, zero) - zero) * scale


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(out, in) codes below 2^bits -> uint8 (out, ceil(in / 8) · bits): eight codes in `bits` bytes, the first code in
    the lowest bits."""
    out, columns = codes.shape
    eights = functional.pad(codes.long(), (0, -columns % 8)).view(out, -1, 8)
    words = (eights << bits * torch.arange(8, device=codes.device)).sum(2)
    return ((words[..., None] >> 8 * torch.arange(bits, device=codes.device)) & 255).to(torch.uint8).view(out, -1)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The codes that `pack` packed: uint8 (out, columns)."""
    if bits == 8:
        return packed[:, :columns]
    places = bits * torch.arange(8, device=packed.device)
    byte, shift = places // 8, (places % 8).to(torch.int32)
    rows = functional.pad(packed.view(packed.shape[0], -1, bits), (0, 1)).int()
    found = (rows[..., byte] | rows[..., byte + 1] << 8) >> shift
    return (found & 2**bits - 1).to(torch.uint8).view(packed.shape[0], -1)[:, :columns]


class PackedLinear(nn.Linear):
    """`weight`: uint8, packed codes; `scale`: float16 and `zero`: uint8, (out, groups); `factors`: (in,) of the input's
    dtype, which it is divided by and the weight was multiplied by, or None. `owners`: int64 (in,), the group of every
    input where a group's inputs are no neighbours, or None.

    Scales are no buffers, so that bytes of weights and of scales stay apart. A subclass of `nn.Linear`, so that hooks
    find it among the linear layers.
    """

    factors: torch.Tensor | None = None
    owners: torch.Tensor | None = None

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: Grid, bias):
        self._hold(pack(codes, grid.bits), codes.shape[1], scale, zero, grid, bias)

    @classmethod
    def over(cls, packed: torch.Tensor, columns: int, *rest) -> PackedLinear:
        """A layer of `columns` inputs over codes that are packed already; the rest as in the constructor."""
        made = cls.__new__(cls)
        made._hold(packed, columns, *rest)
        return made

    def _hold(self, packed: torch.Tensor, columns: int, scale: torch.Tensor, zero: torch.Tensor, grid: Grid, bias):
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape[0], columns
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scale, self.zero, self.grid, self.bias = scale, zero, grid, bias

    @property
    def scale_bytes(self) -> int:
        return sum(t.nbytes for t in (self.scale, self.zero, self.factors, self.owners) if t is not None)

    def dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the codes stand for, (out, in)."""
        codes = unpack(self.weight, self.grid.bits, self.in_features)
        zero, scale = map(self._spread, (self.zero, self.scale))
        return (codes.to(dtype) - zero.to(dtype)) * scale.to(dtype)

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        return self.grid.spread(values, self.in_features) if self.owners is None else values[:, self.owners]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), in the dtype of `x`."""
        return functional.linear(x if self.factors is None else x / self.factors, self.dense(x.dtype), self.bias)


def packed_bytes(shape: tuple[int, int], bits: int) -> int:
    """Bytes of the codes of a weight of `shape` (out, in)."""
    return shape[0] * -(-shape[1] // 8) * bits
