"""Names for models: what a person can type, and the shape behind it.

A shape is enough to build the model with random weights (right for speed and memory, meaningless as text), so a preset
can be measured where its checkpoint cannot be had. Shapes are those of the published `config.json` files.
"""

from __future__ import annotations

from dataclasses import dataclass

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Shape:
    """A LLaMA configuration: the numbers that decide parameters, KV cache and arithmetic."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class Preset:
    """`name` is what people type, `title` what they read. `hub_id` is None for the demo model, which comes from a
    package instead of a hub."""

    name: str
    title: str
    hub_id: str | None
    about: str
    licence: str
    shape: Shape
    gated: bool = False


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "demo",
            "SmolLM2-135M (demo)",
            None,
            "SmolLM2-135M-Instruct: small, trained, LLaMA architecture; needs no hub. Its weights come from a Q4_1 "
            "file, so they lie on a 4-bit grid; dequantised to FP16 they are the baseline here.",
            "Apache-2.0",
            Shape(576, 1536, 30, 9, 3, 49152, 8192, rope_theta=100000.0, tie_word_embeddings=True),
        ),
        Preset(
            "tinyllama-1.1b-chat",
            "TinyLlama-1.1B-Chat",
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            "1.1 B parameters, LLaMA-2 architecture with grouped-query attention.",
            "Apache-2.0",
            Shape(2048, 5632, 22, 32, 4, 32000, 2048),
        ),
        Preset(
            "smollm2-1.7b-instruct",
            "SmolLM2-1.7B-Instruct",
            "HuggingFaceTB/SmolLM2-1.7B-Instruct",
            "1.7 B parameters, LLaMA architecture; fits a small GPU twice.",
            "Apache-2.0",
            Shape(2048, 8192, 24, 32, 32, 49152, 8192, rope_theta=130000.0, tie_word_embeddings=True),
        ),
        Preset(
            "llama-3.2-1b-instruct",
            "Llama-3.2-1B-Instruct",
            "meta-llama/Llama-3.2-1B-Instruct",
            "1.2 B parameters; gated: accept the licence on the hub and set HF_TOKEN.",
            "Llama 3.2 Community",
            Shape(2048, 8192, 16, 32, 8, 128256, 131072, 500000.0, _LLAMA3_ROPE | {"factor": 32.0}, 1e-5, True),
            gated=True,
        ),
        Preset(
            "llama-2-7b-chat",
            "Llama-2-7B-Chat",
            "NousResearch/Llama-2-7b-chat-hf",
            "The 7 B chat model most int8 comparisons use; 13.5 GB in FP16.",
            "Llama 2 Community",
            Shape(4096, 11008, 32, 32, 32, 32000, 4096),
        ),
        Preset(
            "llama-3.1-8b-instruct",
            "Llama-3.1-8B-Instruct",
            "meta-llama/Llama-3.1-8B-Instruct",
            "8 B parameters, grouped-query attention; gated: accept the licence on the hub and set HF_TOKEN.",
            "Llama 3.1 Community",
            Shape(4096, 14336, 32, 32, 8, 128256, 131072, 500000.0, _LLAMA3_ROPE),
            gated=True,
        ),
        Preset(
            "llama-3.1-70b-instruct",
            "Llama-3.1-70B-Instruct",
            "meta-llama/Llama-3.1-70B-Instruct",
            "70 B parameters, 141 GB in FP16, over several GPUs; gated: accept the licence and set HF_TOKEN.",
            "Llama 3.1 Community",
            Shape(8192, 28672, 80, 64, 8, 128256, 131072, 500000.0, _LLAMA3_ROPE),
            gated=True,
        ),
    )
}


def model_title(name: str) -> str:
    """A model's name as people read it; that of a hub id or a folder is its own."""
    return PRESETS[name].title if name in PRESETS else name
