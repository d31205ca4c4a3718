"""FP8: weights and activations in 8-bit floating point, E4M3: 4 bits of exponent, 3 of significand, up to 448.

A floating-point format has steps as fine as its numbers are small, so an outlier costs the others less than in int8;
near the largest number a step is 1/14 of it, where int8 has 1/127. Activations get their scales when they come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from llmq.devices import first
from llmq.fields import Choice
from llmq.methods.base import Method, WeightBytes
from llmq.methods.rounding import Float8, Rounding

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Fp8(Method):
    """E4M3 with a scale a `row` of each, or one a `tensor`; the products of a GPU's FP8 units where it has them."""

    scale: Annotated[
        str, Choice(("row", "tensor"), ("a row", "a tensor"), help="What shares a scale.", label="A scale for")
    ] = "row"
    name, label = "fp8", "FP8 (E4M3)"
    about = "Weights and activations in 8-bit floating point (E4M3), scaled to its largest number, 448."
    source = "Micikevicius et al. 2022, FP8 formats for deep learning, arXiv 2209.05433, section 3"
    dtype = "bfloat16"

    def arithmetic(self, device: str, loop: str = "hf", cpu: str = "") -> str:
        stored = f"E4M3 linear weights and activations, a scale a {self.scale}"
        if self.emulated_on(device):
            return f"{stored}; emulated, so its speed means nothing: multiplied in FP32"
        return f"{stored}; FP8 products summed in FP32"

    def emulated_on(self, device: str) -> bool:
        if device.startswith("cpu"):
            return True
        from llmq.methods.layers.fp8_linear import has_fp8_units

        return not has_fp8_units(first(device))

    def quantize(self, linear: nn.Linear, statistics: torch.Tensor | None = None) -> nn.Module:
        """A layer of E4M3 weights that rounds its input."""
        from llmq.methods.layers.fp8_linear import Fp8Linear

        return Fp8Linear(linear, by_row=self.scale == "row")

    def rounding(self, *, weight: bool) -> Rounding:
        return Float8(self.scale == "row")

    def bytes(self, shape: tuple[int, int]) -> WeightBytes:
        return WeightBytes(shape[0] * shape[1], 4 * (shape[0] if self.scale == "row" else 1))

    def scale_bytes(self, model: nn.Module) -> int:
        return sum(getattr(module, "scale_bytes", 0) for module in model.modules())
