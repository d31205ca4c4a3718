"""Weights in one floating-point type: fp16, bf16, fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmq.errors import BadChoice
from llmq.quant.handler import WeightBytes, cast_parameters_, stored_tensors

if TYPE_CHECKING:
    from torch import nn

_SHORT = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}


@dataclass(frozen=True)
class Dense:
    dtype: str
    has_threshold = False
    default_threshold = None
    int8_head = False
    opens_int8 = False
    converts = False

    @property
    def lean_weights(self) -> str | None:
        return "dense" if self.dtype in ("float16", "bfloat16") else None

    def check_threshold(self, threshold: float) -> None:
        raise BadChoice(f"{_SHORT[self.dtype]} has no outlier threshold to set to {threshold}")

    def arithmetic(self, device: str, loop: str = "hf") -> str:
        """On a CPU without 16-bit units torch multiplies and adds in FP32 and rounds each result (measured: a 16-bit
        dot product of 2048 and 575 ones gives 2624 in FP16, which an FP16 accumulator could not reach)."""
        short = _SHORT[self.dtype]
        if self.dtype == "float32":
            return "FP32 weights and arithmetic"
        if device.startswith("cpu") and loop == "lean":
            return f"{short} weights, keys and values; FP32 activations and sums"
        if device.startswith("cpu"):
            return f"{short} weights and activations; products summed in FP32, results rounded to {short}"
        return f"{short} weights and activations, products summed in FP32"

    def load_arguments(self, device: str) -> dict[str, Any]:
        import torch

        return {"dtype": getattr(torch, self.dtype), "device_map": {"": device}}

    def convert_(self, model: nn.Module, device: str) -> nn.Module:
        import torch

        return cast_parameters_(model.to(device), getattr(torch, self.dtype))

    def set_threshold(self, model: nn.Module, threshold: float) -> None:
        self.check_threshold(threshold)

    def sixteen_bit_columns(self, module: nn.Module) -> None:
        """All of them, so no layer keeps an account."""

    def scale_bytes(self, model: nn.Module) -> int:
        return 0

    def predict(self, meta_model: nn.Module) -> WeightBytes:
        import torch

        size = getattr(torch, self.dtype).itemsize
        # Rotary frequencies stay in FP32 whatever the model's type.
        parameters = sum(p.numel() for p in meta_model.parameters()) * size
        buffers = sum(t.nbytes for t in stored_tensors(meta_model)) - sum(p.nbytes for p in meta_model.parameters())
        return WeightBytes(parameters + buffers)
