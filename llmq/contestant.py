"""Who takes part in a comparison: a method with its settings, in the words people type. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from llmq.methods import DEFAULT_THRESHOLD, Method, parse_method


@dataclass(frozen=True)
class Contestant:
    """A method with its settings. `bnb-int8@0` names both in one word."""

    method: Method

    @classmethod
    def parse(cls, text: str, default_threshold: float = DEFAULT_THRESHOLD) -> Contestant:
        """`fp16`, `bnb-int8`, `bnb-int8@3.5`, `gptq@bits=4:group=128`. Raises BadChoice naming value and choices."""
        return cls(parse_method(text, {"threshold": default_threshold}))

    @classmethod
    def parse_all(cls, text: str, default_threshold: float = DEFAULT_THRESHOLD) -> tuple[Contestant, ...]:
        """Several, with commas between them."""
        return tuple(cls.parse(part, default_threshold) for part in text.split(","))

    @property
    def label(self) -> str:
        """Unique within a run; the plain method name where every setting is the usual one."""
        return self.method.spelled

    @property
    def threshold(self) -> float | None:
        """Of its outlier columns; None for a method that has none."""
        return self.method.threshold
