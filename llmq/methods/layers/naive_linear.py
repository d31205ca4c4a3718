"""A linear layer that rounds its weight, its input, or both to 8 bit, and multiplies the codes in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from llmq.methods.naive import Naive


class NaiveLinear(nn.Linear):
    """`weight`: int8 codes (out, in) with `absmax` float32 (out, 1) or (1, 1), or the FP32 weight with `absmax` None.

    `absmax` is no buffer, so that bytes of weights and of scales stay apart. A subclass of `nn.Linear`, so that hooks
    find it among the linear layers.
    """

    def __init__(self, weight: torch.Tensor, absmax: torch.Tensor | None, bias: nn.Parameter | None, method: Naive):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.absmax, self.bias, self.method = absmax, bias, method

    @classmethod
    def over(cls, linear: nn.Linear, method: Naive) -> NaiveLinear:
        """`linear` under `method`, on its device."""
        if not method.weights:
            return cls(linear.weight.data, None, linear.bias, method)
        codes, absmax = rounded(linear.weight.data, by_row=method.by_row)
        return cls(codes.to(torch.int8), absmax, linear.bias, method)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out). Without a scale a row, all rows of the call share one."""
        rows, scale = x.reshape(-1, self.in_features).float(), None
        if self.method.activations:
            rows, scale = rounded(rows, by_row=self.method.by_row)
            scale = scale / 127
        y = functional.linear(rows, self.weight.float())
        if scale is not None:
            y = y * scale
        if self.absmax is not None:
            y = y * (self.absmax.T / 127)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


class SmoothedLinear(NaiveLinear):
    """A `NaiveLinear` whose input is divided by `factors` (in,) float32, and whose weight was multiplied by them."""

    factors: torch.Tensor

    @classmethod
    def smooth(cls, linear: nn.Linear, method: Naive, factors: torch.Tensor) -> SmoothedLinear:
        """`linear` under `method` behind smoothing, on its device."""
        codes, absmax = rounded(linear.weight.data.float() * factors, by_row=method.by_row)
        made = cls(codes.to(torch.int8), absmax, linear.bias, method)
        made.factors = factors
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x / self.factors)


def rounded(x: torch.Tensor, *, by_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) float32 -> codes in [-127, 127], still float32, and absmax (rows, 1) or (1, 1): x is about
    codes · absmax / 127. Zeros get codes of 0."""
    absmax = x.abs().amax(1, keepdim=True) if by_row else x.abs().amax().view(1, 1)
    return torch.round(x * torch.where(absmax > 0, 127 / absmax, 0.0)), absmax
