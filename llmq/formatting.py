"""The one place that turns numbers into text for a reader: bytes, seconds, tokens per second, counts.

Every function accepts None (not known, or not yet) and answers with `MISSING`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

MISSING = "–"
WIDE = 0.1  # the spread of repeats from which on a figure says so
OVER_HTTP = "http"  # the loop of a server
LOOPS = {"hf": "transformers", "lean": "the lean loop", OVER_HTTP: "a server, over HTTP"}  # by their names in results
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _three_digits(value: float) -> str:
    """About three significant digits, never an exponent: 1.23, 12.3, 123, 1,234."""
    magnitude = abs(value)
    return f"{value:,.{2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0}f}"


def format_bytes(count: float | None) -> str:
    """Bytes in decimal units, as GPU makers and disks count them: 1 GB is 1e9 bytes."""
    if not _known(count):
        return MISSING
    power = 0
    while abs(count) >= 999.5 and power < len(BYTE_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.0f} B" if power == 0 else f"{_three_digits(count)} {BYTE_UNITS[power]}"


def format_seconds(seconds: float | None) -> str:
    """A duration: milliseconds below one second, minutes from one minute on."""
    if not _known(seconds):
        return MISSING
    if abs(seconds) < 0.9995:
        return f"{_three_digits(seconds * 1000)} ms"
    if abs(seconds) < 59.5:
        return f"{_three_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def format_joules(joules: float | None) -> str:
    """Energy: millijoules below one joule."""
    if not _known(joules):
        return MISSING
    return f"{_three_digits(joules)} J" if abs(joules) >= 0.9995 else f"{_three_digits(joules * 1000)} mJ"


def format_number(value: float) -> str:
    """A figure of any size as people read it, in four digits or up to the point: 0.01234, 17.53, 12,594, 20,220,000."""
    size = abs(value)
    if not 1000 <= size < 1e12:
        return f"{value:.4g}"
    return f"{round(value, min(0, 3 - int(math.log10(size))) if size >= 1e5 else 0):,.0f}"


def format_speed(tokens_per_second: float | None) -> str:
    """Decode speed in tokens per second."""
    return f"{_three_digits(tokens_per_second)} tok/s" if _known(tokens_per_second) else MISSING


def spread_of(low: float, middle: float, high: float) -> float:
    """How far repeats of one measurement lie apart: the highest less the lowest, over their median."""
    return (high - low) / middle


def shown_spread(low: float, middle: float, high: float) -> str:
    """', spread 84 %' where repeats lie WIDE apart or further; '' elsewhere."""
    told = wide(spread_of(low, middle, high))
    return f", {told}" if told else ""


def wide(width: float) -> str:
    """'spread 84 %' where a spread is WIDE or more; '' elsewhere."""
    return f"spread {width:.0%}".replace("%", " %") if width >= WIDE else ""


def quoted(text: str, longest: int = 30) -> str:
    """A piece of text as people read it: white space that stands alone and line breaks get a sign."""
    shown = text.replace("\n", "⏎").strip(" ") or "␣"
    return f"“{shown if len(shown) <= longest else shown[:longest] + '…'}”"


def format_count(count: int | None) -> str:
    """A whole number with thousands separators."""
    return f"{count:,}" if _known(count) else MISSING


def format_share(share: float | None) -> str:
    """A share of 1 in per cent, small ones with the digits they need."""
    if not _known(share):
        return MISSING
    return f"{share:.0%}" if share == 0 or share >= 0.1 else f"{100 * share:.2g} %".replace(" %", "%")


def format_change(change: float) -> str:
    """How far one figure lies from another: '+1.4 %'."""
    return f"{100 * change:+.1f} %"


def shown_coverage(shares: Mapping[str, float]) -> str:
    """Which share of a model a method stores in 8 bit, in words; '' where nothing is, or nothing is known."""
    if not shares.get("all"):
        return ""
    return f"{format_share(shares['linear'])} of linear, {format_share(shares['all'])} of all weights"


def plain_json(value):
    """`value` with None for every number that is not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: plain_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
