"""LLM.int8()'s arithmetic on tensors: pure functions, any device, the same codes and scales as bitsandbytes'.

Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339, section 2.1 (absmax) and 3 (vector-wise, decomposition). Codes lie
in [-127, 127]; a scale is the row's absmax, so a value is code * absmax / 127.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


class Tensors:
    """What records of tensors share: `nbytes`, of all of them."""

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))


@dataclass(frozen=True)
class Int8Weight(Tensors):
    """A linear layer's weight. `codes`: int8 (out, in), `absmax`: float32 (out,), as bitsandbytes' CB and SCB.

    Row n of the matrix it stands for is `codes[n] * absmax[n] / 127`.
    """

    codes: torch.Tensor
    absmax: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the values, each computed in float32 and rounded once, without a float32 copy of the matrix."""
        made = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        return torch.mul(self.codes, (self.absmax / 127)[:, None], out=made)


@dataclass(frozen=True)
class SplitRows:
    """Activations of one call, decomposed. `codes`: int8 (rows, in), `absmax`: float32 (rows,) over the values below
    the threshold, `columns`: int64 (outliers,) sorted; what stays in 16 bit of those columns is multiplied as it is and
    has codes of 0: all of it, or by row each row's own outliers."""

    codes: torch.Tensor
    absmax: torch.Tensor
    columns: torch.Tensor


def quantize_rows(weight: torch.Tensor) -> Int8Weight:
    """Convert (out, in) floating point -> int8 codes with one absmax per row. Rows of zeros get codes of 0."""
    weight = weight.half()  # bitsandbytes casts to FP16 first
    absmax = weight.abs().amax(1).float()
    return Int8Weight(_codes(weight, absmax), absmax)


def split_rows(x: torch.Tensor, threshold: float, *, by_row: bool = False) -> SplitRows:
    """Decompose (rows, in) floating point for one call: a column with any |x| >= threshold is an outlier; `by_row`,
    only in the rows where it reaches the threshold.

    With a threshold of 0 there are none. A row's absmax is over its own values below the threshold, also those in
    outlier columns, as in bitsandbytes.
    """
    x = x.half()
    outliers = (x.abs() >= threshold) & (threshold > 0)
    below = x.masked_fill(outliers, 0)
    absmax = below.abs().amax(1).float()
    columns = outliers.any(0).nonzero().view(-1)
    codes = _codes(below, absmax)
    if not by_row:
        codes[:, columns] = 0
    return SplitRows(codes, absmax, columns)


def own_outliers(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Return `x` with 0 wherever it is below the threshold: what `split_rows` leaves in 16 bit by row."""
    return x.masked_fill(x.abs() < threshold, 0)


def int8_linear(x: torch.Tensor, weight: Int8Weight, threshold: float) -> torch.Tensor:
    """Do LLM.int8() of (rows, in) activations: float32 (rows, out), the definition that every kernel is compared
    with."""
    split = split_rows(x, threshold)
    return split_product(split, x[:, split.columns], weight)


def split_product(split: SplitRows, outliers: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """Return the sum of the int8 and the outliers' product, float32 (rows, out). `outliers`: (rows, outliers) values.

    Computed in float64 from exact integers. The outlier columns use the dequantised int8 weights, as bitsandbytes does.
    """
    absmax = weight.absmax.double()
    integers = split.codes.double() @ weight.codes.double().T
    others = outliers.double() @ weight.codes[:, split.columns].double().T
    return (integers * split.absmax.double()[:, None] * absmax / 127**2 + others * absmax / 127).float()


def _codes(x: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    scale = torch.where(absmax > 0, 127.0 / absmax, 0.0)
    return torch.round(x * scale[:, None]).to(torch.int8)
