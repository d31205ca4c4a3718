"""Naive 8 bit, without a decomposition: what LLM.int8() is measured against. Emulated: right numbers, no speed.

absmax: Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339, section 2.1, one scale a tensor. Vector-wise: section 3.1,
one scale for each row of the activations and each output row of the weight. Both round to nearest in [-127, 127].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from llmq.methods.base import Method, WeightBytes
from llmq.methods.rounding import Rounding, Symmetric

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Naive(Method):
    """`group`: how many numbers of a row share a scale; 0 a whole row, None the tensor. `weights`, `activations`: which
    of the two are in 8 bit; the other stays in FP32, as everything else does."""

    dtype = "float32"
    emulated = True
    group: ClassVar[int | None] = None
    weights = activations = True

    def arithmetic(self, device: str, loop: str = "hf", cpu: str = "") -> str:
        weights = "int8 linear weights" if self.weights else "FP32 linear weights"
        activations = "int8 activations" if self.activations else "FP32 activations"
        scales = "one scale a tensor" if self.group is None else "one scale a row"
        scales = f"one scale for {self.group} numbers of a row" if self.group else scales
        return f"emulated, so its speed means nothing: {weights}, {activations}, {scales}; codes multiplied in FP32"

    def quantize(self, linear: nn.Linear, statistics: torch.Tensor | None = None) -> nn.Module:
        """A layer that rounds what this method rounds."""
        from llmq.methods.layers.naive_linear import NaiveLinear

        return NaiveLinear.over(linear, self)

    def rounding(self, *, weight: bool) -> Rounding | None:
        return Symmetric(self.group) if (self.weights if weight else self.activations) else None

    def bytes(self, shape: tuple[int, int]) -> WeightBytes:
        groups = 1 if self.group is None else shape[0] * -(-shape[1] // (self.group or shape[1]))
        return WeightBytes(shape[0] * shape[1] * self.bits // 8, 4 * groups if self.weights else 0)


@dataclass(frozen=True)
class Vectorwise(Naive):
    name, label = "vectorwise", "int8, a scale a row"
    about = (
        "Int8 weights and activations, one scale a row of each, outliers and all: LLM.int8() without its "
        "decomposition. Emulated."
    )
    source = "Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 3.1"
    group = 0


@dataclass(frozen=True)
class Absmax(Naive):
    name, label = "absmax", "int8, a scale a tensor"
    about = "Int8 weights and activations with one scale for a whole tensor, which its largest number sets. Emulated."
    source = "Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 2.1"


@dataclass(frozen=True)
class AbsmaxW8A32(Absmax):
    name, label = "absmax-w8a32", "int8 weights, a scale a tensor"
    about = "Only the weights in int8, one scale a tensor; activations in FP32. Emulated."
    activations = False


@dataclass(frozen=True)
class AbsmaxW32A8(Absmax):
    name, label = "absmax-w32a8", "int8 activations, a scale a tensor"
    about = "Only the activations in int8, one scale a tensor; weights in FP32. Emulated."
    weights, bits = False, 32
