"""The colours of the page, by name, light and dark; figures and style sheet take them from here. No gradio."""

from __future__ import annotations

# Name -> colour; `line-N` draws contestant N's curves, `text-N` writes about it.
LIGHT = {
    "page": "#f6f8fa",
    "surface": "#ffffff",
    "ink": "#1a2433",
    "ink-soft": "#526071",
    "grid": "#d8dee6",
    "accent": "#23496f",
    "accent-strong": "#18344f",
    "on-accent": "#ffffff",
    "link": "#0b5c9c",
    "danger": "#b3261e",
    "line-0": "#0072b2",
    "line-1": "#d55e00",
    "line-2": "#009070",
    "text-0": "#00629b",
    "text-1": "#a94600",
    "text-2": "#00704f",
}
DARK = {
    "page": "#0f151d",
    "surface": "#182029",
    "ink": "#e8edf3",
    "ink-soft": "#a8b4c2",
    "grid": "#364350",
    "accent": "#a9cdf0",
    "accent-strong": "#cfe3f7",
    "on-accent": "#0f1a26",
    "link": "#8ec5f5",
    "danger": "#ff9d94",
    "line-0": "#56b4e9",
    "line-1": "#f0904a",
    "line-2": "#3cc79a",
    "text-0": "#7cc4ee",
    "text-1": "#f5a468",
    "text-2": "#5cd3ab",
}


def contestant_line(index: int, *, dark: bool = False) -> str:
    """The curve colour of the contestant in pane `index` (0, 1 or 2), as '#rrggbb'."""
    return (DARK if dark else LIGHT)[f"line-{index}"]
