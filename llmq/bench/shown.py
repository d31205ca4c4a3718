"""How a measured figure stands in a table, and what the caption says of how it was measured.

A figure whose rounds lie apart says so in its cell. Older results have no key 'rounds' or 'notes': what they say
follows from those that they have.
"""

from __future__ import annotations

from llmq.bench.rounds import SCHEDULE
from llmq.formatting import format_seconds, shown_spread

SPREAD = "Spread: the highest less the lowest, over the median, from 10 % on."


def drawn(rows: list[str], note: str, *results: dict) -> str:
    """The rows above their caption, which ends with what speaks against the figures."""
    against = [SPREAD] if any("spread" in row for row in rows) else []
    against += [f"{said[0].upper()}{said[1:]}." for result in results for said in result.get("notes", ())]
    return "\n".join([*rows, "", f"*{' '.join([note, *dict.fromkeys(against)])}*"])


def ranged(row: dict, name: str, form: str = ".1f", unit: str = "") -> str:
    """A median with the lowest and the highest; '–' where nothing was measured."""
    if row[name] is None:
        return "–"
    low, middle, high = (row[f"{name}{end}"] for end in ("_min", "", "_max"))
    return f"{middle:{form}}{unit} ({low:{form}}–{high:{form}}{shown_spread(low, middle, high)})"


def wide(row: dict, name: str) -> str:
    """' (spread 84 %)' behind a figure whose ends are not shown; '' where the rounds are near or not known."""
    if row.get(name) is None or f"{name}_min" not in row:
        return ""
    said = shown_spread(*(row[f"{name}{end}"] for end in ("_min", "", "_max")))
    return said and f" ({said.removeprefix(', ')})"


def lone(row: dict, name: str, form: str = ".1f", unit: str = "") -> str:
    return f"{row[name]:{form}}{unit}{wide(row, name)}"


def seconds(row: dict, name: str) -> str:
    return f"{format_seconds(row[name])}{wide(row, name)}"


def times(row: dict, name: str, form: str = ".2f") -> str:
    """A ratio; '' where there is none."""
    return "" if row[name] is None else f"{row[name]:{form}}×{wide(row, name)}"


def length(conditions: dict) -> str:
    new = f", {conditions['new_tokens']:,} new tokens" if "new_tokens" in conditions else ""
    return f"{conditions['prompt_tokens']:,} prompt tokens{new}"


def schedule(conditions: dict) -> str:
    repeats = conditions["repeats"]
    if conditions.get("rounds", conditions.get("schedule") == SCHEDULE):
        return f"medians of {repeats} rounds in which everybody ran in turn, ratios within a round"
    return f"median of {repeats} runs, one method after the other"


def reading(result: dict) -> str:
    """How fast memory was read meanwhile."""
    spread = wide(result, "read_bandwidth_bytes_per_second")
    return f"reading memory at {result['read_bandwidth_bytes_per_second'] / 1e9:,.0f} GB/s{spread} in the same run"


def weights(conditions: dict) -> str:
    random = "random weights, so the text means nothing"
    return random if conditions["random_weights"] else conditions["model_revision"]


def origin(conditions: dict) -> str:
    versions = (f"{name} {conditions['versions'][name]}" for name in ("torch", "transformers", "bitsandbytes"))
    return f"{', '.join(versions)}; {conditions['date'][:10]}{commit(conditions)}"


def days(*results: dict) -> str:
    """When they were measured."""
    return ", ".join(sorted({result["conditions"]["date"][:10] for result in results}))


def commit(conditions: dict) -> str:
    """', commit 986bc71'; with the changes that it did not have."""
    if not (found := conditions.get("commit")):
        return ""
    return f", commit {found[:7]}" + " and changes not in it" * found.endswith("-dirty")
