"""Two counterfactuals about channels of the residual stream: silence them, or make them louder without a change.

Silencing: Dettmers et al. 2022, arXiv 2208.07339, section 4.1 zeroes outlier features and as many random ones.
Amplifying: SmoothQuant (Xiao et al. 2023, arXiv 2211.10438) backwards, see `models.edits.Amplify`.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.experiments.lab import Experiment, Lab, Rows
from llmq.models.edits import LARGEST_FACTOR, Amplify, Silence, require_channels

RANKING_TOKENS = 128
MOST_SILENCED = 64
BASELINE = Contestant.parse("fp16")
AMPLIFIED_METHODS = (BASELINE, *Contestant.parse_all("llm-int8,vectorwise,absmax"))


@dataclass(frozen=True, kw_only=True)
class Silencing(Experiment):
    """Zero the k strongest channels for each of `counts`, and as many random ones, `draws` times."""

    kind = "silencing"
    counts: tuple[int, ...] = (1, 2, 4, 8)
    draws: int = 3
    seed: int = 0
    contestant: Contestant = BASELINE

    def __post_init__(self):
        super().__post_init__()
        for count in self.counts:
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_SILENCED:
                raise BadChoice(f"channels to silence is {count!r}; choose whole numbers from 1 to {MOST_SILENCED}")
        if not self.counts or isinstance(self.draws, bool) or not isinstance(self.draws, int) or self.draws < 1:
            raise BadChoice(f"draws is {self.draws!r} for counts {self.counts}; choose at least 1 of each")

    def conditions(self) -> dict:
        return {"method": self.contestant.label, "draws": self.draws, "seed": self.seed}

    def measure(self, lab: Lab) -> Rows:
        if max(self.counts) > lab.width:
            raise BadChoice(f"channels to silence is {max(self.counts)}; this model's stream has {lab.width}")
        yield lab.progress("find the strongest channels", 0.0)
        ranking, peaks = strongest_channels(lab)
        with lab.engine(self.contestant) as engine:
            yield lab.progress("read the text with no channel silenced", 0.05)
            truth = lab.read(engine)
            yield {"silenced": "none", "count": 0, "channels": [], **lab.score(truth, truth), "text": lab.write(engine)}
        drawn = random.Random(self.seed)
        total, done = len(self.counts) * (1 + self.draws), 0
        for count in self.counts:
            choices = [("strongest", ranking[:count])]
            choices += [("random", drawn.sample(range(lab.width), count)) for _ in range(self.draws)]
            for name, channels in choices:
                yield lab.progress(f"{count} {name} silenced", 0.1 + 0.9 * done / total)
                done += 1
                with lab.engine(self.contestant, Silence(tuple(channels))) as engine:
                    row = {"silenced": name, "count": count, "channels": list(channels)}
                    yield row | lab.score(lab.read(engine), truth) | {"text": lab.write(engine)}


def harm(results: list[dict]) -> list[dict]:
    """For each count: `strongest` and the median of `random`, as rises of perplexity, and their `ratio`."""
    base = next((row["perplexity"] for row in results if row["silenced"] == "none"), None)
    found = []
    for count in sorted({row["count"] for row in results} - {0}):
        rises = {
            name: [row["perplexity"] - base for row in results if (row["silenced"], row["count"]) == (name, count)]
            for name in ("strongest", "random")
        }
        if all(rises.values()):
            strongest, other = rises["strongest"][0], statistics.median(rises["random"])
            ratio = strongest / other if other > 0 else math.inf  # random ones did no harm at all
            found.append({"count": count, "strongest": strongest, "random": other, "ratio": ratio})
    return found


def strongest_channels(lab: Lab) -> tuple[list[int], list[float]]:
    """Channels of the residual stream by the largest |x| that a layer reads behind a norm, strongest first, and that
    magnitude; from the first 128 tokens of the text."""
    import numpy as np
    import torch

    from llmq.inspect.emergence import stream_inputs
    from llmq.inspect.outliers import observe

    ids = torch.tensor([lab.texts[0][:RANKING_TOKENS]], device=lab.experiment.device)
    with lab.engine(BASELINE, loop="hf") as engine:
        report = observe(engine.model, ids, stop=lab.lease.stop)
    lab.progress("")  # leaves where the reading was stopped
    peaks = np.max([m.prefill.absmax for modules in stream_inputs(report).values() for m in modules], axis=0)
    order = np.argsort(-peaks, kind="stable")
    return order.tolist(), peaks[order].tolist()


@dataclass(frozen=True, kw_only=True)
class Amplifying(Experiment):
    """Make `channels` louder by each of `factors`, and ask every method about the same text. None: channels spread
    evenly, `spread` of them."""

    kind = "amplifying"
    factors: tuple[float, ...] = (1, 64)
    channels: tuple[int, ...] | None = None
    spread: int = 3
    contestants: tuple[Contestant, ...] = AMPLIFIED_METHODS

    def __post_init__(self):
        super().__post_init__()
        for factor in self.factors or (None,):
            Amplify((), factor)
        if self.channels is not None and not self.channels:
            raise BadChoice("no channel is named; name one or more, such as 7 or 7,19")
        if isinstance(self.spread, bool) or not isinstance(self.spread, int) or not 1 <= self.spread <= MOST_SILENCED:
            raise BadChoice(f"spread is {self.spread!r}; choose a whole number from 1 to {MOST_SILENCED}")

    def conditions(self) -> dict:
        return {"largest_factor": LARGEST_FACTOR}

    def measure(self, lab: Lab) -> Rows:
        channels = self.channels_of(lab.width)
        require_channels(channels, lab.width)
        with lab.engine(BASELINE) as engine:
            yield lab.progress("FP16 reads the text", 0.0)
            truth = lab.read(engine)
        total = len(self.factors) * len(self.contestants)
        for number, (factor, contestant) in enumerate(self._pairs()):
            yield lab.progress(f"{contestant.label} at s = {factor:g}", 0.05 + 0.95 * number / total)
            edit = Amplify(channels, factor) if factor != 1 else None
            with lab.engine(contestant, edit) as engine:
                found = lab.read(engine)
            change = max((a - b).abs().max().item() for a, b in zip(found, truth, strict=True))
            row = {"factor": factor, "method": contestant.label, "channels": list(channels)}
            yield row | lab.score(found, truth) | {"largest_logit_change": change}

    def _pairs(self) -> Iterator[tuple[float, Contestant]]:
        return ((factor, contestant) for factor in self.factors for contestant in self.contestants)

    def channels_of(self, width: int) -> tuple[int, ...]:
        """The channels meant, in a stream of `width`."""
        if self.channels is not None:
            return self.channels
        spread = min(self.spread, width)
        return tuple(width * (2 * i + 1) // (2 * spread) for i in range(spread))
