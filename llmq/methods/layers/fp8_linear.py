"""A linear layer of E4M3 weights and activations: the FP8 units of a GPU, and their emulation elsewhere."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
TILE = 16  # torch._scaled_mm takes multiples of it


@cache
def has_fp8_units(device: str) -> bool:
    """Whether a CUDA device multiplies E4M3 itself: compute capability 8.9 or more."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Linear(nn.Linear):
    """`weight`: E4M3 (out, in); `scale`: float32 (out, 1), or (1, 1) for the tensor. The scale is no buffer, so that
    bytes of weights and of scales stay apart."""

    def __init__(self, linear: nn.Linear, *, by_row: bool):
        self._hold(*rounded(linear.weight.data, by_row=by_row), linear.bias, by_row)

    @classmethod
    def over(cls, codes: torch.Tensor, scale: torch.Tensor, bias: nn.Parameter | None, *, by_row: bool) -> Fp8Linear:
        """A layer of these codes and scales."""
        made = cls.__new__(cls)
        made._hold(codes, scale, bias, by_row)
        return made

    def _hold(self, codes: torch.Tensor, scale: torch.Tensor, bias: nn.Parameter | None, by_row: bool):
        nn.Module.__init__(self)
        self.out_features, self.in_features = codes.shape
        self.weight, self.scale = nn.Parameter(codes, requires_grad=False), scale
        self.bias, self.by_row = bias, by_row

    @property
    def scale_bytes(self) -> int:
        return self.scale.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        codes, scale = rounded(x.reshape(-1, self.in_features), by_row=self.by_row)
        whole = self.in_features % TILE == self.out_features % TILE == 0
        if x.is_cuda and whole and has_fp8_units(str(x.device)):
            y = torch._scaled_mm(codes, self.weight.T, scale, self.scale.T, out_dtype=torch.bfloat16)
        else:
            y = functional.linear(codes.float(), self.weight.float()) * scale * self.scale.T
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


def rounded(x: torch.Tensor, *, by_row: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) -> E4M3 codes and scale, float32 (rows, 1) or (1, 1): x is about codes · scale."""
    x = x.float()
    scale = scale_of(x, by_row=by_row)
    return codes_of(x, scale), scale


def scale_of(x: torch.Tensor, *, by_row: bool) -> torch.Tensor:
    """The scale of `rounded`, which brings the largest number to 448."""
    absmax = x.abs().amax(1, keepdim=True) if by_row else torch.stack(x.aminmax()).abs().amax().view(1, 1)
    return torch.where(absmax > 0, absmax / LARGEST, 1.0)


def codes_of(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The codes of `rounded`, by a scale that is known."""
    return (x / scale).clamp(-LARGEST, LARGEST).to(E4M3)
