"""Predicted bytes, from a configuration alone: weights, KV cache, workspace (`formulas`); and whether they fit what is
free."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.formulas import SYMBOLS, Use, kv_bytes, weight_formulas, worst_moment
from llmq.methods import Method, WeightBytes
from llmq.methods.coverage import predicted_coverage
from llmq.models.config import ENDLESS
from llmq.models.opening import Model, describe_model

if TYPE_CHECKING:
    from torch import nn

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
    loading: int = 0  # of the 16-bit model, where the method's weights are made of it on the device

    @property
    def total(self) -> int:
        return self.weights + self.scales + (self.kv or 0) + self.workspace

    @property
    def most(self) -> int:
        """What stands there at some moment, while it loads or later."""
        return max(self.total, self.loading)


@dataclass(frozen=True)
class Plan:
    """`schedule` as it will run, and `reason` when that differs from what was asked for."""

    schedule: str
    reason: str
    free_bytes: int


def predict(
    shape: nn.Module, method: Method, *, tokens: int, answer: int = 0, batch: int = 1, loop: str = "hf",
    device: str = "cuda",
) -> Prediction:  # fmt: skip
    """Bytes for one contestant when it needs most; `shape` is the model's (`Model.shape`), `tokens` counts prompt and
    answer, `answer` those that are not read in one call. `loop` and `device`: what runs it."""
    use = Use(tokens, answer, batch, _itemsize(method), loop, device)
    return _predict(shape.config.get_text_config(), method.predict(shape), use)


def _itemsize(method: Method) -> int:
    import torch

    return getattr(torch, method.dtype).itemsize


def _predict(config, weights: WeightBytes, use: Use) -> Prediction:
    cache, workspace = worst_moment(config, use)
    return Prediction(weights.weights, weights.scales, cache and cache.bytes, workspace.bytes)


def forecast(
    model: str | Model,
    contestants: Sequence[Contestant],
    *,
    tokens: int,
    answer: int = 0,
    batch: int = 1,
    device_bytes: float | None = None,
) -> dict:
    """Predicted bytes of every method for a model that need not be here: a preset's shape or a configuration is enough.
    `answer`: how many of the tokens are written and not read.

    With `device_bytes`, each row says whether the method alone fits into HEADROOM of them, and the largest context and
    the largest batch that do, 0 for none. Raises BadChoice for tokens, answer or batch out of range.
    """
    if tokens < 1 or batch < 1 or tokens * batch > MOST_TOKENS:
        most = f"both must be at least 1, and their product {MOST_TOKENS:.0e} at most"
        raise BadChoice(f"context is {tokens:.12g} and batch is {batch:.12g}; {most}")
    if not 0 <= answer < tokens:
        raise BadChoice(f"the answer is {answer} of {tokens} tokens; choose at least 0, and fewer than the context has")
    if device_bytes is not None and not 0 < device_bytes <= 1e18:
        raise BadChoice(f"device memory is {device_bytes / 1e9!r} GB; choose a number over 0")
    opened = model if isinstance(model, Model) else describe_model(model)
    room = None if device_bytes is None else HEADROOM * device_bytes
    asked = {"model": model if isinstance(model, str) else model.name, "context": tokens, "answer": answer}
    limit = None if opened.context == ENDLESS else opened.context
    asked |= {"batch": batch, "device_memory": device_bytes, "usable_memory": room, "model_context": limit}
    rows = [_row(opened, contestant, Use(tokens, answer, batch), room) for contestant in contestants]
    return asked | {"symbols": SYMBOLS, "results": rows}


def _row(model: Model, contestant: Contestant, use: Use, room: float | None) -> dict:
    """What a forecast says of one method."""
    method, config = contestant.method, model.shape.config.get_text_config()
    use = replace(use, itemsize=_itemsize(method))
    weights, scales = weight_formulas(model.shape, method)
    cache, workspace = worst_moment(config, use)
    told = {"weights": weights, "scales": scales, "kv": cache, "workspace": workspace}
    found = Prediction(*(part and part.bytes for part in told.values()))
    asked = {name: count for name, count in asdict(found).items() if name != "loading"}
    row = {"method": contestant.label, **asked, "total": None if found.kv is None else found.total}
    row |= {"fits": None, "largest_context": None, "largest_batch": None}
    if room is not None and found.kv is not None:
        row["fits"] = found.total <= room
        row["largest_context"] = _largest_context(model, method, room, use)
        row["largest_batch"] = largest_batch(model, method, room, tokens=use.tokens, answer=use.answer)
    formulas = {name: part and {"text": part.text, "symbols": part.symbols} for name, part in told.items()}
    return row | {"coverage": predicted_coverage(model.shape, method).shares, "formulas": formulas}


def _largest_context(model: Model, method: Method, room: float, use: Use) -> int:
    """The most tokens, prompt and answer, that the model reads and with which a method needs at most `room` bytes."""
    config, weights = model.shape.config.get_text_config(), method.predict(model.shape)

    def needed(tokens: int) -> int:
        return _predict(config, weights, replace(use, tokens=tokens)).total

    return bisect_right(range(1, model.context + 1), room, key=needed)


def largest_batch(model: Model, method: Method, room: float, *, tokens: int, answer: int = 0) -> int | None:
    """The most sequences of `tokens`, prompt and answer, with which a method needs at most `room` bytes, 0 for none;
    None where what its attention keeps is not known."""
    config, weights = model.shape.config.get_text_config(), method.predict(model.shape)
    if kv_bytes(config, tokens=tokens) is None:
        return None

    def needed(batch: int) -> int:
        return _predict(config, weights, Use(tokens, answer, batch, _itemsize(method))).total

    return bisect_right(range(1, MOST_TOKENS // tokens), room, key=needed)


def plan(schedule: str, predictions: Sequence[Prediction], free_bytes: int) -> Plan:
    """All but `in-turn` needs all contestants at once; where they do not fit, that is chosen and said."""
    if schedule == "in-turn" or fit_together(predictions, free_bytes):
        return Plan(schedule, "", free_bytes)
    needed = f"{_most(predictions) / 1e9:.2f} GB and {free_bytes / 1e9:.2f} GB are free"
    reason = f"loaded together they need {needed}, so each is loaded in turn and freed before the next"
    return Plan("in-turn", reason, free_bytes)


def fit_together(predictions: Sequence[Prediction], free_bytes: int) -> bool:
    return _most(predictions) <= HEADROOM * free_bytes


def _most(predictions: Sequence[Prediction]) -> int:
    """What stands there when it is most: one after the other is loaded, in `loading_order`, and all stay."""
    ordered = sorted(predictions, key=loading_order)
    held = list(accumulate((p.total for p in ordered), initial=0))
    return max([held[-1], *(before + p.most for before, p in zip(held, ordered, strict=False))])


def loading_order(prediction: Prediction) -> int:
    """Sort by this: whoever needs the most beside what stays of it comes first, while there is room."""
    return prediction.total - prediction.most
