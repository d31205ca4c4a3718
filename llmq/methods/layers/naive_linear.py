"""A linear layer that rounds its weight, its input, or both to 8 bit, and multiplies the codes in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from llmq.methods.naive import Naive


class NaiveLinear(nn.Linear):
    """`weight`: int8 codes (out, in) with `absmax` float32 (out, groups) or (1, 1), or the FP32 weight and None.
    `factors`: float32 (in,), which the input is divided by and the weight was multiplied by; None without smoothing.

    `absmax` is no buffer, so that bytes of weights and of scales stay apart. A subclass of `nn.Linear`, so that hooks
    find it among the linear layers.
    """

    factors: torch.Tensor | None = None

    def __init__(self, weight: torch.Tensor, absmax: torch.Tensor | None, bias: nn.Parameter | None, method: Naive):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.absmax, self.bias, self.method = absmax, bias, method

    @classmethod
    def over(cls, linear: nn.Linear, method: Naive, factors: torch.Tensor | None = None) -> NaiveLinear:
        """`linear` under `method`, on its device; behind smoothing where there are `factors`."""
        weight, absmax = linear.weight.data if factors is None else linear.weight.data.float() * factors, None
        if method.weights:
            codes, absmax = rounded(weight, method.group)
            weight = codes.to(torch.int8)
        made = cls(weight, absmax, linear.bias, method)
        made.factors = factors
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out). Without a scale a row, all rows of the call share one."""
        rows, scale = x.reshape(-1, self.in_features).float(), None
        if self.factors is not None:
            rows = rows / self.factors
        if self.method.activations:
            rows, scale = rounded(rows, self.method.group)
        if self.method.group:  # products of different groups have different scales
            y = functional.linear(self._scaled(rows, scale), self._scaled(self.weight, self.absmax))
        else:
            y = functional.linear(rows, self.weight.float())
            y = y if scale is None else y * (scale / 127)
            y = y if self.absmax is None else y * (self.absmax.T / 127)
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _scaled(self, codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
        return codes * spread(absmax / 127, self.method.group, self.in_features)


def rounded(x: torch.Tensor, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) float32 -> codes in [-127, 127], still float32, and absmax: x is about codes · absmax / 127. One
    absmax for every `group` columns of a row, (rows, groups); for a row where it is 0; for all, (1, 1), where it is
    None. Zeros get codes of 0."""
    absmax = absmax_of(x, group)
    return codes_of(x, absmax, group), absmax


def absmax_of(x: torch.Tensor, group: int | None) -> torch.Tensor:
    """The absmax of `rounded`, without the codes."""
    if group is None:
        return torch.stack(x.aminmax()).abs().amax().view(1, 1)
    width = group or x.shape[1]
    return functional.pad(x.abs(), (0, -x.shape[1] % width)).view(len(x), -1, width).amax(2)


def codes_of(x: torch.Tensor, absmax: torch.Tensor, group: int | None) -> torch.Tensor:
    """The codes of `rounded`, by an absmax that is known."""
    per_code = torch.where(absmax > 0, 127 / absmax, 0.0)
    return torch.round(x * spread(per_code, group, x.shape[1]))


def spread(values: torch.Tensor, group: int | None, columns: int) -> torch.Tensor:
    """To every column its group's value."""
    return values.repeat_interleave(group, 1)[:, :columns] if group else values
