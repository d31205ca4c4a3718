"""AWQ: the few weights that large activations meet are scaled up before rounding, so that they lose less of themselves.

Input j is divided by s_j and column j of the weight multiplied by it (equation 4): the same product, with a finer grid
for the columns with large s. s = mean|x_j|^ratio, and the ratio is the one of a grid of 20 that leaves the smallest
error of the layer's output on a calibration text (equation 5). The error is read off the inputs' second moments:
the mean of |x (W - Q)ᵀ|² is the sum of ((W - Q) M) · (W - Q), M = mean of xᵀ x.

The paper folds the division into the norm before (`folded`), and also searches where to clip; here every linear layer
has factors of its own, applied to its input when it runs, unless they are folded, and nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.methods.base import WeightBytes
from llmq.methods.folding import FOLDED, fold_
from llmq.methods.rtn import Grouped, Rtn
from llmq.methods.swap import moved_

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmq.methods.calibrate import SecondMoments
    from llmq.methods.layers.packed_linear import PackedLinear

RATIOS = tuple(step / 20 for step in range(20))
SMALLEST = 1e-4  # no factor is below it before they are evened out


@dataclass(frozen=True)
class Awq(Grouped):
    folded: FOLDED = False
    name, label = "awq", "AWQ"
    about = (
        "Weights of a few bits, rounded to nearest after the columns that meet large activations were scaled up, by "
        "as much as serves the layer's output best on a calibration text."
    )
    source = "Lin et al. 2023, AWQ, arXiv 2306.00978, section 3.2, equations 4 and 5"
    calibrated = True
    calibration = "second-moments"
    calibration_windows = 24

    def arithmetic(self, device: str, loop: str = "hf", cpu: str = "") -> str:
        return f"{super().arithmetic(device, loop)}" + ("" if self.folded else ", divided by scaling factors")

    def observer(self, linear: nn.Module) -> SecondMoments:
        from llmq.methods.calibrate import SecondMoments

        return SecondMoments()

    def quantize(self, linear: nn.Linear, statistics: torch.Tensor | None = None) -> PackedLinear:
        """`statistics`: as `SecondMoments` collects them."""
        assert statistics is not None, "AWQ needs the statistics of a calibration"
        weight = linear.weight.data.float()
        magnitude, *_ = statistics = statistics.to(weight.device)
        tried = [factors_of(magnitude, ratio) for ratio in RATIOS]
        factors = min(tried, key=lambda factors: output_error(weight, self.nearest(weight, factors), statistics[1:]))
        layer = self.rounded(weight * factors, linear.bias)
        layer.factors = factors.to(linear.weight.dtype)
        return layer

    def nearest(self, weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """What `weight`, float32 (out, in), is rounded to under `factors` (in,)."""
        return self.grid.nearest(weight * factors) / factors

    def quantize_(self, model: nn.Module, device: str, statistics: Mapping[str, torch.Tensor] | None = None):
        if not self.folded:
            return super().quantize_(model, device, statistics)
        fold_(moved_(model, device), self, statistics)
        return Rtn(bits=self.bits, group=self.group, range=self.range).quantize_(model, device)

    def bytes(self, shape: tuple[int, int]) -> WeightBytes:
        plain = super().bytes(shape)
        return plain if self.folded else WeightBytes(plain.weights, plain.scales + 2 * shape[1])


def factors_of(magnitude: torch.Tensor, ratio: float) -> torch.Tensor:
    """s, (in,): mean|x_j|^ratio, evened out so that the largest times the smallest is 1."""
    factors = magnitude.pow(ratio).clamp_min(SMALLEST)
    return factors / (factors.amax() * factors.amin()).sqrt()


def output_error(weight: torch.Tensor, rounded: torch.Tensor, moments: torch.Tensor) -> float:
    """The mean of |x (W - Q)ᵀ|² over the calibration's inputs x, both weights (out, in)."""
    lost = weight - rounded
    return ((lost @ moments) * lost).sum().item()
