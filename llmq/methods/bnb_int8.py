"""LLM.int8() as bitsandbytes implements it, through transformers' own integration.

What bitsandbytes does with it: every linear weight but the head is int8 with one scale per output row; a column of the
input that holds any |x| >= threshold is multiplied in FP16 against the *dequantised* int8 weights; the rest goes
through an int8 product. No calibration data is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from llmq.methods.base import DEFAULT_THRESHOLD, THRESHOLD, Method

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class BnbInt8(Method):
    """LLM.int8() by bitsandbytes; a `threshold` of 0 turns the decomposition off."""

    threshold: Annotated[float, THRESHOLD] = DEFAULT_THRESHOLD
    name, label = "bnb-int8", "int8 · bitsandbytes"
    about = (
        "Int8 weights with one scale per row, int8 activations with one scale per token; activation columns that "
        "reach the threshold are multiplied in FP16."
    )
    source = "Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 3"
    opens_int8 = True
    live = frozenset({"threshold"})

    def arithmetic(self, device: str, loop: str = "hf", cpu: str = "") -> str:
        """On a CPU bitsandbytes multiplies in int8 where there is AVX-512, and in FP32 elsewhere."""
        products = "int8 products summed in int32"
        if device.startswith("cpu") and cpu != "AVX512":
            products = "int8 products done as FP32 matrix products" if cpu else "int8 products"
        return f"int8 linear weights, FP16 embedding, norms and head; {products}; outlier columns in FP16"

    def load_arguments(self, device: str) -> dict[str, Any]:
        """On a GPU bitsandbytes quantizes weight by weight on the way in, so that the 16-bit model is never there
        whole. On a CPU it takes 42 ms a weight for what our compiled kernel does in 3 (the demo model), so there
        `quantize` makes the codes: the same, bit for bit."""
        from transformers import BitsAndBytesConfig

        arguments = super().load_arguments(device)
        if device.startswith("cpu"):
            return arguments
        # bitsandbytes casts every input to FP16, so the rest of the model is FP16 too.
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=DEFAULT_THRESHOLD)
        return arguments | {"quantization_config": config}

    def quantize(self, linear: nn.Linear, statistics: torch.Tensor | None = None) -> nn.Module:
        """A Linear8bitLt with the codes and scales of `linear`; one that is there already stays, but for a threshold of
        its own."""
        import bitsandbytes as bnb
        import torch

        from llmq.methods.layers.int8_linear import int8_weight

        if isinstance(linear, bnb.nn.Linear8bitLt):
            linear.state.threshold = DEFAULT_THRESHOLD
            return linear
        made = int8_weight(linear.weight)
        with torch.device("meta"):
            int8 = bnb.nn.Linear8bitLt(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                has_fp16_weights=False,
                threshold=DEFAULT_THRESHOLD,
            )
        int8.weight = bnb.nn.Int8Params(
            made.codes, requires_grad=False, has_fp16_weights=False, CB=made.codes, SCB=made.absmax
        )
        int8.bias = linear.bias
        return int8.eval()

    def apply_(self, model: nn.Module) -> None:
        for layer in int8_linears(model):
            layer.state.threshold = self.threshold

    def outlier_columns(self, module: nn.Module) -> torch.Tensor | None:
        """bitsandbytes' own list, `state.idx`: made new in each call, and None where a call found no outlier. With the
        decomposition off a call leaves it as an earlier one made it."""
        import bitsandbytes as bnb
        import torch

        if not isinstance(module, bnb.nn.Linear8bitLt):
            return None
        found = module.state.idx if module.state.threshold > 0 else None
        return torch.empty(0, dtype=torch.int64) if found is None else found.long().sort().values

    def scale_bytes(self, model: nn.Module) -> int:
        """bitsandbytes keeps the row scales as attributes; before the first call on the weight, then on the state."""
        scales = (m.state.SCB if m.state.SCB is not None else m.weight.SCB for m in int8_linears(model))
        return sum(scale.nbytes for scale in scales)


def int8_linears(model: nn.Module) -> Iterator[nn.Module]:
    """The bitsandbytes int8 linear layers of a loaded model."""
    import bitsandbytes as bnb

    return (module for module in model.modules() if isinstance(module, bnb.nn.Linear8bitLt))
