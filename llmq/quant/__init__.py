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
    )
}


def method_named(name: str) -> Method:
    """The row called `name`. Raises BadChoice naming the choices."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
