"""Text quality without opinion: perplexity, KL divergence and top-1 agreement on a text every method reads.

The text is cut into windows of 512 tokens that do not overlap; each window is one forward call without earlier context,
and its first token is not scored. Perplexity is exp of the mean negative log-likelihood over all scored tokens. KL is
KL(FP16 || method), in nats per token, `reverse_kl` the other direction. `perplexity_change` is the relative change
against FP16. Intervals are 95 % t-intervals over windows; those of differences are paired, window by window.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.contestants import Contestant
from llmq.engine.choice import choose_engines
from llmq.engine.residents import Key, Residents
from llmq.environment import describe
from llmq.errors import BadChoice
from llmq.models.loading import load_config, load_tokenizer, prepare, resolve
from llmq.scores import LARGEST_LOSS, TextScore, mean_interval, perplexity, score_text

if TYPE_CHECKING:
    import torch

WINDOW = 512
BASELINE = Contestant("fp16")


@dataclass(frozen=True, kw_only=True)
class QualityBench:
    model: str = "demo"
    contestants: tuple[Contestant, ...]
    device: str = "cpu"
    text: str | None = None
    tokens: int = 4096
    engine: str = "auto"

    def __post_init__(self):
        if not isinstance(self.tokens, int) or self.tokens < 2 * WINDOW:
            raise BadChoice(f"tokens is {self.tokens!r}; choose at least {2 * WINDOW}, two windows, for an interval")


def reference_text() -> str:
    """CPython's own documentation topics, sorted by name and joined by newlines: technical English in every install."""
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def bench_quality(bench: QualityBench, report: Callable[[str], None] = lambda line: None) -> dict:
    """Perplexity and agreement of every method against FP16; the result has the stable keys of `quality --json`."""
    source = resolve(bench.model)
    for progress in prepare(source):
        report(progress.message)
    ids = load_tokenizer(source)(bench.text or reference_text(), add_special_tokens=False)["input_ids"]
    windows = [ids[i : i + WINDOW] for i in range(0, min(len(ids), bench.tokens) - WINDOW + 1, WINDOW)]
    if len(windows) < 2:
        raise BadChoice(f"the text has {len(ids)} tokens; at least {2 * WINDOW} are needed")
    residents = Residents()
    engines = {}
    needed = list(dict.fromkeys((BASELINE, *bench.contestants)))
    loops = choose_engines(bench.engine, [c.method for c in needed], load_config(source).to_dict(), bench.device)
    for contestant, loop in zip(needed, loops, strict=True):
        engine, _ = residents.get(Key(source, contestant.label, contestant.method, bench.device, loop))
        if contestant.threshold is not None:
            engine.set_threshold(contestant.threshold)
        engines[contestant] = engine
    scores: dict[Contestant, list[TextScore]] = {contestant: [] for contestant in needed}
    for number, window in enumerate(windows, 1):
        baseline = _logits(engines[BASELINE], window)
        for contestant in needed:
            own = baseline if contestant == BASELINE else _logits(engines[contestant], window)
            scores[contestant].append(score_text(own, baseline, window))
        report(f"window {number} of {len(windows)}")
    return {
        "kind": "quality",
        "text": "CPython pydoc_data.topics" if bench.text is None else "a given file",
        "tokens": len(windows) * (WINDOW - 1),
        "device": bench.device,
        "model": bench.model,
        "conditions": {"window": WINDOW, "windows": len(windows), **describe(bench.device, source)},
        "results": [
            {"method": c.label, "engine": engines[c].name, **_summarise(scores[c], scores[BASELINE])}
            for c in bench.contestants
        ],
    }


def _logits(engine, window: list[int]) -> torch.Tensor:
    """(window, vocabulary) float32 next-token logits."""
    import torch

    with torch.inference_mode():
        return engine.logits(window).float()


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
    return {name: shown(statistics.fmean(values)), f"{name}_interval": [shown(end) for end in mean_interval(values)]}
