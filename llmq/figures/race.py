"""Methods beside one another: what each loses against what it weighs, and how fast each is. No gradio, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmq.figures.palette import named
from llmq.figures.style import escape, new_figure, style
from llmq.formatting import LOOPS

if TYPE_CHECKING:
    import plotly.graph_objects as go

LINEAR = 1.0  # per cent of perplexity up to where the axis is about linear
TICKS = (-10, -3, -1, 0, 1, 3, 10, 30, 100, 1_000, 10_000, 100_000, 1_000_000)
ROOM = 0.12  # of the width, left and right of the points
GAP, LETTER, LINE = (
    0.008,
    0.0085,
    0.035,
)  # shares of a figure 800 by 450 pixels: beside a point, a letter, a line's height
SQUASHED = 30.0  # per cent from where on a linear axis would squash the rest


def trade_off_figure(rows: Sequence[dict]) -> go.Figure:
    """Bytes against perplexity change in per cent, with its paired interval. `rows`: `name`, `bytes`,
    `perplexity_change`, `perplexity_change_interval`, `kl_to_fp16`, `emulated`."""
    figure = new_figure()
    reach = max(100 * row["perplexity_change_interval"][1] for row in rows)
    place = _symlog if reach > SQUASHED else float
    left, right = _margins([row["bytes"] / 1e6 for row in rows])
    heights = [place(100 * row["perplexity_change"]) for row in rows]
    low, high = min(heights), max(heights) or 1.0
    shares = [
        ((row["bytes"] / 1e6 - left) / (right - left), (y - low) / (high - low or 1.0))
        for row, y in zip(rows, heights, strict=True)
    ]
    sides = _sides([(*share, len(row["name"])) for share, row in zip(shares, rows, strict=True)])
    placed = [row | {"side": side} for row, side in zip(rows, sides, strict=True)]
    for emulated in (False, True):
        _points(figure, [row for row in placed if bool(row.get("emulated")) == emulated], place, emulated)
    style(figure, "What each method loses, and what memory it takes", height=560)
    figure.update_layout(
        xaxis={"title": {"text": "weights (MB)"}, "range": [left, right]},
        yaxis={"title": {"text": "perplexity change (%)" + ", logarithmic beyond 1 %" * (place is _symlog)}},
    )
    if place is _symlog:
        lowest = min(100 * row["perplexity_change_interval"][0] for row in rows)
        ticks = [tick for tick in TICKS if min(lowest, 0) * 1.2 - 1 <= tick <= reach * 3]
        figure.update_layout(yaxis={"tickvals": [_symlog(t) for t in ticks], "ticktext": [f"{t:,}" for t in ticks]})
    return figure


def _margins(values: Sequence[float]) -> tuple[float, float]:
    """Where an axis begins and ends that leaves room for names beside the outermost points."""
    room = ROOM * (max(values) - min(values) or max(values))
    return min(values) - room, max(values) + room


def _sides(points: Sequence[tuple[float, float, int]]) -> list[str]:
    """Where the name of each point stands: right of it, or else left, above or below, where it stays inside and covers
    no other name or point. `points`: shares of the width and of the height, and how many letters."""
    taken: list[tuple[float, float, float]] = [(x, x, y) for x, y, _ in points]  # from, to, and how high
    sides = [""] * len(points)
    for number in sorted(range(len(points)), key=lambda number: points[number][1]):
        x, y, letters = points[number]
        far = GAP + letters * LETTER
        places = {
            f"{height} {side}": (x + a, x + b, y + up)
            for height, up in (("middle", 0), ("top", LINE), ("bottom", -LINE))
            for side, a, b in (("right", GAP, far), ("left", -far, -GAP))
        }
        free = (
            side for side, place in places.items() if 0 <= place[0] and place[1] <= 1 and not _covered(place, taken)
        )
        sides[number] = side = next(free, "middle right" if x < 0.5 else "middle left")
        taken.append(places[side])
    return sides


def _covered(place: tuple[float, float, float], taken: Sequence[tuple[float, float, float]]) -> bool:
    begin, end, y = place
    return any(begin < b and a < end and abs(y - height) < LINE for a, b, height in taken)


def _points(figure: go.Figure, rows: Sequence[dict], place, emulated: bool) -> None:
    """One series; each name stands at its row's `side`."""
    rows = sorted(rows, key=lambda row: row["perplexity_change"])
    values = [100 * row["perplexity_change"] for row in rows]
    lows, highs = ([100 * row["perplexity_change_interval"][end] for row in rows] for end in (0, 1))
    ys = [place(value) for value in values]
    figure.add_scatter(
        x=[row["bytes"] / 1e6 for row in rows], y=ys, mode="markers+text",
        name="emulated: no speed of its own" if emulated else "multiplied as stored",
        text=[escape(row["name"]) for row in rows],
        textposition=[row["side"] for row in rows], cliponaxis=False,
        marker={"color": named(f"line-{int(emulated)}"), "size": 10, "symbol": "square-open" if emulated else "circle"},
        error_y={
            "type": "data", "symmetric": False, "thickness": 1, "width": 4,
            "array": [place(high) - y for high, y in zip(highs, ys, strict=True)],
            "arrayminus": [y - place(low) for low, y in zip(lows, ys, strict=True)],
        },
        customdata=[
            [value, low, high, row["kl_to_fp16"]]
            for value, low, high, row in zip(values, lows, highs, rows, strict=True)
        ],
        hovertemplate="%{text}<br>%{x:,.1f} MB<br>perplexity %{customdata[0]:+.3~g} % (%{customdata[1]:+.3~g} to "
        "%{customdata[2]:+.3~g})<br>KL %{customdata[3]:.3~g}<extra></extra>",
    )  # fmt: skip


def speeds_figure(rows: Sequence[dict]) -> go.Figure:
    """Decode against FP16 of the same loop. `rows`: `name`, `engine`, `tokens_per_second`, `fp16_tokens_per_second`."""
    figure = new_figure()
    figure.add_bar(
        x=[row["tokens_per_second"] / row["fp16_tokens_per_second"] for row in rows],
        y=[escape(f"{row['name']} ({LOOPS[row['engine']]})") for row in rows], orientation="h",
        customdata=[row["tokens_per_second"] for row in rows], marker={"color": named("line-0")}, showlegend=False,
        hovertemplate="%{y}: %{customdata:.3~g} tok/s, %{x:.2f} times FP16<extra></extra>",
    )  # fmt: skip
    style(figure, "Decode speed against FP16 in the same loop", height=120 + 40 * len(rows))
    figure.update_layout(
        xaxis={"title": {"text": "times FP16"}, "rangemode": "tozero"}, yaxis={"autorange": "reversed"}
    )
    return figure


def _symlog(per_cent: float) -> float:
    """Linear near 0, logarithmic beyond LINEAR, on both sides."""
    return math.copysign(math.log10(1 + abs(per_cent) / LINEAR), per_cent)
