"""LLM.int8() and int8 weight-only, our own: bitsandbytes' codes and scales, multiplied by `llmq.kernels`.

Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339, section 3. With int8 weights the decomposition needs no second
matrix: an outlier activation keeps its 16 bits and meets the same int8 weight as everybody else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmq.errors import BadChoice
from llmq.quant.handler import DEFAULT_THRESHOLD, WeightBytes, cast_parameters_, int8_bytes, replace_linears_

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class LlmInt8:
    """`has_threshold`: LLM.int8(), int8 activations with outliers apart; without: activations stay in FP16.
    `int8_head`: embedding and head are int8 as well."""

    has_threshold: bool
    int8_head: bool = False
    dtype = "float16"  # bitsandbytes casts to FP16 before it quantizes, and the codes must be the same
    lean_weights = "int8"
    opens_int8 = True
    converts = True

    @property
    def default_threshold(self) -> float | None:
        return DEFAULT_THRESHOLD if self.has_threshold else None

    def check_threshold(self, threshold: float) -> None:
        if not self.has_threshold:
            raise BadChoice(f"int8-weight-only has no outlier threshold to set to {threshold}")

    def arithmetic(self, device: str, loop: str = "hf") -> str:
        rest = "FP16 norms" if self.int8_head else "FP16 embedding, norms and head"
        stored = f"int8 {'embedding, linear and head' if self.int8_head else 'linear'} weights, {rest}"
        on_cpu = device.startswith("cpu")
        if not self.has_threshold:
            kept = "FP32" if on_cpu and loop == "lean" else "FP16"
            return f"{stored}; {kept} activations, products summed in FP32"
        products = "done as FP32 matrix products" if on_cpu and loop == "hf" else "summed exactly in integers"
        return f"{stored}; int8 products {products}; outliers keep FP16, summed with them"

    def load_arguments(self, device: str) -> dict[str, Any]:
        import torch

        return {"dtype": torch.float16, "device_map": {"": device}}

    def convert_(self, model: nn.Module, device: str) -> nn.Module:
        """Replace every linear layer but the head by one over int8 codes; out of an int8 checkpoint, what is int8."""
        import torch

        from llmq.quant.int8_linear import Int8Linear, convert_ends_

        opened = Int8Linear.opened(model)  # such a model is where it belongs, and may not be moved
        cast_parameters_(model if opened else model.to(device), torch.float16)
        replace_linears_(model, lambda linear: Int8Linear.over(linear, self.default_threshold), opened or None)
        if self.int8_head:
            convert_ends_(model, self.default_threshold)
        return model.eval()

    def set_threshold(self, model: nn.Module, threshold: float) -> None:
        self.check_threshold(threshold)
        for linear in _int8_linears(model):
            linear.threshold = threshold

    def sixteen_bit_columns(self, module: nn.Module) -> torch.Tensor | None:
        """What the kernel marked in the last call."""
        from llmq.quant.int8_linear import Int8Linear

        if not isinstance(module, Int8Linear) or module.marks is None or module.threshold is None:
            return None
        return module.marks.nonzero().view(-1)

    def scale_bytes(self, model: nn.Module) -> int:
        scales = {id(module.absmax): module.absmax for module in model.modules() if hasattr(module, "absmax")}
        return sum(scale.nbytes for scale in scales.values())

    def predict(self, meta_model: nn.Module) -> WeightBytes:
        return int8_bytes(meta_model, head=self.int8_head)


def _int8_linears(model: nn.Module) -> Iterator[nn.Module]:
    from llmq.quant.int8_linear import Int8Linear

    return (module for module in model.modules() if isinstance(module, Int8Linear))
