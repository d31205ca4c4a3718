"""The methods: one frozen handler and one row in METHODS each. A later method joins by adding both, touching no other.

A handler knows how a method's weights are made and what they weigh; it knows nothing about prompts, caches or timing.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmq.errors import unknown
from llmq.quant.bnb_int8 import BnbInt8
from llmq.quant.dense import Dense
from llmq.quant.handler import Handler, WeightBytes
from llmq.quant.llm_int8 import LlmInt8
from llmq.quant.naive import Naive

__all__ = ["METHODS", "Handler", "Method", "WeightBytes", "method_named"]


@dataclass(frozen=True)
class Method:
    """One row: the stable name, what people read, and the handler that does it."""

    name: str
    label: str
    about: str
    handler: Handler


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("fp16", "FP16", "16-bit floating point: the usual baseline.", Dense("float16")),
        Method("bf16", "BF16", "16-bit with the range of FP32 and 8 bits of significand.", Dense("bfloat16")),
        Method("fp32", "FP32", "32-bit floating point: twice FP16's memory.", Dense("float32")),
        Method(
            "bnb-int8",
            "LLM.int8() · bitsandbytes",
            "Int8 weights with one scale per row, int8 activations with one scale per token; activation columns that "
            "reach the threshold are multiplied in FP16.",
            BnbInt8(),
        ),
        Method(
            "llm-int8",
            "LLM.int8() · ours",
            "The same codes, scales and outliers as bitsandbytes, in kernels that never wait for the host: an outlier "
            "keeps its 16 bits and meets the same int8 weight.",
            LlmInt8(has_threshold=True),
        ),
        Method(
            "int8-weight-only",
            "Int8 weights only",
            "Int8 weights with one scale per row; activations stay in FP16, so there is nothing to decompose.",
            LlmInt8(has_threshold=False),
        ),
        Method(
            "llm-int8-head",
            "LLM.int8() · ours, head too",
            "LLM.int8() with embedding and head in int8 as well, so that the weights are really half of FP16's; they "
            "usually stay in FP16.",
            LlmInt8(has_threshold=True, int8_head=True),
        ),
        Method(
            "vectorwise",
            "Naive W8A8, a scale a row",
            "Int8 weights and activations, one scale a row of each, outliers and all: LLM.int8() without its "
            "decomposition. Emulated.",
            Naive(vectorwise=True),
        ),
        Method(
            "absmax",
            "Naive W8A8, a scale a tensor",
            "Int8 weights and activations with one scale for a whole tensor, which its largest number sets. Emulated.",
            Naive(vectorwise=False),
        ),
        Method(
            "absmax-w8a32",
            "Naive W8A32",
            "Only the weights in int8, one scale a tensor; activations in FP32. Emulated.",
            Naive(vectorwise=False, activations=False),
        ),
        Method(
            "absmax-w32a8",
            "Naive W32A8",
            "Only the activations in int8, one scale a tensor; weights in FP32. Emulated.",
            Naive(vectorwise=False, weights=False),
        ),
    )
}


def method_named(name: str) -> Method:
    """The row called `name`. Raises BadChoice naming the choices."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
