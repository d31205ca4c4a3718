"""LLM.int8() as bitsandbytes implements it, through transformers' own integration.

Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339, section 3. What bitsandbytes does with it: every linear weight but
the head is int8 with one scale per output row; a column of the input that holds any |x| >= threshold is multiplied in
FP16 against the *dequantised* int8 weights; the rest goes through an int8 product. No calibration data is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmq.quant.handler import DEFAULT_THRESHOLD, WeightBytes, cast_parameters_, int8_bytes, replace_linears_

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class BnbInt8:
    has_threshold = True
    default_threshold = DEFAULT_THRESHOLD
    dtype = "float16"
    lean_weights = None
    int8_head = False
    opens_int8 = True
    converts = True

    def check_threshold(self, threshold: float) -> None:
        """Every number is fine."""

    def arithmetic(self, device: str, loop: str = "hf") -> str:
        on_cpu = device.startswith("cpu")
        products = "int8 products done as FP32 matrix products" if on_cpu else "int8 products summed in int32"
        return f"int8 linear weights, FP16 embedding, norms and head; {products}; outlier columns in FP16"

    def load_arguments(self, device: str) -> dict[str, Any]:
        """On a GPU bitsandbytes quantizes weight by weight on the way in, so that the 16-bit model is never there
        whole. On a CPU it takes 42 ms a weight for what our compiled kernel does in 3 (the demo model), so there
        `convert_` makes the codes: the same, bit for bit."""
        import torch
        from transformers import BitsAndBytesConfig

        arguments = {"dtype": torch.float16, "device_map": {"": device}}
        if device.startswith("cpu"):
            return arguments
        # bitsandbytes casts every input to FP16, so the rest of the model is FP16 too.
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=DEFAULT_THRESHOLD)
        return arguments | {"quantization_config": config}

    def convert_(self, model: nn.Module, device: str) -> nn.Module:
        """Replace every linear layer but the head; what is int8 already stays, but for a threshold of its own."""
        import torch

        if next(int8_linears(model), None) is not None:  # quantized on the way in: it may not be moved
            self.set_threshold(model, DEFAULT_THRESHOLD)
            return model.eval()
        replace_linears_(cast_parameters_(model.to(device), torch.float16), _quantized)
        return model.eval()

    def set_threshold(self, model: nn.Module, threshold: float) -> None:
        for linear in int8_linears(model):
            linear.state.threshold = threshold

    def sixteen_bit_columns(self, module: nn.Module) -> torch.Tensor | None:
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

    def predict(self, meta_model: nn.Module) -> WeightBytes:
        return int8_bytes(meta_model)


def int8_linears(model: nn.Module) -> Iterator[nn.Module]:
    """The bitsandbytes int8 linear layers of a loaded model."""
    import bitsandbytes as bnb

    return (module for module in model.modules() if isinstance(module, bnb.nn.Linear8bitLt))


def _quantized(linear: nn.Module) -> nn.Module:
    """A Linear8bitLt with the codes and scales of `linear`, made on the device `linear` is on."""
    import bitsandbytes as bnb
    import torch

    from llmq.quant.int8_linear import int8_weight

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
