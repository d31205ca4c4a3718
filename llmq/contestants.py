"""Who takes part: a method and its settings, in the words people type. Plain records, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmq.errors import BadChoice
from llmq.quant import method_named
from llmq.quant.handler import DEFAULT_THRESHOLD

MAX_THRESHOLD = 65504  # the largest FP16 number: nothing a 16-bit activation holds is above it


def _possible(threshold: float) -> bool:
    return 0 <= threshold <= MAX_THRESHOLD or threshold == math.inf


@dataclass(frozen=True)
class Contestant:
    """A method and, where it has one, its outlier threshold. `bnb-int8@0` names both in one word."""

    method: str
    threshold: float | None = None

    def __post_init__(self):
        has_threshold = method_named(self.method).handler.has_threshold
        if not has_threshold and self.threshold is not None:
            raise BadChoice(f"{self.method} has no outlier threshold to set to {self.threshold}")
        if has_threshold and not (isinstance(self.threshold, int | float) and _possible(self.threshold)):
            raise BadChoice(f"threshold is {self.threshold!r}; choose a number from 0 (off) to {MAX_THRESHOLD}, or inf")

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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadChoice(f"threshold is {text!r}; choose a number from 0 (off) to {MAX_THRESHOLD}, or inf") from None
