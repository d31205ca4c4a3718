"""The bytes of a model that runs, as formulas: weights by method, keys and values by attention, activations by length.

Every formula is told as it is computed, with the numbers of its symbols. Weights and KV cache are exact sizes of
tensors; activations are an upper estimate of what one call needs besides: those of one layer, and the last logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.engine.base import capacity_for
from llmq.methods import Method
from llmq.methods.swap import replaced_layers, shape_of
from llmq.models.config import PlainConfig, context_of, heads_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

SYMBOLS = {  # what each stands for, in the order in which they are told
    "N": "numbers in quantized layers",
    "q": "bytes of one of them",
    "R": "other numbers (embedding, head, norms)",
    "p": "bytes of one number in the method's type",
    "F": "bytes of buffers, which keep their type",
    "O": "outputs of quantized layers",
    "e": "bytes of scales for an output",
    "B": "sequences at once",
    "s": "tokens, prompt and answer",
    "n": "tokens read in one call",
    "c": "positions for which the lean loop allocates",
    "L": "layers",
    "D": "layers with a sliding window",
    "w": "tokens of the window",
    "G": "heads of keys and values",
    "H": "heads that ask",
    "d": "width of a head",
    "h": "width of the residual stream",
    "f": "width of the MLP",
    "a": "width of attention, h or H·d if that is more",
    "m": "widest of h, f and a",
    "V": "vocabulary",
}


@dataclass(frozen=True)
class Formula:
    """`bytes` as `text` has them of the `symbols`."""

    bytes: int
    text: str
    symbols: dict[str, float]


@dataclass(frozen=True)
class Use:
    """How a model is used. `tokens`: prompt and answer, `answer`: those of them that are written and not read in one
    call, `itemsize`: bytes of a number, `loop` and `device`: as a loaded engine's."""

    tokens: int
    answer: int = 0
    batch: int = 1
    itemsize: int = 2
    loop: str = "hf"
    device: str = "cuda"

    @property
    def prompt(self) -> int:
        """At least one token of those that there are is read."""
        return max(min(1, self.tokens), self.tokens - self.answer)


