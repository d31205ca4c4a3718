"""Naive 8 bit, without a decomposition: what LLM.int8() is measured against. Emulated: right numbers, no speed.

absmax: Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339, section 2.1, one scale a tensor. Vector-wise: section 3.1,
one scale for each row of the activations and each output row of the weight. Both round to nearest in [-127, 127].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmq.errors import BadChoice
from llmq.quant.handler import WeightBytes, cast_parameters_, int8_bytes, linear_layers, replace_linears_

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Naive:
    """`vectorwise`: a scale a row, else one a tensor. `weights`, `activations`: which of the two are in 8 bit; the
    other stays in FP32, as everything else does."""

    vectorwise: bool
    weights: bool = True
    activations: bool = True
    has_threshold = False
    default_threshold = None
    dtype = "float32"
    lean_weights = None
    int8_head = False
    opens_int8 = False
    converts = True

    def check_threshold(self, threshold: float) -> None:
        raise BadChoice(f"naive 8 bit has no outlier threshold to set to {threshold}")

    def arithmetic(self, device: str, loop: str = "hf") -> str:
        weights = "int8 linear weights" if self.weights else "FP32 linear weights"
        activations = "int8 activations" if self.activations else "FP32 activations"
        scales = "one scale a row" if self.vectorwise else "one scale a tensor"
        return f"emulated, so its speed means nothing: {weights}, {activations}, {scales}; codes multiplied in FP32"

    def load_arguments(self, device: str) -> dict[str, Any]:
        import torch

        return {"dtype": torch.float32, "device_map": {"": device}}

    def convert_(self, model: nn.Module, device: str) -> nn.Module:
        """Replace every linear layer but the head by one that rounds what this method rounds."""
        import torch

        from llmq.quant.naive_linear import NaiveLinear

        cast_parameters_(model.to(device), torch.float32)
        replace_linears_(model, lambda linear: NaiveLinear.over(linear, self))
        return model.eval()

    def set_threshold(self, model: nn.Module, threshold: float) -> None:
        self.check_threshold(threshold)

    def sixteen_bit_columns(self, module: nn.Module) -> None:
        """It has none."""

    def scale_bytes(self, model: nn.Module) -> int:
        return sum(module.absmax.nbytes for module in model.modules() if getattr(module, "absmax", None) is not None)

    def predict(self, meta_model: nn.Module) -> WeightBytes:
        if not self.weights:
            return WeightBytes(int8_bytes(meta_model, int8_size=4, other_size=4).weights)
        found = int8_bytes(meta_model, other_size=4)
        return found if self.vectorwise else WeightBytes(found.weights, 4 * len(list(linear_layers(meta_model))))
