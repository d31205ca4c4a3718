"""What each method needs beside what may be used: a bar a method, with what is known of it above. No gradio."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.figures.palette import named
from llmq.figures.style import escape, new_figure, style
from llmq.formatting import format_bytes

if TYPE_CHECKING:
    import plotly.graph_objects as go

PARTS = {"weights": "line-0", "KV cache": "line-1", "workspace": "ink-soft"}
VERDICTS = {True: "✓", False: "✕ does not fit,", None: "?"}
LINE, ROW = 105, 58  # characters of a line below the title; pixels of a bar with its words


@dataclass(frozen=True)
class Need:
    """A method: its name, what is `told` of it, and the bytes of its parts."""

    name: str
    told: str
    parts: tuple[int, int, int]
    fits: bool | None


def fits_figure(title: str, needs: Sequence[Need], usable: float, place: str, said: str = "") -> go.Figure:
    """Stacked bars of GB (1e9 bytes) and the line that they must not cross. `said`: wrapped below the title."""
    figure, places = new_figure(), [-number for number in range(len(needs))]
    for index, (part, color) in enumerate(PARTS.items()):
        figure.add_bar(
            y=places, x=[need.parts[index] / 1e9 for need in needs], name=part, orientation="h", width=0.34,
            marker={"color": named(color)}, customdata=[f"{need.name}, {part}" for need in needs],
            hovertemplate="%{customdata}: %{x:.3~g} GB<extra></extra>",
        )  # fmt: skip
    lines = textwrap.wrap(said, LINE)
    told = "".join(f"<br><span style='font-size:13px'>{escape(line)}</span>" for line in lines)
    style(figure, f"{escape(title)}{told}", height=180 + 18 * len(lines) + ROW * len(needs))
    top = max(usable / 1e9, max(sum(need.parts) for need in needs) / 1e9)
    figure.update_layout(
        barmode="stack", margin={"l": 24, "t": 76 + 18 * len(lines)}, title_yanchor="top", title_y=0.98,
        legend={"x": 0, "y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "normal"},
        xaxis={"title": {"text": "GB"}, "range": [0, 1.04 * top]},
        yaxis={"visible": False, "range": [0.4 - len(needs), 0.75]},
    )  # fmt: skip
    for place_of, need in zip(places, needs, strict=True):
        text = f"<b>{escape(need.name)}</b> {VERDICTS[need.fits]} {escape(need.told)}"
        figure.add_annotation(x=0, y=place_of + 0.36, text=text, showarrow=False, xanchor="left", align="left")
    figure.add_vline(x=usable / 1e9, line={"color": named("ink"), "dash": "dot"})
    limit = f"{format_bytes(usable)} may be used on {escape(place)}"
    anchor = "right" if usable / 1e9 > 0.5 * top else "left"
    figure.add_annotation(
        x=usable / 1e9, y=1, yref="paper", yshift=16, text=limit, showarrow=False, xanchor=anchor,
        font={"color": named("ink-soft")},
    )  # fmt: skip
    return figure
