"""Weights in one floating-point type: fp16, bf16, fp32."""

from __future__ import annotations

from dataclasses import dataclass

from llmq.methods.base import Method


@dataclass(frozen=True)
class Dense(Method):
    """Nothing is quantized."""

    dense, bits = True, 16
    packed = "dense"

    def arithmetic(self, device: str, loop: str = "hf", cpu: str = "") -> str:
        """On a CPU without 16-bit units torch multiplies and adds in FP32 and rounds each result (measured: a 16-bit
        dot product of 2048 and 575 ones gives 2624 in FP16, which an FP16 accumulator could not reach)."""
        short = self.label
        if self.bits == 32:
            return "FP32 weights and arithmetic"
        if device.startswith("cpu") and loop == "lean":
            return f"{short} weights, keys and values; FP32 activations and sums"
        if device.startswith("cpu"):
            return f"{short} weights and activations; products summed in FP32, results rounded to {short}"
        return f"{short} weights and activations, products summed in FP32"


@dataclass(frozen=True)
class Fp16(Dense):
    name, label = "fp16", "FP16"
    about = "16-bit floating point: the usual baseline."


@dataclass(frozen=True)
class Bf16(Dense):
    name, label = "bf16", "BF16"
    about = "16-bit with the range of FP32 and 8 bits of significand."
    dtype = "bfloat16"


@dataclass(frozen=True)
class Fp32(Dense):
    name, label = "fp32", "FP32"
    about = "32-bit floating point: twice FP16's memory."
    dtype, bits, packed = "float32", 32, None