def weight_formulas(shape: nn.Module, method: Method) -> tuple[Formula, Formula]:
    """Weights and scales under a method of a model on the meta device."""
    import torch

    found, itemsize = method.predict(shape), getattr(torch, method.dtype).itemsize
    layers = {id(layer.weight): layer for layer in replaced_layers(shape, method)}.values()
    numbers = sum(layer.weight.numel() for layer in layers)
    stored = sum(method.bytes(shape_of(layer)).weights for layer in layers)
    fixed = sum(buffer.nbytes for buffer in shape.buffers())
    symbols = {"R": (found.weights - stored - fixed) // itemsize, "p": itemsize, "F": fixed}
    if not numbers:
        return Formula(found.weights, "R·p + F", symbols), Formula(0, "0", {})
    outputs = sum(shape_of(layer)[0] for layer in layers)
    scales = Formula(found.scales, "O·e", {"O": outputs, "e": found.scales / outputs})
    return Formula(found.weights, "N·q + R·p + F", {"N": numbers, "q": stored / numbers} | symbols), scales


def worst_moment(config: PretrainedConfig | PlainConfig, use: Use) -> tuple[Formula | None, Formula]:
    """KV cache and activations when they need most together."""
    return max(moments(config, use), key=lambda parts: sum(part.bytes for part in parts if part))


def moments(config: PretrainedConfig | PlainConfig, use: Use) -> Iterator[tuple[Formula | None, Formula]]:
    """KV cache and activations when the prompt is read, and when the last token is written. The cache is None where a
    layer keeps something else than keys and values."""
    if use.loop == "lean":
        yield _lean_cache(config, use), (_lean_activations if use.device == "cpu" else _activations)(config, use)
        return
    yield _read_cache(config, use), _activations(config, use)
    if use.tokens > use.prompt:
        yield _kept_cache(config, use), _activations(config, use, rows=1)


def kv_bytes(config: PretrainedConfig | PlainConfig, *, tokens: int, batch: int = 1, itemsize: int = 2) -> int | None:
    """2·batch·G·d_h·itemsize for every token that a layer keeps: keys and values of G key/value heads (GQA: G < heads)
    of width d_h; with a sliding window of w it keeps w - 1. None where layers keep something else: latents (MLA), the
    state of a linear attention, one pair for each of several loops, heads that differ from layer to layer."""
    found = windows_of(config)
    if found is None:
        return None
    kept = sum(tokens if window is None else min(tokens, window - 1) for window in found)
    return kept * _token_bytes(config, batch, itemsize)


def windows_of(config: PretrainedConfig | PlainConfig) -> list[int | None] | None:
    """The tokens of every layer's sliding window, None for a layer without; None for all where one of them keeps no
    keys and values of one set of heads."""
    try:
        heads_of(config)
    except (AttributeError, KeyError, RuntimeError):  # what transformers raises for a setting each layer has its own of
        return None
    if any(getattr(config, name, None) for name in ("kv_lora_rank", "n_recurrent_loops", "block_types")):
        return None
    if isinstance(config, PlainConfig):
        return [None] * config.num_hidden_layers  # the lean loop computes no window
    from transformers import DynamicCache

    layers = DynamicCache(config=config).layers
    if {type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        return None
    return [layer.sliding_window if layer.is_sliding else None for layer in layers]


def _token_bytes(config, batch: int, itemsize: int) -> int:
    """Of one token in one layer."""
    _, kv_heads, head_dim = heads_of(config)
    return 2 * batch * kv_heads * head_dim * itemsize


def _cache(config, use: Use, kept: int, text: str, symbols: dict) -> Formula:
    """Of `kept` tokens, added up over the layers: `text`, of which `symbols` are."""
    _, kv_heads, head_dim = heads_of(config)
    told = {"B": use.batch} | symbols | {"G": kv_heads, "d": head_dim, "p": use.itemsize}
    return Formula(kept * _token_bytes(config, use.batch, use.itemsize), f"2·B·{text}·G·d·p", told)


def _read_cache(config, use: Use) -> Formula | None:
    """Once the prompt is read: transformers keeps all of it, as what a window shows of it is a view."""
    if (found := windows_of(config)) is None:
        return None
    return _cache(config, use, len(found) * use.prompt, "L·n", {"L": len(found), "n": use.prompt})


def _kept_cache(config, use: Use) -> Formula | None:
    """With the last token in it: w - 1 of a window, and the new one."""
    if (found := windows_of(config)) is None:
        return None
    layers, tokens, windows = len(found), use.tokens, [window for window in found if window is not None]
    if not windows:
        return _cache(config, use, layers * tokens, "L·s", {"L": layers, "s": tokens})
    kept = sum(tokens if window is None else min(tokens, window) for window in found)
    width = sum(min(tokens, window) for window in windows) / len(windows)
    symbols = {"L": layers, "s": tokens, "D": len(windows), "w": width}
    return _cache(config, use, kept, "((L - D)·s + D·min(s, w))", symbols)


def _lean_cache(config, use: Use) -> Formula:
    capacity, layers = capacity_for(use.tokens, context_of(config)), config.num_hidden_layers
    return _cache(config, use, layers * capacity, "L·c", {"L": layers, "c": capacity})


def _widths(config) -> tuple[int, int, int]:
    """Of the residual stream, of attention, of the MLP."""
    hidden = config.hidden_size
    heads = getattr(config, "num_attention_heads", 0) * (getattr(config, "head_dim", None) or 0)
    return hidden, max(hidden, heads), getattr(config, "intermediate_size", 4 * hidden)


def _activations(config, use: Use, rows: int | None = None) -> Formula:
    """Residual and norm; q, k, v, two for their rotation, attention output; gate, up, product, and an int32 sum of two.
    A prompt longer than a window has a mask of its pairs, as bits and as numbers. Then the logits, and a copy."""
    hidden, wide, inner = _widths(config)
    rows, size, batch = rows or use.prompt, use.itemsize, use.batch
    found = batch * rows * size * (2 * hidden + 6 * wide + 5 * inner) + 8 * batch * config.vocab_size
    symbols = {"B": batch, "n": rows, "p": size, "h": hidden, "a": wide, "f": inner, "V": config.vocab_size}
    text = "B·n·p·(2·h + 6·a + 5·f) + 8·B·V"
    if any(window and window < rows for window in windows_of(config) or ()):
        return Formula(found + batch * rows * rows * (1 + size), f"{text} + B·n·n·(1 + p)", symbols)
    return Formula(found, text, symbols)


def _lean_activations(config, use: Use) -> Formula:
    """Of the CPU's lean loop, in float32: residual, q/k/v, attention, MLP, the input of a product, and what it makes
    int8 codes of; rotations and logits. The scratch of its threads is left out."""
    (heads, kv_heads, head_dim), (hidden, wide, inner) = heads_of(config), _widths(config)
    widest, capacity, rows = max(hidden, wide, inner), capacity_for(use.tokens, context_of(config)), use.prompt
    mixed = (heads + 2 * kv_heads) * head_dim
    found = 4 * rows * (hidden + mixed + wide + inner + widest) + 5 * rows * widest
    found += 4 * (capacity * head_dim + config.vocab_size)
    text = "4·n·(h + (H + 2·G)·d + a + f + m) + 5·n·m + 4·(c·d + V)"
    symbols = {"n": rows, "h": hidden, "H": heads, "G": kv_heads, "d": head_dim, "a": wide, "f": inner, "m": widest}
    return Formula(found, text, symbols | {"c": capacity, "V": config.vocab_size})
