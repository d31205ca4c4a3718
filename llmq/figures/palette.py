"""The colours of the page, of every figure and of every written page, by name, light and dark. No gradio.

A figure is made once, with names for colours: `named("grid")`. A style sheet with `properties` says what the names mean
where the figure is shown; the script `PAINT` puts those colours in, and again when that place turns light or dark.
"""

from __future__ import annotations

STEPS = 12  # colours of each ramp
KL_EDGES = (0.001, 0.01, 0.1, 1.0)  # nats from which on a token has the shade kl-1, kl-2, kl-3, kl-4
KL_SHARES = (0.10, 0.20, 0.34, 0.48)  # of line-1 in those shades; the rest is the surface
# Name -> light, dark. `line-N` draws contestant N's curves, `text-N` writes about it.
COLORS = {
    "page": ("#f6f8fa", "#0f151d"),
    "surface": ("#ffffff", "#182029"),
    "ink": ("#1a2433", "#e8edf3"),
    "ink-soft": ("#526071", "#a8b4c2"),
    "grid": ("#d8dee6", "#364350"),
    "accent": ("#23496f", "#a9cdf0"),
    "accent-strong": ("#18344f", "#cfe3f7"),
    "on-accent": ("#ffffff", "#0f1a26"),
    "link": ("#0b5c9c", "#8ec5f5"),
    "danger": ("#b3261e", "#ff9d94"),
    "line-0": ("#0072b2", "#56b4e9"),
    "line-1": ("#d55e00", "#f0904a"),
    "line-2": ("#009070", "#3cc79a"),
    "text-0": ("#00629b", "#7cc4ee"),
    "text-1": ("#a94600", "#f5a468"),
    "text-2": ("#00704f", "#5cd3ab"),
}
# The heatmaps' colours under and over the threshold, `under-0` to `over-11`, and of what a part costs, `harm-0` to
# `harm-11`: the ends and the middle of each ramp.
RAMPS = {
    "under": (("#f4f6f9", "#d9e3ed", "#b3c7dc"), ("#111a28", "#1b3351", "#2c4d77")),
    "over": (("#e07b1a", "#b03a0b", "#4f1704"), ("#d17f12", "#f7b944", "#fff4d6")),
    "harm": (("#eef1f5", "#e5a05c", "#6b1f04"), ("#1d2733", "#a8601f", "#ffe7b3")),
}


def _blend(one: str, other: str, share: float) -> str:
    """The colour `share` of the way from one '#rrggbb' to the other, in sRGB."""
    pairs = [(int(one[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _ramp(name: str, low: str, middle: str, high: str) -> dict[str, str]:
    at = [2 * step / (STEPS - 1) for step in range(STEPS)]
    return {f"{name}-{i}": _blend(low, middle, t) if t < 1 else _blend(middle, high, t - 1) for i, t in enumerate(at)}


def _palette(side: int) -> dict[str, str]:
    colors = {name: pair[side] for name, pair in COLORS.items()}
    for name, ends in RAMPS.items():
        colors |= _ramp(name, *ends[side])
    shades = enumerate(KL_SHARES, 1)
    return colors | {f"kl-{level}": _blend(colors["surface"], colors["line-1"], share) for level, share in shades}


LIGHT, DARK = _palette(0), _palette(1)
# painted(figure, place): a copy of a figure's JSON with the colours that its names have at `place`, an element.
PAINT = r"""
const painted = (figure, place) => {
  const style = getComputedStyle(place);
  return JSON.parse(JSON.stringify(figure).replace(/"var\((--llmq-[\w-]+)\)"/g,
    (_, name) => JSON.stringify(style.getPropertyValue(name).trim())));
};
"""


def named(name: str) -> str:
    """The colour of a figure that the palettes call `name`; neither plotly nor an image knows it until painted."""
    return f"var(--llmq-{name})"


def properties(palette: dict[str, str]) -> str:
    """The palette as custom properties of a style sheet, for the inside of a rule."""
    return " ".join(f"--llmq-{name}: {value};" for name, value in palette.items())
