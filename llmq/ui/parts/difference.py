"""The difference in three figures, while a run goes and after it: memory, speed, and the words that are the same.

Plain Python. `shares` are bars' lengths, rounded so that few updates change them; `changes` are held against the first.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmq.formatting import OVER_HTTP
from llmq.summary import Summary

UNKNOWN = {"shares": [], "changes": []}


def difference(summary: Summary, contestants: int) -> dict:
    """`memory` and `speed`, each with `shares` (0 to 1 of the largest) and `changes` ('▼ 39%', '▲ 1.8×'; '' for the
    first) as soon as all `contestants` have a figure, those that never will, of servers, left out; `same` and `parted`:
    how far the first two texts agree."""
    outcomes = list(summary.outcomes.values())
    weights = [0 if one.engine == OVER_HTTP else one.weight_bytes for one in outcomes]
    return {
        "memory": _figure(weights, contestants, _percent),
        "speed": _figure([outcome.decode_tokens_per_second for outcome in outcomes], contestants, _times),
        **_words(summary, contestants),
    }


def _figure(values: Sequence[float | None], contestants: int, told) -> dict:
    """0 is what will not be known."""
    if len(values) < contestants or None in values or not any(values):
        return UNKNOWN
    first, *others = values
    shares = [round(value / max(values), 2) for value in values]
    return {"shares": shares, "changes": ["", *(told(value / first) if first and value else "" for value in others)]}


def _percent(ratio: float) -> str:
    percent = f"{abs(1 - ratio):.0%}"
    return "the same" if percent == "0%" else f"{'▼' if ratio < 1 else '▲'} {percent}"


def about_even(ratio: float) -> bool:
    """Whether speeds whose ratio to the first's this is are called the same: five percent is within one run's noise."""
    return 0.95 <= 1 / ratio <= 1.05


def _times(ratio: float) -> str:
    return "the same" if about_even(ratio) else f"{'▲' if ratio > 1 else '▼'} {max(ratio, 1 / ratio):.1f}×"


def _words(summary: Summary, contestants: int) -> dict:
    texts = [outcome.token_ids for outcome in list(summary.outcomes.values())[:2]]
    if contestants < 2 or len(texts) < 2 or not all(texts):
        return {"same": "", "parted": ""}
    found = summary.agreement()
    same = found["matching_prefix_tokens"]
    parted = "so far" if found["first_divergence"] is None else "then each goes its own way"
    return {"same": f"{same} token{'' if same == 1 else 's'}", "parted": parted}
