"""Annotated fields: from one declaration follow the parser, the error, the flag, the control and the spelling.

A frozen dataclass (a method, a lab, a benchmark) annotates a field once, `threshold: Annotated[float, Number(0, 20)]`;
the command line, the page and the grammar of names ask here and know no field by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, get_type_hints

from llmq.errors import BadChoice, unknown


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`. `whole`: no fractions; `infinite`: also 'inf'; `zero`: what 0 means, in a word.

    `label` and `help` are for the control; `shown`: the largest value a slider offers.
    """

    low: float
    high: float
    help: str = ""
    label: str = ""
    whole: bool = False
    infinite: bool = False
    zero: str = ""
    shown: float | None = None
    step: float | None = None

    def parse(self, name: str, text: str) -> float:
        """`text` as a number. Raises BadChoice naming field, value and range."""
        try:
            value = float(text)
        except (TypeError, ValueError):
            raise self._refusal(name, text) from None
        return self.check(name, int(value) if self.whole and value.is_integer() else value)

    def check(self, name: str, value: Any) -> Any:
        """`value` unchanged. Raises BadChoice where it is no number of the range."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        within = number and (self.low <= value <= self.high or (self.infinite and value == math.inf))
        if not within or (self.whole and not isinstance(value, int)):
            raise self._refusal(name, value)
        return value

    def _refusal(self, name: str, value: Any) -> BadChoice:
        kind, low = "whole number" if self.whole else "number", f"{self.low:g}"
        low += f" ({self.zero})" if self.zero and self.low == 0 else ""
        end = ", or inf" if self.infinite else ""
        return BadChoice(f"{name} is {value!r:.80}; choose a {kind} from {low} to {self.high:.12g}{end}")

    def spell(self, value: float) -> str:
        """The number as people type it."""
        return f"{value:g}"


@dataclass(frozen=True)
class Choice:
    """One of `choices`, by name."""

    choices: tuple[str, ...]
    help: str = ""
    label: str = ""

    def parse(self, name: str, text: str) -> str:
        return self.check(name, str(text).strip())

    def check(self, name: str, value: Any) -> Any:
        """`value` unchanged. Raises BadChoice naming the choices."""
        if value not in self.choices:
            raise unknown(name, value, self.choices)
        return value

    def spell(self, value: str) -> str:
        return value


@dataclass(frozen=True)
class Numbers:
    """Numbers with commas between them, as a tuple; `each` says which. `empty`: what it means to give none."""

    each: Number
    help: str = ""
    label: str = ""
    empty: str = ""

    def parse(self, name: str, text: str) -> tuple | None:
        parts = [part.strip() for part in str(text).split(",")]
        return self.check(name, None if parts == [""] else tuple(self.each.parse(name, part) for part in parts))

    def check(self, name: str, value: Any) -> Any:
        if not value:
            if self.empty and value is None:
                return None
            raise BadChoice(f"no {name} is given; write numbers with commas between them")
        for number in value:
            self.each.check(name, number)
        return value

    def spell(self, value: Sequence[float] | None) -> str:
        return "" if value is None else ",".join(self.each.spell(number) for number in value)


Kind = Number | Choice | Numbers


@dataclass(frozen=True)
class Field:
    """One annotated field of a dataclass: its name, its kind and its default (`MISSING` where there is none)."""

    name: str
    kind: Kind
    default: Any


@cache
def fields_of(cls: type) -> tuple[Field, ...]:
    """The annotated fields of a dataclass, in the order of their definition."""
    hints = get_type_hints(cls, include_extras=True)
    return tuple(_annotated(cls, hints))


def _annotated(cls: type, hints: dict) -> Iterator[Field]:
    for field in fields(cls):
        for kind in getattr(hints[field.name], "__metadata__", ()):
            if isinstance(kind, Kind):
                default = field.default if field.default_factory is MISSING else field.default_factory()
                yield Field(field.name, kind, default)


def check_fields(record: Any) -> None:
    """Hold every annotated field of `record` against its kind. Raises BadChoice naming the first that is wrong."""
    for field in fields_of(type(record)):
        field.kind.check(field.name.replace("_", " "), getattr(record, field.name))
