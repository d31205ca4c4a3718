"""Predicted bytes, from a configuration alone: weights, KV cache, workspace; and whether they fit what is free.

Weights and KV cache are exact tensor sizes (the model is built without storage and its tensors are counted). Workspace
is an upper estimate of what one prefill needs besides: attention and MLP activations of one layer, and the last logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.methods import Method, WeightBytes
from llmq.models.opening import open_model
from llmq.models.presets import PRESETS

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

HEADROOM = 0.95  # share of the free bytes a plan may use; the rest is the allocator's rounding and fragmentation


@dataclass(frozen=True)
class Prediction:
    """Bytes one contestant will need at `tokens` of context."""

    weights: int
    scales: int
    kv: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.scales + self.kv + self.workspace


@dataclass(frozen=True)
class Plan:
    """`schedule` as it will run, and `reason` when that differs from what was asked for."""

    schedule: str
    reason: str
    free_bytes: int


def predict(shape: nn.Module, method: Method, *, tokens: int, batch: int = 1) -> Prediction:
    """Bytes for one contestant; `shape` is the model's (`Model.shape`), `tokens` counts prompt and answer."""
    weights: WeightBytes = method.predict(shape)
    config = shape.config.get_text_config()
    return Prediction(
        weights.weights,
        weights.scales,
        kv_bytes(config, tokens=tokens, batch=batch, itemsize=_itemsize(method)),
        _workspace(config, tokens=tokens, batch=batch, itemsize=_itemsize(method)),
    )


def forecast(
    model: str, contestants: Sequence[Contestant], *, tokens: int, batch: int = 1, device_bytes: float | None = None
) -> dict:
    """Predicted bytes of every method for a model that need not be here: a preset's shape is enough.

    With `device_bytes`, each row says whether the method alone fits. Raises BadChoice for tokens or batch under 1.
    """
    if tokens < 1 or batch < 1:
        raise BadChoice(f"context is {tokens} and batch is {batch}; both must be at least 1")
    if device_bytes is not None and not 0 < device_bytes <= 1e18:
        raise BadChoice(f"device memory is {device_bytes / 1e9!r} GB; choose a number over 0")
    opened = open_model(model, random_weights=model in PRESETS)
    rows = []
    for contestant in contestants:
        found = predict(opened.shape, contestant.method, tokens=tokens, batch=batch)
        row = {"method": contestant.label, **asdict(found), "total": found.total}
        fits = None if device_bytes is None else found.total <= HEADROOM * device_bytes
        rows.append(row | {"fits": fits})
    return {"model": model, "context": tokens, "batch": batch, "device_memory": device_bytes, "results": rows}


def kv_bytes(config: PretrainedConfig, *, tokens: int, batch: int = 1, itemsize: int = 2) -> int:
    """2·batch·tokens·layers·G·d_h·itemsize: keys and values of G key/value heads of width d_h (GQA: G < heads)."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * batch * tokens * config.num_hidden_layers * groups * width * itemsize


def plan(schedule: str, predictions: Sequence[Prediction], free_bytes: int) -> Plan:
    """`interleave` needs all contestants at once; where they do not fit, one after the other is chosen and said."""
    together = sum(p.total for p in predictions)
    if schedule == "interleave" and together > HEADROOM * free_bytes:
        reason = (
            f"loaded together they need {together / 1e9:.2f} GB and {free_bytes / 1e9:.2f} GB are free, "
            "so each is loaded in turn and freed before the next"
        )
        return Plan("in-turn", reason, free_bytes)
    return Plan(schedule, "", free_bytes)


def fit_together(predictions: Sequence[Prediction], free_bytes: int) -> bool:
    return sum(p.total for p in predictions) <= HEADROOM * free_bytes


def _itemsize(method: Method) -> int:
    import torch

    return getattr(torch, method.dtype).itemsize


def _workspace(config: PretrainedConfig, *, tokens: int, batch: int, itemsize: int) -> int:
    hidden, ffn = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    wide = max(hidden, getattr(config, "num_attention_heads", 0) * (getattr(config, "head_dim", None) or 0))
    # Residual and norm; q, k, v, two for their rotation, attention output; gate, up, product, and an int32 sum of two.
    rows = batch * tokens * itemsize * (2 * hidden + 6 * wide + 3 * ffn + 2 * ffn)
    return rows + 4 * 2 * batch * config.vocab_size
