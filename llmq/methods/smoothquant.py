"""SmoothQuant: range moved from the activations, where outliers are, into the weights; then W8A8 with a scale a row.

Input channel j is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) and column j of the weight is multiplied by
it (equation 4): the same product, with activations that are easier to round. max|X_j| comes from calibration. An alpha
of 'auto' is searched for each layer: the one that leaves the smallest error of its output on a sample of its inputs.

The paper folds the division into the norm before, so that layers behind one norm share their factors (`folded`); else
every linear layer has factors of its own, applied to its input when it runs. Emulated: right numbers, no speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from llmq.fields import Number
from llmq.methods.base import WeightBytes
from llmq.methods.folding import FOLDED, fold_
from llmq.methods.naive import Vectorwise
from llmq.methods.swap import moved_

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmq.methods.calibrate import ChannelMaximum

SMALLEST = 1e-5  # of a channel's largest number: no factor is 0 or infinite
ALPHAS = tuple(step / 20 for step in range(21))  # that are tried
ALPHA = Number(
    0,
    1,
    optional=True,
    none="auto",
    help="How much range moves from activations to weights.",
    label="α (smoothing)",
    step=0.05,
)


@dataclass(frozen=True)
class SmoothQuant(Vectorwise):
    """W8A8 behind smoothing of strength `alpha`: 0 leaves the weights' range even, 1 the activations'; None is auto."""

    alpha: Annotated[float | None, ALPHA] = 0.5
    folded: FOLDED = False
    name, label = "smoothquant", "int8 · SmoothQuant"
    about = (
        "Activation channels are divided, and weight columns multiplied, by factors found on a calibration text; then "
        "int8 weights and activations with a scale a row. Emulated."
    )
    source = "Xiao et al. 2023, SmoothQuant, arXiv 2211.10438, section 4, equation 4"
    calibrated = True

    @property
    def calibration(self) -> str:
        return "input-sample" if self.alpha is None else "channel-maximum"

    def arithmetic(self, device: str, loop: str = "hf", cpu: str = "") -> str:
        return super().arithmetic(device, loop) + (
            "" if self.folded else "; inputs divided by smoothing factors in FP32"
        )

    def observer(self, linear: nn.Module) -> ChannelMaximum:
        from llmq.methods.calibrate import ChannelMaximum, InputSample

        return InputSample() if self.alpha is None else ChannelMaximum()

    def quantize(self, linear: nn.Linear, statistics: torch.Tensor | None = None) -> nn.Module:
        """A smoothed layer that rounds weight and input; `statistics`: largest |x| of each input channel, (in,), and,
        for a search, rows of the input below it."""
        assert statistics is not None, "SmoothQuant needs the statistics of a calibration"
        statistics = statistics.to(linear.weight.device)
        if self.alpha is not None:
            return self._smoothed(linear, statistics, self.alpha)
        largest, rows = statistics[0], statistics[1:]
        truth = rows @ linear.weight.data.float().T
        truth = truth if linear.bias is None else truth + linear.bias.data.float()
        layers = (self._smoothed(linear, largest, alpha) for alpha in ALPHAS)
        return min(layers, key=lambda layer: (layer(rows) - truth).square().sum().item())

    def quantize_(self, model: nn.Module, device: str, statistics: Mapping[str, torch.Tensor] | None = None):
        if not self.folded:
            return super().quantize_(model, device, statistics)
        fold_(moved_(model, device), self, statistics)
        return Vectorwise().quantize_(model, device)

    def _smoothed(self, linear: nn.Linear, largest_inputs: torch.Tensor, alpha: float) -> nn.Module:
        from llmq.methods.layers.naive_linear import NaiveLinear

        return NaiveLinear.over(linear, self, factors(largest_inputs, linear.weight.data.float(), alpha))

    def bytes(self, shape: tuple[int, int]) -> WeightBytes:
        plain = super().bytes(shape)
        return plain if self.folded else WeightBytes(plain.weights, plain.scales + 4 * shape[1])

    def scale_bytes(self, model: nn.Module) -> int:
        factors = (getattr(module, "factors", None) for module in model.modules())
        return super().scale_bytes(model) + sum(s.nbytes for s in factors if s is not None)


def factors(largest_inputs: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """s of equation 4, (in,), from max|X_j| (in,) and the weight (out, in); 1 for a channel that is never used."""
    largest_weights = weight.abs().amax(0)
    x, w = largest_inputs.clamp_min(SMALLEST), largest_weights.clamp_min(SMALLEST)
    return (x**alpha / w ** (1 - alpha)).masked_fill((largest_inputs == 0) | (largest_weights == 0), 1.0)
