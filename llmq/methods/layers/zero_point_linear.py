"""A linear layer that rounds its weight and its input with a scale and a zero-point each, multiplied in float32."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class ZeroPointLinear(nn.Linear):
    """`weight`: int8 codes (out, in); `scale`, `zero`: float32, of the whole weight. They are no buffers, so that bytes
    of weights and of scales stay apart."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.weight.shape
        codes, self.scale, self.zero = rounded(linear.weight.data.float())
        self.weight, self.bias = nn.Parameter(codes.to(torch.int8), requires_grad=False), linear.bias

    @property
    def scale_bytes(self) -> int:
        return self.scale.nbytes + self.zero.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out); all rows of a call share a scale and a zero-point."""
        codes, scale, zero = rounded(x.float())
        y = functional.linear(codes - zero, self.weight.float() - self.zero) * (scale * self.scale)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes in [-128, 127], still float32, scale and zero-point of a tensor: x is about (codes - zero) · scale."""
    scale, zero = scale_and_zero(x)
    return codes_of(x, scale, zero), scale, zero


def scale_and_zero(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero-point of a tensor, whose range is stretched to hold 0."""
    low, high = x.aminmax()
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = torch.where(high > low, (high - low) / 255, 1.0)
    return scale, torch.round(-low / scale) - 128


def codes_of(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """The codes of `rounded`, by a scale and a zero-point that are known."""
    return (torch.round(x / scale) + zero).clamp(-128, 127)
