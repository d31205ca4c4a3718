"""Who takes part in a comparison: a method with its settings, or a server, in the words people type. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from llmq.errors import BadChoice, UserError
from llmq.fields import Kind, fields_of
from llmq.methods import DEFAULT_THRESHOLD, Method, parse_method
from llmq.servers.served import Served, is_served


@dataclass(frozen=True)
class Contestant:
    """A method with its settings. `bnb-int8@0` names both in one word."""

    method: Method

    @classmethod
    def parse(cls, text: str, default_threshold: float = DEFAULT_THRESHOLD) -> Contestant:
        """`fp16`, `bnb-int8`, `bnb-int8@3.5`, `gptq@bits=4:group=128`. Raises BadChoice naming value and choices."""
        return cls.of(text, {"threshold": default_threshold})

    @classmethod
    def of(cls, text: str, defaults: Mapping[str, Any]) -> Contestant:
        """As `parse`, with values for settings that the name does not give."""
        if is_served(text):
            raise BadChoice(f"{text.strip()[:80]} is a server, which can be compared; nobody here sees its weights")
        return cls(parse_method(text, defaults))

    @classmethod
    def parse_all(cls, text: str, default_threshold: float = DEFAULT_THRESHOLD) -> tuple[Contestant, ...]:
        """Several, with commas between them."""
        return tuple(cls.parse(part, default_threshold) for part in text.split(","))

    @property
    def label(self) -> str:
        """Unique within a run; the plain method name where every setting is the usual one."""
        return self.method.spelled

    @property
    def title(self) -> str:
        """The method as people read it, with the settings that are not the usual ones."""
        _, _, settings = self.label.partition("@")
        if not settings:
            return self.method.label
        first = fields_of(type(self.method))[0].named
        return f"{self.method.label}, {settings if '=' in settings.split(':')[0] else f'{first} {settings}'}"

    def at(self, threshold: float) -> Contestant:
        """The same with another threshold of outlier columns."""
        return Contestant(replace(self.method, threshold=threshold))

    @property
    def about(self) -> str:
        return self.method.about

    @property
    def threshold(self) -> float | None:
        """Of its outlier columns; None for a method that has none."""
        return self.method.threshold


def entrant(text: str, default_threshold: float = DEFAULT_THRESHOLD) -> Contestant | Served:
    """Who may take part in a comparison: a method, or a server such as `vllm@http://host:8000/v1#model`."""
    return Served.parse(text) if is_served(text) else Contestant.parse(text, default_threshold)


def entrants(text: str, default_threshold: float = DEFAULT_THRESHOLD) -> tuple[Contestant | Served, ...]:
    """Several, with commas between them."""
    return tuple(entrant(part, default_threshold) for part in text.split(","))


def shown_name(label: str) -> str:
    """The title of the contestant of a label; the label itself where no method here has it, as in an old recording."""
    try:
        return entrant(label).title
    except UserError:
        return label


def shown_about(label: str) -> str:
    """What the method of a label does, in a sentence or two; '' where no method here has it."""
    try:
        return entrant(label).about
    except UserError:
        return ""


@dataclass(frozen=True)
class OneContestant(Kind):
    """A method by name."""

    help: str = "a method, such as bnb-int8 or llm-int8@3.5"
    holds: ClassVar[type] = Contestant

    def read(self, name: str, text: str, defaults: Mapping[str, Any]) -> Contestant:
        return Contestant.of(text, defaults)

    def spell(self, value: Contestant) -> str:
        return value.label


@dataclass(frozen=True)
class Contestants(Kind):
    """Several methods, with commas between them."""

    help: str = "comma-separated; bnb-int8@0 sets a threshold"
    flag: str = "--methods"
    holds: ClassVar[type] = tuple

    def read(self, name: str, text: str, defaults: Mapping[str, Any]) -> tuple[Contestant, ...]:
        return tuple(Contestant.of(part, defaults) for part in text.split(","))

    def spell(self, value: tuple[Contestant, ...]) -> str:
        return ",".join(contestant.label for contestant in value)
