"""Text quality without opinion: perplexity, KL divergence and top-1 agreement on a text every method reads.

The text is cut into windows of 512 tokens that do not overlap; each is read without earlier context, and its first
token is not scored. `reading` says how: 'pooled', a window in one call, as a prompt is read; 'decode', a call a token
through the decode step and its KV cache, as text is written. A method that looks at all rows of a call, as LLM.int8()
does for its outlier columns, computes other numbers in each.

Perplexity is exp of the mean negative log-likelihood over all scored tokens. KL is KL(FP16 || method), in nats per
token, `reverse_kl` the other direction. `perplexity_change` is the relative change against FP16. Intervals are 95 %
t-intervals over windows; those of differences are paired, window by window. `equivalent_within`: the smallest margin
within which two one-sided tests at 5 % find the perplexities equal. The floor is FP16 itself with the channels of the
residual stream in another order: the same function, every sum over channels rounded differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from llmq.contestant import Contestant, Contestants
from llmq.engine.base import Engine, Interrupted
from llmq.engine.choice import ENGINES, choose_engines
from llmq.engine.loading import Key
from llmq.environment import describe
from llmq.errors import BadChoice
from llmq.events import Event, Progress
from llmq.fields import Choice, Number, Switch, Text
from llmq.formatting import MISSING
from llmq.labs.base import Lab
from llmq.labs.rows import BASELINE, RowAnswer, TableLab, share_of
from llmq.machine.door import Lease
from llmq.methods import Method
from llmq.models.architecture import Unsupported, architecture_of
from llmq.models.edits import Reorder
from llmq.models.opening import Model
from llmq.models.reference_text import TEXTS, WINDOW, reference_text
from llmq.scores import LARGEST_LOSS, equivalence_margin, mean_interval, perplexity, quantile, score_tokens

if TYPE_CHECKING:
    import torch

READINGS = ("pooled", "decode")
FLOOR = "fp16, summed in another order"
DIGITS = 8  # of what is kept of each window, so that any two methods can be paired
QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_max": 1.0}  # over tokens


@dataclass
class Reader:
    """One row in the making: who reads, and for every window (4, tokens) scores as `score_tokens` orders them."""

    label: str
    model: Model
    contestant: Contestant
    engine: Engine | None = None
    scores: list[torch.Tensor] = field(default_factory=list)

    def logits(self, ids: list[int], reading: str, stopped: Callable[[], bool]) -> torch.Tensor:
        read = self.engine.decode_logits if reading == "decode" else self.engine.logits
        return read(ids, stopped).float()


@dataclass(frozen=True, kw_only=True)
class Quality(TableLab):
    kind, command, title = "quality", ("quality",), "Text quality"
    about = "Perplexity and agreement with FP16 on a text that every method reads."
    checkpoint: Annotated[str, Text(positional=True, optional=True, help="a model; instead of --model")] = ""
    other: Annotated[str, Text(positional=True, optional=True, help="a second one, against the first")] = ""
    contestants: Annotated[tuple[Contestant, ...], Contestants()] = Contestant.parse_all("fp16,bnb-int8")
    engine: Annotated[str, Choice(ENGINES, help="auto, hf (transformers) or lean (our own loop)")] = "auto"
    text: Annotated[
        str, Text(file="--text", names=tuple(TEXTS), help=f"{', '.join(TEXTS)} or a file (default: english)")
    ] = ""
    tokens: Annotated[int, Number(2 * WINDOW, 1_000_000, whole=True, help="how much of the text")] = 4096
    reading: Annotated[
        str, Choice(READINGS, help="pooled (a window in one call) or decode (a call a token, with the KV cache)")
    ] = "pooled"
    floor: Annotated[bool, Switch(help="leave out FP16 summed in another order")] = True
    columns = {
        "Method": "{method}",
        "Loop": "{engine}",
        "Perplexity (95 %)": "{perplexity:.2f} ({perplexity_interval[0]:.2f}–{perplexity_interval[1]:.2f})",
        "Change (95 %, paired)": lambda row: shown_change(row),
        "Equal within": lambda row: shown_margin(row),
        "KL to FP16": "{kl_to_fp16:.4f}",
        "Median, 99 %, largest": lambda row: shown_quantiles(row),
        "Same first choice": share_of("top1_agreement"),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.checkpoint and self.model not in (type(self).model, self.checkpoint):
            raise BadChoice(f"give either {self.checkpoint!r:.80} or --model {self.model!r:.80}")

    def run(self, lease: Lease) -> Iterator[Event | Progress | RowAnswer]:
        """Let every method and FP16 read the text; last comes the result with the stable keys of `quality --json`.
        Stopped early, the windows that all have read stay, if they are two."""
        models = []
        for name in self.names:
            models.append((yield from lease.open(name)))
        windows = self._windows(models)
        readers, missing = yield from self._load(lease, models)
        try:
            yield from self._read(lease, windows, readers)
        except Interrupted:
            windows = windows[: min(len(reader.scores) for reader in readers)]
            if len(windows) < 2:
                raise
            missing |= {"stopped": True}
        yield RowAnswer(type(self), self._result(models[0], windows, readers) | missing)

    def _read(self, lease: Lease, windows: list[list[int]], readers: list[Reader]) -> Iterator[Progress]:
        for number, ids in enumerate(windows, 1):
            baseline = None
            for reader in readers:
                logits = reader.logits(ids, self.reading, lease.stop.is_set)
                baseline = logits if baseline is None else baseline
                reader.scores.append(score_tokens(logits, baseline, ids))
            yield lease.progress(f"window {number} of {len(windows)}", number / len(windows))

    @property
    def names(self) -> list[str]:
        """Of the checkpoints; the first is the baseline's."""
        return [self.checkpoint or self.model, *([self.other] if self.other else [])]

    def typed(self) -> str:
        return Lab.typed(replace(self, checkpoint=self.names[0]) if self.other else self)

    def _windows(self, models: list[Model]) -> list[list[int]]:
        """Raises BadChoice for a text of fewer than two windows, and for checkpoints that read it in other tokens."""
        text = reference_text(self.text or "english") if self.text in ("", *TEXTS) else self.text
        ids, *others = (model.tokenize(text) for model in models)
        for model, other in zip(models[1:], others, strict=True):
            if ids != other or model.config.vocab_size != models[0].config.vocab_size:
                alike = "only bits per byte can be compared: run `quality` on each by itself"
                raise BadChoice(f"{self.names[0]} and {self.names[1]} have different vocabularies; {alike}")
        windows = [ids[i : i + WINDOW] for i in range(0, min(len(ids), self.tokens) - WINDOW + 1, WINDOW)]
        if len(windows) < 2:
            needed = f"at least {2 * WINDOW} are needed; {', '.join(TEXTS)} are long enough"
            raise BadChoice(f"the text has {len(ids)} tokens; {needed}")
        return windows

    def _load(self, lease: Lease, models: list[Model]) -> Generator[Event, None, tuple[list[Reader], dict]]:
        """The readers with their engines, FP16 of the first checkpoint ahead of all, and what is missing and why."""
        methods = list(dict.fromkeys((BASELINE, *self.contestants)))
        loops = choose_engines(self.engine, [c.method for c in methods], models[0].config.to_dict(), self.device)
        loop_of = dict(zip(methods, loops, strict=True))
        readers = [Reader(self._label(0, c), models[0], c) for c in methods]
        readers += [Reader(self._label(1, c), model, c) for model in models[1:] for c in self.contestants]
        missing = {}
        try:
            readers += [Reader(FLOOR, reordered(models[0]), BASELINE)] if self.floor else []
        except Unsupported as reason:
            missing = {"missing": {FLOOR: f"no order is known to be free for {reason}"}}
        for reader in readers:
            key = Key.of(reader.model, reader.contestant.method, self.device, loop_of[reader.contestant])
            reader.engine = yield from lease.load(key, reader.contestant)
        return readers, missing

    def _label(self, number: int, contestant: Contestant) -> str:
        return f"{self.names[number]}#{contestant.label}" if self.other else contestant.label

    def _result(self, model: Model, windows: list, readers: list[Reader]) -> dict:
        named = {self._label(0, c) for c in self.contestants}
        told = [reader for number, reader in enumerate(readers) if number or reader.label in named]
        bytes_read = sum(len(model.tokenizer.decode(ids[1:]).encode()) for ids in windows)
        read, base = len(windows), readers[0].scores
        settings = {"window": WINDOW, "windows": read, "reading": self.reading, "command": self.typed()}
        return {
            "kind": self.kind,
            "text": TEXTS.get(self.text or "english", "a given text"),
            "tokens": len(windows) * (WINDOW - 1),
            "device": self.device,
            "model": self.names[0],
            "conditions": settings | describe(self.device, model.source),
            "results": [
                {"method": r.label, "engine": r.engine.name, **summarised(r.scores[:read], base[:read], bytes_read)}
                | _calibration(r.contestant.method)
                for r in told
            ],
        }

    @classmethod
    def finding(cls, rows: list[dict]) -> str:
        """What each method costs in perplexity."""
        costs = [
            f"{row['method']} {shown_change(row)}"
            for row in rows
            if row.get("kl_to_fp16") and "perplexity_change" in row
        ]
        return f"Perplexity against FP16, with its 95 % interval: {'; '.join(costs)}." if costs else ""


