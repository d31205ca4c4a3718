"""Annotated fields: from one declaration follow the parser, the error, the flag, the control and the spelling.

A frozen dataclass (a method, a lab) annotates a field once, `threshold: Annotated[float, Number(0, 20)]`; the command
line, the page and the grammar of names ask here and know no field by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, ClassVar, get_type_hints

from llmq.errors import BadChoice, unknown


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a field may hold. `named`: what messages call it; `label`: what the page calls it; `flag`: its option at
    the command line (default: the field's name); `holds`: the type of its values."""

    help: str = ""
    label: str = ""
    named: str = ""
    flag: str = ""
    holds: ClassVar[Any] = object

    def parse(self, name: str, text: str) -> Any:
        """`text` as a value. Raises BadChoice naming field, value and what can be chosen."""
        return self.check(name, text)

    def read(self, name: str, text: str, defaults: Mapping[str, Any]) -> Any:
        """As `parse`; `defaults`: settings that are meant wherever a method has them and its name does not say."""
        return self.parse(name, text)

    def check(self, name: str, value: Any) -> Any:
        """`value` unchanged. Raises BadChoice where the field cannot hold it."""
        if not isinstance(value, self.holds):
            raise BadChoice(f"{name} cannot be {value!r:.80}, of the type {type(value).__name__}")
        return value

    def spell(self, value: Any) -> str:
        """The value as people type it."""
        return str(value)


@dataclass(frozen=True)
class Number(Kind):
    """A number from `low` to `high`. `whole`: no fractions; `infinite`: also 'inf'; `zero`: what 0 means, in a word;
    `optional`: None is a value too, which `none` is the word for. `shown`: the largest value that a slider offers;
    `step`: between its stops."""

    low: float
    high: float
    whole: bool = False
    infinite: bool = False
    zero: str = ""
    optional: bool = False
    none: str = ""
    shown: float | None = None
    step: float | None = None

    def parse(self, name: str, text: str) -> float | None:
        if self.none and text == self.none:
            return None
        try:
            value = float(text)
        except (TypeError, ValueError):
            raise self._refusal(name, text) from None
        return self.check(name, int(value) if self.whole and value.is_integer() else value)

    def check(self, name: str, value: Any) -> Any:
        if value is None and self.optional:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        within = number and (self.low <= value <= self.high or (self.infinite and value == math.inf))
        if not within or (self.whole and not isinstance(value, int)):
            raise self._refusal(name, value)
        return value

    def _refusal(self, name: str, value: Any) -> BadChoice:
        kind, low = "whole number" if self.whole else "number", f"{self.low:g}"
        low += f" ({self.zero})" if self.zero and self.low == 0 else ""
        end = ", or inf" if self.infinite else f", or {self.none}" if self.none else ""
        return BadChoice(f"{name} is {value!r:.80}; choose a {kind} from {low} to {self.high:.12g}{end}")

    def spell(self, value: float | None) -> str:
        return self.none if value is None else f"{value:g}"


@dataclass(frozen=True)
class Choice(Kind):
    """One of `choices`, by name; `labels`: what the page calls them."""

    choices: tuple[str, ...]
    labels: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> Any:
        if value not in self.choices:
            raise unknown(name, value, self.choices)
        return value


@dataclass(frozen=True)
class Numbers(Kind):
    """Numbers with commas between them, as a tuple; `each` says which. `empty`: what giving none means, where that is
    possible. `start`: where a slider for one of them begins; `live`: moving it asks anew."""

    each: Number
    empty: str = ""
    start: float | None = None
    live: bool = False

    def parse(self, name: str, text: str) -> tuple | None:
        parts = [part.strip() for part in str(text).split(",")]
        return self.check(name, None if parts == [""] else tuple(self.each.parse(name, part) for part in parts))

    def check(self, name: str, value: Any) -> Any:
        if value is None and self.empty:
            return None
        if not value:
            raise BadChoice(f"no {name} is given; write numbers with commas between them")
        for number in value:
            self.each.check(name, number)
        return value

    def spell(self, value: tuple | None) -> str:
        return "" if value is None else ",".join(self.each.spell(number) for number in value)


@dataclass(frozen=True)
class Text(Kind):
    """Free text. `positional`: it stands without a flag; `file`: the option that reads it from a file; `unless`: the
    field that may be given instead of it; `optional`: a positional one may be left out; `names`: words that stand for a
    text of their own, also where a file is asked for."""

    positional: bool = False
    optional: bool = False
    file: str = ""
    names: tuple[str, ...] = ()
    unless: str = ""
    holds: ClassVar[Any] = str | None  # an empty box of a page


@dataclass(frozen=True)
class Switch(Kind):
    """On or off. A switch that is on by default has the flag --no-…"""

    holds: ClassVar[type] = bool

    def parse(self, name: str, text: str) -> bool:
        if text.strip().lower() not in ("on", "off", "true", "false"):
            raise BadChoice(f"{name} is {text!r:.80}; choose on or off")
        return text.strip().lower() in ("on", "true")

    def spell(self, value: bool) -> str:
        return "on" if value else "off"


@dataclass(frozen=True)
class Field:
    """One annotated field of a dataclass: its name, its kind and its default (`MISSING` where there is none)."""

    name: str
    kind: Kind
    default: Any

    @property
    def named(self) -> str:
        return self.kind.named or self.name.replace("_", " ")

    @property
    def flag(self) -> str:
        return self.kind.flag or "--" + self.name.replace("_", "-")


types_of = cache(get_type_hints)  # of a dataclass's fields, by name: found once, since files of strangers ask often


@cache
def fields_of(cls: type) -> tuple[Field, ...]:
    """The annotated fields of a dataclass, in the order of their definition."""
    hints = get_type_hints(cls, include_extras=True)
    return tuple(
        Field(field.name, kind, field.default if field.default_factory is MISSING else field.default_factory())
        for field in fields(cls)
        for kind in getattr(hints[field.name], "__metadata__", ())
        if isinstance(kind, Kind)
    )


def check_fields(record: Any) -> None:
    """Hold every annotated field of `record` against its kind. Raises BadChoice naming the first that is wrong."""
    for field in fields_of(type(record)):
        field.kind.check(field.named, getattr(record, field.name))
