"""Predicted bytes, from a configuration alone: weights, KV cache, workspace; and whether they fit what is free.

Weights and KV cache are exact tensor sizes (the model is built without storage and its tensors are counted). Workspace
is an upper estimate of what one prefill needs besides: attention and MLP activations of one layer, and the last logits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.methods import Method, WeightBytes
from llmq.methods.coverage import predicted_coverage
from llmq.models.config import ENDLESS, PlainConfig, heads_of
from llmq.models.opening import Model, describe_model

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


MOST_TOKENS = 10**12  # of a forecast: whatever the model, the bytes stay a whole number of 64 bit
HEADROOM = 0.95  # share of the free bytes a plan may use; the rest is the allocator's rounding and fragmentation


@dataclass(frozen=True)
class Prediction:
    """Bytes one contestant will need at `tokens` of context. `kv` None: not known for this kind of attention, and the
    total is what is needed at least."""

    weights: int
    scales: int
    kv: int | None
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.scales + (self.kv or 0) + self.workspace


@dataclass(frozen=True)
class Plan:
    """`schedule` as it will run, and `reason` when that differs from what was asked for."""

    schedule: str
    reason: str
    free_bytes: int


def predict(shape: nn.Module, method: Method, *, tokens: int, batch: int = 1) -> Prediction:
    """Bytes for one contestant; `shape` is the model's (`Model.shape`), `tokens` counts prompt and answer."""
    return _predict(shape.config.get_text_config(), method, method.predict(shape), tokens=tokens, batch=batch)


def _predict(config, method: Method, weights: WeightBytes, *, tokens: int, batch: int) -> Prediction:
    import torch

    sizes = {"tokens": tokens, "batch": batch, "itemsize": getattr(torch, method.dtype).itemsize}
    return Prediction(weights.weights, weights.scales, kv_bytes(config, **sizes), _workspace(config, **sizes))


def forecast(
    model: str | Model,
    contestants: Sequence[Contestant],
    *,
    tokens: int,
    batch: int = 1,
    device_bytes: float | None = None,
) -> dict:
    """Predicted bytes of every method for a model that need not be here: a preset's shape or a configuration is enough.

    With `device_bytes`, each row says whether the method alone fits into HEADROOM of them, and the largest context
    that does, 0 for none. Raises BadChoice for tokens or batch out of range.
    """
    if tokens < 1 or batch < 1 or tokens * batch > MOST_TOKENS:
        most = f"both must be at least 1, and their product {MOST_TOKENS:.0e} at most"
        raise BadChoice(f"context is {tokens:.12g} and batch is {batch:.12g}; {most}")
    if device_bytes is not None and not 0 < device_bytes <= 1e18:
        raise BadChoice(f"device memory is {device_bytes / 1e9!r} GB; choose a number over 0")
    opened = model if isinstance(model, Model) else describe_model(model)
    room, rows = None if device_bytes is None else HEADROOM * device_bytes, []
    for contestant in contestants:
        found = predict(opened.shape, contestant.method, tokens=tokens, batch=batch)
        covered = predicted_coverage(opened.shape, contestant.method)
        known = found.kv is not None
        row = {"method": contestant.label, **asdict(found), "total": found.total if known else None}
        row |= {"fits": None, "largest_context": None, "coverage": covered.shares}
        if room is not None and known:
            row["fits"] = found.total <= room
            row["largest_context"] = _largest_context(opened, contestant.method, room, batch)
        rows.append(row)
    asked = {"model": model if isinstance(model, str) else model.name, "context": tokens, "batch": batch}
    limit = None if opened.context == ENDLESS else opened.context
    asked |= {"device_memory": device_bytes, "usable_memory": room, "model_context": limit}
    return asked | {"results": rows}


def _largest_context(model: Model, method: Method, room: float, batch: int) -> int:
    """The most tokens, prompt and answer, that the model reads and with which a method needs at most `room` bytes."""
    config, weights = model.shape.config.get_text_config(), method.predict(model.shape)

    def needed(tokens: int) -> int:
        return _predict(config, method, weights, tokens=tokens, batch=batch).total

    return bisect_right(range(1, model.context + 1), room, key=needed)


def largest_batch(model: Model, method: Method, room: float, *, tokens: int) -> int | None:
    """The most sequences of `tokens`, prompt and answer, with which a method needs at most `room` bytes, 0 for none;
    None where what its attention keeps is not known."""
    config, weights = model.shape.config.get_text_config(), method.predict(model.shape)
    if kv_bytes(config, tokens=tokens) is None:
        return None

    def needed(batch: int) -> int:
        return _predict(config, method, weights, tokens=tokens, batch=batch).total

    return bisect_right(range(1, MOST_TOKENS // tokens), room, key=needed)


def kv_bytes(config: PretrainedConfig | PlainConfig, *, tokens: int, batch: int = 1, itemsize: int = 2) -> int | None:
    """2·batch·G·d_h·itemsize for every token that a layer keeps: keys and values of G key/value heads (GQA: G < heads)
    of width d_h; with a sliding window of w it keeps w - 1. None where layers keep something else: latents (MLA), the
    state of a linear attention, one pair for each of several loops, heads that differ from layer to layer."""
    try:
        (_, kv_heads, head_dim), kept = heads_of(config), _kept(config, tokens)
    except (AttributeError, KeyError, RuntimeError):  # what transformers raises for a setting each layer has its own of
        return None
    other = any(getattr(config, name, None) for name in ("kv_lora_rank", "n_recurrent_loops", "block_types"))
    return None if other or kept is None else 2 * batch * kept * kv_heads * head_dim * itemsize


def _kept(config: PretrainedConfig | PlainConfig, tokens: int) -> int | None:
    """The sum over the layers of how many of `tokens` each keeps; None where one keeps no keys and values."""
    if isinstance(config, PlainConfig):
        return tokens * config.num_hidden_layers  # the lean loop computes no window
    from transformers import DynamicCache

    layers = DynamicCache(config=config).layers
    if {type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        return None
    return sum(min(tokens, layer.sliding_window - 1) if layer.is_sliding else tokens for layer in layers)


def plan(schedule: str, predictions: Sequence[Prediction], free_bytes: int) -> Plan:
    """`interleave` needs all contestants at once; where they do not fit, one after the other is chosen and said."""
    if schedule != "interleave" or fit_together(predictions, free_bytes):
        return Plan(schedule, "", free_bytes)
    needed = f"{sum(p.total for p in predictions) / 1e9:.2f} GB and {free_bytes / 1e9:.2f} GB are free"
    reason = f"loaded together they need {needed}, so each is loaded in turn and freed before the next"
    return Plan("in-turn", reason, free_bytes)


def fit_together(predictions: Sequence[Prediction], free_bytes: int) -> bool:
    return sum(p.total for p in predictions) <= HEADROOM * free_bytes


def _workspace(config: PretrainedConfig, *, tokens: int, batch: int, itemsize: int) -> int:
    hidden, ffn = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    wide = max(hidden, getattr(config, "num_attention_heads", 0) * (getattr(config, "head_dim", None) or 0))
    # Residual and norm; q, k, v, two for their rotation, attention output; gate, up, product, and an int32 sum of two.
    rows = batch * tokens * itemsize * (2 * hidden + 6 * wide + 3 * ffn + 2 * ffn)
    return rows + 4 * 2 * batch * config.vocab_size