def _calibration(method: Method) -> dict:
    """How much of the text for it the method is fitted to."""
    return {"calibration_windows": method.calibration_windows} if method.calibrated else {}


def reordered(model: Model) -> Model:
    """The same function with the channels of its residual stream in another order. Raises Unsupported for a model whose
    weights are not known to keep their function then."""
    architecture_of(model.config.to_dict())
    return model.edited(Reorder.shuffled(model.config.hidden_size))


def shown_change(row: dict) -> str:
    """Of the perplexity, in per cent, with its interval."""
    if "perplexity_change" not in row:  # absent from results of earlier versions
        return MISSING
    ends = (row["perplexity_change"], *row["perplexity_change_interval"])
    change, low, high = (f"{round(100 * end, 1) + 0.0:+.1f}" for end in ends)  # never -0.0
    return f"{change} % ({low} to {high})"


def shown_margin(row: dict) -> str:
    return f"±{100 * row['equivalent_within']:.2g} %" if row.get("equivalent_within") else MISSING


def shown_quantiles(row: dict) -> str:
    """Of the KL over tokens."""
    return "{kl_median:.2g}, {kl_p99:.2g}, {kl_max:.2g}".format_map(row) if row.get("kl_max") else MISSING


def summarised(rows: list[torch.Tensor], baseline: list[torch.Tensor], bytes_read: int) -> dict:
    """One method's row from its windows' scores: means with their intervals, the change of perplexity in pairs (each
    window's loss against the baseline's loss of the same window), and how the KL is spread over tokens."""
    losses, kls, reverse_kls, agreements = zip(*(row.mean(1).tolist() for row in rows), strict=True)
    changes = [loss - float(other[0].mean()) for loss, other in zip(losses, baseline, strict=True)]
    token_kls = sorted(kl for row in rows for kl in row[1].tolist())
    nats = math.fsum(loss for row in rows for loss in row[0].tolist())
    return {
        **_with_interval("perplexity", losses, perplexity),
        **_with_interval("perplexity_change", changes, _growth),
        "equivalent_within": _growth(equivalence_margin(changes)),
        **_with_interval("kl_to_fp16", kls),
        **{name: quantile(token_kls, share) for name, share in QUANTILES.items()},
        **_with_interval("reverse_kl", reverse_kls),
        **_with_interval("top1_agreement", agreements),
        "bits_per_byte": nats / math.log(2) / bytes_read,
        "window_losses": [round(loss, DIGITS) for loss in losses],
        "window_kls": [round(kl, DIGITS) for kl in kls],
    }


def _growth(nats: float) -> float:
    """The relative change of perplexity that a change of the loss comes to."""
    return math.expm1(min(nats, LARGEST_LOSS))


def _with_interval(name: str, values: tuple[float, ...] | list[float], shown: Callable[[float], float] = float) -> dict:
    return {
        name: shown(math.fsum(values) / len(values)),
        f"{name}_interval": [shown(end) for end in mean_interval(values)],
    }
