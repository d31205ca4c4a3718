"""What grows with the length of a text: panels below one another over tokens, all axes logarithmic. No gradio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.figures.palette import named
from llmq.figures.style import DASHES, MARKS, new_figure, style

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Curve:
    """(tokens, value) points; `number`: its colour, dashes and marks, None for a thin line that is only to compare."""

    name: str
    points: Sequence[tuple[int, float]]
    number: int | None = None


def power_of(name: str, points: Sequence[tuple[int, float]], power: int) -> list[Curve]:
    """The curve that grows as that power of the length and ends where these points end; none where they are no line."""
    if len(points) < 2:
        return []
    last, value = points[-1]
    return [Curve(name, [(n, value * (n / last) ** power) for n, _ in points])]


def lengths_figure(title: str, upper: tuple[str, Sequence[Curve]], lower: tuple[str, Sequence[Curve]]) -> go.Figure:
    """Two panels, each a unit and its curves; a curve of a name that was there above has its entry there."""
    figure, told = new_figure(), set()
    for axis, (unit, curves) in (("y", upper), ("y2", lower)):
        for curve in curves:
            tokens, values = zip(*curve.points, strict=True)
            figure.add_scatter(
                x=tokens, y=values, yaxis=axis, name=curve.name, legendgroup=curve.name,
                showlegend=curve.name not in told, **_look(curve, unit),
            )  # fmt: skip
            told.add(curve.name)
    style(figure, title, height=640)
    lengths = sorted({tokens for trace in figure.data for tokens in trace.x})
    axis = {"type": "log", "dtick": 1, "tickformat": ",~r", "exponentformat": "power"}
    figure.update_layout(
        xaxis={"title": {"text": "tokens (N)"}, "type": "log", "anchor": "y2", "tickvals": lengths,
               "ticktext": [f"{tokens:,}" for tokens in lengths]},
        yaxis=axis | {"title": {"text": upper[0]}, "domain": [0.58, 1]},
        yaxis2=axis | {"title": {"text": lower[0]}, "domain": [0, 0.42]},
    )  # fmt: skip
    return figure


def _look(curve: Curve, unit: str) -> dict:
    if curve.number is None:
        line = {"color": named("ink-soft"), "dash": "dot", "width": 1}
        return {"mode": "lines", "line": line, "hoverinfo": "skip"}
    color = named(f"line-{curve.number}" if curve.number < 3 else "ink-soft")
    return {
        "mode": "lines+markers", "line": {"color": color, "dash": DASHES[curve.number % 4]},
        "marker": {"symbol": MARKS[curve.number % 4], "size": 8, "color": color},
        "hovertemplate": f"{curve.name}<br>%{{x:,}} tokens: %{{y:,.3~r}} {unit}<extra></extra>",
    }  # fmt: skip
