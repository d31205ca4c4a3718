"""SmoothQuant: range moved from the activations, where outliers are, into the weights; then W8A8 with a scale a row.

Input channel j is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) and column j of the weight is multiplied by
it (equation 4): the same product, with activations that are easier to round. max|X_j| comes from calibration.

The paper folds the division into the norm before, so that layers behind one norm share their factors; here every linear
layer has factors of its own, applied to its input when it runs. Emulated: right numbers, no speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from llmq.fields import Number
from llmq.methods.base import WeightBytes
from llmq.methods.naive import Vectorwise

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmq.methods.calibrate import ChannelMaximum

SMALLEST = 1e-5  # of a channel's largest number: no factor is 0 or infinite


@dataclass(frozen=True)
class SmoothQuant(Vectorwise):
    """W8A8 behind smoothing of strength `alpha`: 0 leaves the weights' range even, 1 the activations'."""

    alpha: Annotated[
        float, Number(0, 1, help="How much range moves from activations to weights.", label="α (smoothing)", step=0.05)
    ] = 0.5
    name, label = "smoothquant", "int8 · SmoothQuant"
    about = (
        "Activation channels are divided, and weight columns multiplied, by factors found on a calibration text; then "
        "int8 weights and activations with a scale a row. Emulated."
    )
    source = "Xiao et al. 2023, SmoothQuant, arXiv 2211.10438, section 4, equation 4"
    calibrated = True
    calibration = "channel-maximum"

    def arithmetic(self, device: str, loop: str = "hf", cpu: str = "") -> str:
        return f"{super().arithmetic(device, loop)}; inputs divided by smoothing factors in FP32"

    def observer(self, linear: nn.Module) -> ChannelMaximum:
        from llmq.methods.calibrate import ChannelMaximum

        return ChannelMaximum()

    def quantize(self, linear: nn.Linear, statistics: torch.Tensor | None = None) -> nn.Module:
        """A smoothed layer that rounds weight and input; `statistics`: largest |x| of each input channel, (in,)."""
        from llmq.methods.layers.naive_linear import NaiveLinear

        assert statistics is not None, "SmoothQuant needs the statistics of a calibration"
        weight = linear.weight.data.float()
        return NaiveLinear.over(linear, self, self.factors(statistics.to(weight.device), weight))

    def factors(self, largest_inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """s of equation 4, (in,), from max|X_j| (in,) and the weight (out, in); 1 for a channel that is never used."""
        largest_weights = weight.abs().amax(0)
        x, w = largest_inputs.clamp_min(SMALLEST), largest_weights.clamp_min(SMALLEST)
        return (x**self.alpha / w ** (1 - self.alpha)).masked_fill((largest_inputs == 0) | (largest_weights == 0), 1.0)

    def bytes(self, shape: tuple[int, int]) -> WeightBytes:
        plain = super().bytes(shape)
        return WeightBytes(plain.weights, plain.scales + 4 * shape[1])

    def scale_bytes(self, model: nn.Module) -> int:
        factors = (getattr(module, "factors", None) for module in model.modules())
        return super().scale_bytes(model) + sum(s.nbytes for s in factors if s is not None)
