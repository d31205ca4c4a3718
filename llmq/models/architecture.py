"""The shape of a LLaMA-family model, read from its configuration: what the lean loop needs to know, and what it cannot.

LLaMA, Mistral without a sliding window, and Qwen2 (which adds a bias to q, k and v) are one architecture here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MODEL_TYPES = ("llama", "mistral", "qwen2")


class Unsupported(Exception):
    """The lean loop cannot run this model; the message says why in a few words."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding (Su et al. 2021): `theta`, and how Llama 3.1 slows the low frequencies."""

    theta: float
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original_context: int = 0

    def frequencies(self, head_dim: int) -> list[float]:
        """Return radians per position for each of the head_dim/2 pairs."""
        return [self._stretched(self.theta ** (-2 * i / head_dim)) for i in range(head_dim // 2)]

    def _stretched(self, frequency: float) -> float:
        """Llama 3.1: wavelengths over original_context/low are slowed by `factor`, those under /high are kept."""
        if not self.original_context:
            return frequency / self.factor
        turns = self.original_context * frequency / (2 * math.pi)
        if turns < self.low:
            return frequency / self.factor
        if turns > self.high:
            return frequency
        smooth = (turns - self.low) / (self.high - self.low)
        return (1 - smooth) * frequency / self.factor + smooth * frequency


@dataclass(frozen=True)
class Architecture:
    """Sizes of a LLaMA-family decoder, by their names in `config.json`; `kv_heads`: key/value heads."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    eps: float
    rope: Rope
    tied: bool
    qkv_bias: bool
    output_bias: bool

    @property
    def qkv_rows(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def widest_input(self) -> int:
        """Of a layer's matrices."""
        return max(self.hidden_size, self.intermediate_size, self.heads * self.head_dim)


def matrices(prefix: str) -> list[list[str]]:
    """The linear layers of a decoder layer, named behind `prefix` (such as 'model.layers.3.'), by the matrix they are
    in: q, k and v; output; gate and up; down."""
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    names = [f"{attention}{part}_proj" for part in "qkvo"]
    return [names[:3], names[3:], [mlp + "gate_proj", mlp + "up_proj"], [mlp + "down_proj"]]


def architecture_of(config: Mapping) -> Architecture:
    """Read a `config.json`, old or new style. Raises Unsupported for anything the lean loop does not compute."""
    kind = config.get("model_type")
    _need(kind in MODEL_TYPES, f"models of type {kind!r}")
    _need(config.get("hidden_act", "silu") == "silu", f"activation {config.get('hidden_act')!r}")
    _need(not config.get("mlp_bias"), "a bias in the MLP")
    _need(not config.get("transformers_weights"), "weights in a file of another name")
    kept = (config.get("quantization_config") or {}).get("llm_int8_skip_modules")  # without the head it may be int8
    _need(kept is None or set(kept) == {"lm_head"}, "an int8 checkpoint with its own list of layers kept in 16 bit")
    context = int(config.get("max_position_embeddings") or 2048)
    window = config.get("sliding_window")
    windowed = kind == "mistral" or config.get("use_sliding_window")
    _need(not (windowed and window and window < context), "a sliding attention window")
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    intermediate = int(config["intermediate_size"])
    _need(heads % kv_heads == 0 and head_dim % 2 == 0, f"{heads} heads of width {head_dim} over {kv_heads} groups")
    _need(kind != "llama" or hidden % heads == 0, f"a hidden size of {hidden} for {heads} heads")
    sizes = {"hidden": hidden, "intermediate": intermediate, "heads times width": heads * head_dim}
    odd = [f"{name} {size}" for name, size in sizes.items() if size % 16]
    _need(not odd, f"sizes that are not multiples of 16 ({', '.join(odd)})")
    biased = kind == "llama" and bool(config.get("attention_bias"))  # Mistral and Qwen2 do not look at it
    return Architecture(
        hidden_size=hidden,
        intermediate_size=intermediate,
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=int(config["vocab_size"]),
        context=context,
        eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_rope(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=biased or kind == "qwen2",
        output_bias=biased,
    )


def _rope(config: Mapping) -> Rope:
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}  # where both are, transformers' order
    theta = float(settings.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    _need(not any(isinstance(v, Mapping) for v in settings.values()), "a rotary embedding for each kind of layer")
    if kind == "default":
        return Rope(theta)
    partial = {**config, **settings}.get("partial_rotary_factor")
    _need(partial in (None, 1), f"rotary embedding of {partial} of each head")
    if kind == "linear":
        return Rope(theta, factor=float(settings["factor"]))
    _need(kind == "llama3", f"rotary embedding {kind!r}")
    original = config.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
    return Rope(
        theta,
        float(settings["factor"]),
        float(settings["low_freq_factor"]),
        float(settings["high_freq_factor"]),
        int(original or config["max_position_embeddings"]),
    )


def _need(met: bool, reason: str) -> None:
    if not met:
        raise Unsupported(reason)
