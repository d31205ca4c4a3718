"""What a step of the lesson shows: what is drawn, the numbers that its words name, which choice turned out right, two
numbers to remember, and what was asked of which device and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Exhibit:
    """One step's answer. `data`: drawn; `values`: named by words; `right`: the choice, by question; `asked`: what a
    visitor would ask to see it live, and what it was recorded on; `pair`: two numbers, for a bar each."""

    data: Mapping[str, Any]
    values: Mapping[str, Any]
    right: Mapping[str, str]
    pair: tuple[float, float]
    asked: Mapping[str, Any] = field(default_factory=dict)
