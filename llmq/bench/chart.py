"""Bars of decode speed, with what the weights take and how far the rounds lie apart, as SVG for a document.

Light and dark are two files: a picture in a document does not know the colours of the page around it.
"""

from __future__ import annotations

from html import escape

from llmq.bench import shown
from llmq.contestant import Contestant
from llmq.figures.palette import DARK, LIGHT
from llmq.figures.style import FONT
from llmq.formatting import format_bytes, format_speed, shown_spread

SIDES = {"light": LIGHT, "dark": DARK}
WIDTH, BARS, LONGEST = 600, 246, 190  # pixels: the picture, where bars begin, the fastest round
ROW, BAR, HEADING, NOTE = 27, 17, 36, 18
TEXT, SMALL = 15, 12


def speed_chart(side: str, groups: dict[str, dict]) -> str:
    """The rows of each result below the heading that is its key, on one scale. `side`: 'light' or 'dark'."""
    scale = LONGEST / max(row["tokens_per_second_max"] for result in groups.values() for row in result["results"])
    parts, top = [], 0
    for heading, result in groups.items():
        parts.append(_text(0, top + 22, heading, weight=600))
        top += HEADING
        for row in result["results"]:
            parts += _bar(row, top + ROW / 2, scale)
            top += ROW
    for note in _notes(groups):
        top += NOTE
        parts.append(_text(0, top + 6, note, color="ink-soft", size=SMALL))
    font = f'font-family="{escape(FONT)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + NOTE}" width="{WIDTH}" {font}>'
    return "\n".join([head, *parts, "</svg>\n"]).format_map(SIDES[side])


def _bar(row: dict, y: float, scale: float) -> list[str]:
    """The method, its bar with a line from the slowest round to the fastest, and its figures."""
    contestant = Contestant.parse(row["method"])
    low, middle, high = ends = [row[f"tokens_per_second{end}"] for end in ("_min", "", "_max")]
    color = "{line-0}" if contestant.method.dense else "{line-1}"
    size = format_bytes(row["weight_bytes"] + row.get("scale_bytes", 0))
    return [
        _text(BARS - 10, y + 5, contestant.title, anchor="end"),
        f'<rect x="{BARS}" y="{y - BAR / 2:g}" width="{middle * scale:.1f}" height="{BAR}" fill="{color}"/>',
        f'<path d="M{BARS + low * scale:.1f} {y:g}H{BARS + high * scale:.1f}" stroke="{{ink}}" stroke-width="2"/>',
        _text(BARS + high * scale + 8, y + 5, f"{format_speed(middle)} · {size}{shown_spread(*ends)}"),
    ]


def _notes(groups: dict[str, dict]) -> list[str]:
    """What was measured, on what and how."""
    conditions = [result["conditions"] for result in groups.values()]
    devices, prompts, new = (
        ", ".join(dict.fromkeys(str(c[name]) for c in conditions))
        for name in ("device_name", "prompt_tokens", "new_tokens")
    )
    return [
        f"{devices}, {shown.days(*groups.values())}. LLaMA-2-7B's shape with random weights.",
        f"Decode, batch 1: {prompts} prompt tokens, then {new} new, below one heading after the other.",
        "GB: weights with scales. Lines: slowest to fastest round; everybody has a turn in each.",
    ]


def _text(x: float, y: float, words: str, *, color="ink", size=TEXT, weight=400, anchor="start") -> str:
    where = f'x="{x:.0f}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text {where} fill="{{{color}}}">{escape(words)}</text>'
