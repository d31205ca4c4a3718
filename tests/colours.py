"""Contrast as WCAG 2.2 computes it, and figures in the colours of one palette."""

from __future__ import annotations

import json
import re


def luminance(colour: str) -> float:
    """Relative luminance of '#rrggbb'."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def painted(figure, palette: dict[str, str]) -> dict:
    """A figure's JSON as a browser paints it."""
    return json.loads(re.sub(r"var\(--llmq-([\w-]+)\)", lambda name: palette[name[1]], figure.to_json()))


def rgb(colour: str) -> str:
    """'#rrggbb' as a browser says it."""
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"
