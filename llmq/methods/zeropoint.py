"""Zero-point (asymmetric) int8: 255 steps from the smallest number of a tensor to the largest. Emulated.

With scale = (max - min) / 255 a number is code = round(x / scale) + zero, zero = round(-min / scale) - 128, in
[-128, 127], and comes back as (code - zero) · scale. The range is stretched to hold 0, which then is a code exactly.
The paper (section 2.1) writes the same with nd = 255 / (max - min); its zero-point nd · min is negated there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.methods.base import Method, WeightBytes
from llmq.methods.rounding import Affine, Rounding

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class ZeroPoint(Method):
    name, label = "zeropoint", "int8, zero-point"
    about = (
        "Int8 weights and activations with one scale and one zero-point for a whole tensor, from its smallest number "
        "to its largest: no code is wasted where numbers are mostly of one sign. Emulated."
    )
    source = "Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 2.1"
    dtype = "float32"
    emulated = True

    def arithmetic(self, device: str, loop: str = "hf", cpu: str = "") -> str:
        return (
            "emulated, so its speed means nothing: int8 linear weights, int8 activations, one scale and zero-point a "
            "tensor; multiplied in FP32"
        )

    def quantize(self, linear: nn.Linear, statistics: torch.Tensor | None = None) -> nn.Module:
        """A layer that rounds its weight and its input."""
        from llmq.methods.layers.zero_point_linear import ZeroPointLinear

        return ZeroPointLinear(linear)

    def rounding(self, *, weight: bool) -> Rounding:
        return Affine()

    def bytes(self, shape: tuple[int, int]) -> WeightBytes:
        return WeightBytes(shape[0] * shape[1], 8)

    def scale_bytes(self, model: nn.Module) -> int:
        return sum(getattr(module, "scale_bytes", 0) for module in model.modules())
