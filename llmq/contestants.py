"""What a comparison is asked to do: the contestants and everything else that decides a run. Plain records, no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from llmq.engine.choice import ENGINES
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice, unknown
from llmq.quant import METHODS, method_named
from llmq.quant.handler import DEFAULT_THRESHOLD

SCHEDULES = ("interleave", "in-turn")
MAX_CONTESTANTS = 3
MAX_THRESHOLD = 65504  # the largest FP16 number: nothing a 16-bit activation holds is above it


def require_threshold(threshold: float | None) -> None:
    """Raises BadChoice for what is no threshold of any method."""
    number = isinstance(threshold, int | float)
    if not (number and (0 <= threshold <= MAX_THRESHOLD or threshold == math.inf)):
        raise BadChoice(f"threshold is {threshold!r}; choose a number from 0 (off) to {MAX_THRESHOLD}, or inf")


@dataclass(frozen=True)
class Contestant:
    """A method and, where it has one, its outlier threshold. `bnb-int8@0` names both in one word."""

    method: str
    threshold: float | None = None

    def __post_init__(self):
        has_threshold = method_named(self.method).handler.has_threshold
        if not has_threshold and self.threshold is not None:
            raise BadChoice(f"{self.method} has no outlier threshold to set to {self.threshold}")
        if has_threshold:
            require_threshold(self.threshold)

    @classmethod
    def parse(cls, text: str, default_threshold: float = DEFAULT_THRESHOLD) -> Contestant:
        """`fp16`, `bnb-int8`, `bnb-int8@3.5`."""
        name, at, threshold = text.strip().partition("@")
        if not method_named(name).handler.has_threshold:
            return cls(name, _number(threshold) if at else None)
        return cls(name, _number(threshold) if at else default_threshold)

    @property
    def label(self) -> str:
        """Unique within a run; the plain method name at the default threshold."""
        plain = self.threshold is None or self.threshold == DEFAULT_THRESHOLD
        return self.method if plain else f"{self.method}@{self.threshold:g}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that decides a run. `device`: 'cpu' or 'cuda:N'."""

    prompt: str
    model: str = "demo"
    contestants: tuple[Contestant, ...] = (Contestant("fp16"), Contestant("bnb-int8", DEFAULT_THRESHOLD))
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    schedule: str = "interleave"
    device: str = "cpu"
    random_weights: bool = False
    engine: str = "auto"

    def __post_init__(self):
        if self.engine not in ENGINES:
            raise unknown("engine", self.engine, ENGINES)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        if not 1 <= len(self.contestants) <= MAX_CONTESTANTS:
            raise BadChoice(
                f"{len(self.contestants)} methods given; choose 1 to {MAX_CONTESTANTS} of {', '.join(METHODS)}"
            )
        labels = [c.label for c in self.contestants]
        if len(set(labels)) < len(labels):
            raise BadChoice(f"the methods {', '.join(labels)} repeat one; choose different methods or thresholds")

    def settings(self) -> dict:
        """As stored in a run: plain JSON."""
        plain = asdict(self)
        plain["contestants"] = [c.label for c in self.contestants]
        return plain


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadChoice(f"threshold is {text!r}; choose a number from 0 (off) to {MAX_THRESHOLD}, or inf") from None
