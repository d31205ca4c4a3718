"""Rounds in which everybody has a turn, and what they come to: medians, spreads, ratios within a round.

A machine that others use too slows all turns of a round alike, so the figures to trust are the ratios within a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import TypeVar

from llmq.formatting import WIDE, spread_of

T = TypeVar("T")
SCHEDULE = "everybody in turn, round by round"
ALONE = "one after the other"


def turns(sides: Sequence[T], number: int) -> Iterator[T]:
    """Everybody once; in the next round another one comes first, as who comes later may find warmer caches."""
    first = number % len(sides)
    yield from (*sides[first:], *sides[:first])


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median, the lowest and the highest beside it, and how far these lie apart over the median."""
    low, middle, high = min(values), statistics.median(values), max(values)
    found = {name: middle, f"{name}_min": low, f"{name}_max": high}
    return found | {f"{name}_spread": spread_of(low, middle, high)}


def ratio(name: str, own: Sequence[float], other: Sequence[float] | None, *, rounds: bool = True) -> dict:
    """The ratios of the rounds, in each of which both sides saw the same machine; without `rounds` what the medians
    are to each other, and None where there is no other."""
    if not own or not other:
        return {name: None}
    if not rounds:
        return {name: statistics.median(own) / statistics.median(other)}
    return spread(name, [a / b for a, b in zip(own, other, strict=True)])


def wide_figures(row: dict) -> Iterator[str]:
    """A sentence for every figure of a row that is no result yet: its rounds lie too far apart."""
    for key, width in row.items():
        if key.endswith("_spread") and width >= WIDE:
            name = key.removesuffix("_spread")
            yield f"{name} spreads {width:.0%} (highest less lowest round, over the median)"


def spread_of_key(row: dict, key: str) -> float | None:
    """How far the rounds of a figure lie apart, of an older ratio to another method those of its speed; None where they
    are not known."""
    key = "tokens_per_second" if key.startswith("over_") and f"{key}_min" not in row else key
    if row.get(key) is None or f"{key}_min" not in row:
        return None
    return spread_of(row[f"{key}_min"], row[key], row[f"{key}_max"])
