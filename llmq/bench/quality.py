"""Text quality without opinion: perplexity, KL divergence and top-1 agreement on a text every method reads.

The text is cut into windows of 512 tokens that do not overlap; each window is one forward call without earlier context,
and its first token is not scored. Perplexity is exp of the mean negative log-likelihood over all scored tokens. KL is
KL(FP16 || method), in nats per token. Intervals are 95 %: mean ± 1.96 standard errors over windows, because tokens of
one window are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.contestants import Contestant
from llmq.engine.choice import choose_engines
from llmq.engine.residents import Key, Residents
from llmq.environment import describe
from llmq.errors import BadChoice
from llmq.models.loading import load_config, load_tokenizer, prepare, resolve

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
    scores = {contestant: [] for contestant in bench.contestants}
    for number, window in enumerate(windows, 1):
        baseline = _log_probabilities(engines[BASELINE], window)
        for contestant in bench.contestants:
            own = baseline if contestant == BASELINE else _log_probabilities(engines[contestant], window)
            scores[contestant].append(_score(own, baseline, window))
        report(f"window {number} of {len(windows)}")
    return {
        "kind": "quality",
        "text": "CPython pydoc_data.topics" if bench.text is None else "a given file",
        "tokens": len(windows) * (WINDOW - 1),
        "device": bench.device,
        "model": bench.model,
        "conditions": {"window": WINDOW, "windows": len(windows), **describe(bench.device, source)},
        "results": [{"method": c.label, "engine": engines[c].name, **_summarise(rows)} for c, rows in scores.items()],
    }


def _log_probabilities(engine, window: list[int]) -> torch.Tensor:
    """(window - 1, vocabulary) float32 natural-log probabilities of the next token."""
    import torch

    with torch.inference_mode():
        return engine.logits(window)[:-1].float().log_softmax(-1)


def _score(own: torch.Tensor, baseline: torch.Tensor, window: list[int]) -> tuple[float, float, float]:
    """Means over one window: negative log-likelihood, KL(baseline || own), share of equal top-1 tokens."""
    import torch

    targets = torch.tensor(window[1:], device=own.device)
    loss = -own.gather(1, targets[:, None]).mean()
    divergence = (baseline.exp() * (baseline - own)).sum(-1).mean()
    agreement = (own.argmax(-1) == baseline.argmax(-1)).float().mean()
    return loss.item(), divergence.item(), agreement.item()


def _summarise(rows: list[tuple[float, float, float]]) -> dict:
    loss, divergence, agreement = (_mean_and_interval(column) for column in zip(*rows, strict=True))
    return {
        "perplexity": math.exp(loss[0]),
        "perplexity_interval": [math.exp(end) for end in loss[1]],
        "kl_to_fp16": divergence[0],
        "kl_to_fp16_interval": divergence[1],
        "top1_agreement": agreement[0],
        "top1_agreement_interval": agreement[1],
    }


def _mean_and_interval(values: tuple[float, ...]) -> tuple[float, list[float]]:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return mean, [mean - 1.96 * spread, mean + 1.96 * spread]
