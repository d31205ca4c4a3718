"""Text quality without opinion: perplexity, KL divergence and top-1 agreement on a text every method reads.

The text is cut into windows of 512 tokens that do not overlap; each window is one forward call without earlier context,
and its first token is not scored. Perplexity is exp of the mean negative log-likelihood over all scored tokens. KL is
KL(FP16 || method), in nats per token, `reverse_kl` the other direction. `perplexity_change` is the relative change
against FP16. Intervals are 95 % t-intervals over windows; those of differences are paired, window by window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Annotated

from llmq.contestant import Contestant, Contestants
from llmq.engine.base import Engine
from llmq.engine.choice import ENGINES, choose_engines
from llmq.engine.loading import Key
from llmq.environment import describe
from llmq.errors import BadChoice
from llmq.events import Event, Progress
from llmq.fields import Choice, Number, Text
from llmq.formatting import MISSING
from llmq.labs.rows import BASELINE, RowAnswer, TableLab, share_of
from llmq.machine.door import Lease
from llmq.models.opening import Model
from llmq.models.reference_text import WINDOW, reference_text
from llmq.scores import LARGEST_LOSS, TextScore, mean_interval, perplexity, score_text


@dataclass(frozen=True, kw_only=True)
class Quality(TableLab):
    kind, command, title = "quality", ("quality",), "Text quality"
    about = "Perplexity and agreement with FP16 on a text that every method reads."
    contestants: Annotated[tuple[Contestant, ...], Contestants()] = Contestant.parse_all("fp16,bnb-int8")
    engine: Annotated[str, Choice(ENGINES, help="auto, hf (transformers) or lean (our own loop)")] = "auto"
    text: Annotated[str, Text(file="--text", help="default: CPython's pydoc topics")] = ""
    tokens: Annotated[int, Number(2 * WINDOW, 1_000_000, whole=True, help="how much of the text")] = 4096
    columns = {
        "Method": "{method}",
        "Loop": "{engine}",
        "Perplexity (95 %)": "{perplexity:.2f} ({perplexity_interval[0]:.2f}–{perplexity_interval[1]:.2f})",
        "Change (95 %, paired)": lambda row: _shown_change(row),
        "KL to FP16": "{kl_to_fp16:.4f}",
        "Same first choice": share_of("top1_agreement"),
    }

    def run(self, lease: Lease) -> Iterator[Event | Progress | dict]:
        """Let every method and FP16 read the text; last comes the result with the stable keys of `quality --json`."""
        model = yield from lease.open(self.model)
        ids = model.tokenize(self.text or reference_text())
        windows = [ids[i : i + WINDOW] for i in range(0, min(len(ids), self.tokens) - WINDOW + 1, WINDOW)]
        if len(windows) < 2:
            raise BadChoice(f"the text has {len(ids)} tokens; at least {2 * WINDOW} are needed")
        engines = yield from self._load(lease, model)
        scores: dict[Contestant, list[TextScore]] = {contestant: [] for contestant in engines}
        for number, window in enumerate(windows, 1):
            baseline = engines[BASELINE].logits(window).float()
            for contestant, engine in engines.items():
                own = baseline if contestant == BASELINE else engine.logits(window).float()
                scores[contestant].append(score_text(own, baseline, window))
            yield lease.progress(f"window {number} of {len(windows)}", number / len(windows))
        yield RowAnswer(type(self), self._result(model, windows, engines, scores))

    def _result(self, model: Model, windows: list, engines: dict, scores: dict) -> dict:
        return {
            "kind": self.kind,
            "text": "a given file" if self.text else "CPython pydoc_data.topics",
            "tokens": len(windows) * (WINDOW - 1),
            "device": self.device,
            "model": self.model,
            "conditions": {"window": WINDOW, "windows": len(windows), **describe(self.device, model.source)},
            "results": [
                {"method": c.label, "engine": engines[c].name, **_summarise(scores[c], scores[BASELINE])}
                for c in self.contestants
            ],
        }

    def _load(self, lease: Lease, model: Model) -> Generator[Event, None, dict[Contestant, Engine]]:
        needed = list(dict.fromkeys((BASELINE, *self.contestants)))
        loops = choose_engines(self.engine, [c.method for c in needed], model.config.to_dict(), self.device)
        engines = {}
        for contestant, loop in zip(needed, loops, strict=True):
            engines[contestant] = yield from lease.load(Key.of(model, contestant.method, self.device, loop), contestant)
        return engines


def _shown_change(row: dict) -> str:
    if "perplexity_change" not in row:  # absent from results of earlier versions
        return MISSING
    low, high = (f"{100 * end:+.1f}" for end in row["perplexity_change_interval"])
    return f"{100 * row['perplexity_change']:+.1f} % ({low} to {high})"


def _summarise(rows: list[TextScore], baseline: list[TextScore]) -> dict:
    """One method's row from its windows: means with their intervals, and the change of perplexity in pairs: each
    window's loss against the baseline's loss of the same window."""
    losses = [row.loss for row in rows]
    changes = [row.loss - other.loss for row, other in zip(rows, baseline, strict=True)]
    return {
        **_with_interval("perplexity", losses, perplexity),
        **_with_interval("perplexity_change", changes, lambda change: math.expm1(min(change, LARGEST_LOSS))),
        **_with_interval("kl_to_fp16", [row.kl for row in rows]),
        **_with_interval("reverse_kl", [row.reverse_kl for row in rows]),
        **_with_interval("top1_agreement", [row.top1 for row in rows]),
    }


def _with_interval(name: str, values: list[float], shown: Callable[[float], float] = float) -> dict:
    return {
        name: shown(math.fsum(values) / len(values)),
        f"{name}_interval": [shown(end) for end in mean_interval(values)],
    }
