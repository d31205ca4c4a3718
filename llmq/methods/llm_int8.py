"""LLM.int8() and int8 weight-only, our own: bitsandbytes' codes and scales, multiplied by `llmq.kernels`.

With int8 weights the decomposition needs no second matrix: an outlier activation keeps its 16 bits and meets the same
int8 weight as everybody else. The paper's formula lets it meet the 16-bit weight: `outlier_weights=16` does, with that
weight beside the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from llmq.fields import Choice
from llmq.methods.base import DEFAULT_THRESHOLD, THRESHOLD, Method, WeightBytes
from llmq.methods.rounding import Decomposed, Rounding, Symmetric

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Int8Weights(Method):
    """Int8 weights with one scale a row, in the form our own loops take."""

    packed = "int8"  # FP16 activations: bitsandbytes casts to FP16 before it quantizes, and the codes must be the same
    opens_int8 = True

    @property
    def _stored(self) -> str:
        rest = "FP16 norms" if self.int8_head else "FP16 embedding, norms and head"
        return f"int8 {'embedding, linear and head' if self.int8_head else 'linear'} weights, {rest}"

    def quantize(self, linear: nn.Linear, statistics: torch.Tensor | None = None) -> nn.Module:
        """A layer over the codes of `linear`: its own where it has them."""
        from llmq.methods.layers.int8_linear import Int8Linear

        return Int8Linear.over(linear, self.threshold)


@dataclass(frozen=True)
class LlmInt8(Int8Weights):
    """LLM.int8(): int8 activations too, with outlier columns apart; a `threshold` of 0 turns the decomposition off.
    `outlier_weights`: bits of the weights that outliers meet. `outliers`: of a call, whose rows pool their columns as
    in the paper, or of each row, which then depends on no other."""

    threshold: Annotated[float, THRESHOLD] = DEFAULT_THRESHOLD
    outlier_weights: Annotated[
        str,
        Choice(
            ("8", "16"),
            ("8 bit", "16 bit"),
            help="Bits of the weights that outlier columns meet.",
            label="Outliers meet weights of",
        ),
    ] = "8"
    outliers: Annotated[
        str,
        Choice(
            ("call", "row"),
            ("of all tokens of a call", "of each token"),
            help="Whose outliers a column keeps in 16 bit: a call's tokens pool theirs, or each has its own.",
            label="Outlier columns",
        ),
    ] = "call"
    name, label = "llm-int8", "int8 · ours"
    about = (
        "The same codes, scales and outliers as bitsandbytes, in kernels that never wait for the host: an outlier "
        "keeps its 16 bits and meets the same int8 weight."
    )
    source = "Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 3"
    live = frozenset({"threshold", "outliers"})

    @property
    def packed(self) -> str | None:
        """Our loops keep no second matrix."""
        return "int8" if self.outlier_weights == "8" else None

    @property
    def opens_int8(self) -> bool:
        """An int8 checkpoint has no second matrix, either."""
        return self.outlier_weights == "8"

    def arithmetic(self, device: str, loop: str = "hf", cpu: str = "") -> str:
        outliers = "keep FP16" if self.outlier_weights == "8" else "and the weights they meet keep FP16"
        whose = "each row's outliers" if self.by_row else "outliers"
        return f"{self._stored}; int8 products summed exactly in integers; {whose} {outliers}, summed with them"

    @property
    def by_row(self) -> bool:
        return self.outliers == "row"

    def quantize(self, linear: nn.Linear, statistics: torch.Tensor | None = None) -> nn.Module:
        from llmq.methods.layers.int8_linear import ExactOutliersLinear

        if self.outlier_weights == "8":
            return super().quantize(linear)
        return ExactOutliersLinear.over(linear, self.threshold)

    def bytes(self, shape: tuple[int, int]) -> WeightBytes:
        codes = super().bytes(shape)
        return codes if self.outlier_weights == "8" else WeightBytes(3 * codes.weights, codes.scales)

    def rounding(self, *, weight: bool) -> Rounding:
        return Symmetric(0) if weight else Decomposed(self.threshold, self.by_row)

    def apply_(self, model: nn.Module) -> None:
        from llmq.methods.layers.int8_linear import Int8Linear

        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.threshold, module.by_row = self.threshold, self.by_row

    def outlier_columns(self, module: nn.Module) -> torch.Tensor | None:
        """What the kernel marked in the last call."""
        marks = getattr(module, "outlier_marks", None)
        return None if marks is None else marks.nonzero().view(-1)


@dataclass(frozen=True)
class Int8WeightOnly(Int8Weights):
    """Int8 weights; activations keep their 16 bits."""

    name, label = "int8-weight-only", "int8 weights only"
    about = "Int8 weights with one scale per row; activations stay in FP16, so there is nothing to decompose."
    source = "the weights of Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 3.1"

    def arithmetic(self, device: str, loop: str = "hf", cpu: str = "") -> str:
        kept = "FP32" if device.startswith("cpu") and loop == "lean" else "FP16"
        return f"{self._stored}; {kept} activations, products summed in FP32"


@dataclass(frozen=True)
class LlmInt8Head(LlmInt8):
    """LLM.int8() whose embedding and head are int8 as well."""

    name, label = "llm-int8-head", "int8 · ours, head too"
    about = (
        "LLM.int8() with embedding and head in int8 as well, so that the weights are really half of FP16's; they "
        "usually stay in FP16."
    )
    int8_head = True
