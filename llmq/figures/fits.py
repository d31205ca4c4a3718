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
ROW, TOP, BOTTOM = 58, 64, 84  # pixels of a bar with its words, and of the margins
WIDTH, LINE = 118, 18  # of a line of text: characters that a picture 900 pixels wide has room for, pixels


@dataclass(frozen=True)
class Need:
    """A method: its name, what is `told` of it, and the bytes of its parts."""

    name: str
    told: str
    parts: tuple[int, int, int]
    fits: bool | None


def fits_figure(title: str, needs: Sequence[Need], usable: float, place: str) -> go.Figure:
    """Stacked bars of GB (1e9 bytes), and the line that they must not cross."""
    figure, places = new_figure(), [-number for number in range(len(needs))]
    for index, (part, color) in enumerate(PARTS.items()):
        figure.add_bar(
            y=places, x=[need.parts[index] / 1e9 for need in needs], name=part, orientation="h", width=0.34,
            marker={"color": named(color)}, customdata=[f"{need.name}, {part}" for need in needs],
            hovertemplate="%{customdata}: %{x:.3~g} GB<extra></extra>",
        )  # fmt: skip
    style(figure, f"<b>{escape(title)}</b>", height=TOP + BOTTOM + ROW * len(needs))
    limit, longest = usable / 1e9, max(sum(need.parts) for need in needs) / 1e9
    figure.update_layout(
        barmode="stack", margin={"l": 24, "t": TOP, "b": BOTTOM}, title_pad_l=24, title_yanchor="top",
        title_y=1 - LINE / figure.layout.height,
        legend={"y": 0, "yref": "container", "yanchor": "bottom", "traceorder": "normal"},
        xaxis={"title": {"text": "GB", "font": {"size": 13}, "standoff": 4}, "range": [0, 1.04 * max(limit, longest)],
               "showgrid": False, "ticks": "outside", "tickcolor": named("grid")},
        yaxis={"visible": False, "range": [0.4 - len(needs), 0.75]},
    )  # fmt: skip
    for level, need in zip(places, needs, strict=True):
        text = f"<b>{escape(need.name)}</b> {VERDICTS[need.fits]} {escape(need.told)}"
        figure.add_annotation(x=0, y=level + 0.36, text=text, showarrow=False, xanchor="left", bgcolor=named("surface"))
    figure.add_vline(x=limit, line={"color": named("ink"), "dash": "dot"})
    figure.add_annotation(
        x=limit, y=1, yref="paper", yanchor="bottom", text=f"{format_bytes(usable)} may be used on {escape(place)}",
        showarrow=False, xanchor="right" if limit > longest / 2 else "left", font={"color": named("ink-soft")},
    )  # fmt: skip
    return figure


def with_words(figure: go.Figure, above: str, below: str) -> go.Figure:
    """A picture of it that says everything itself: `above` under its title, `below` under its axis."""
    over, under = ([escape(line) for line in textwrap.wrap(text, WIDTH)] for text in (above, below))
    title = "<br>".join([figure.layout.title.text, *(f"<span style='font-size:13px'>{line}</span>" for line in over)])
    margin = {"t": TOP + LINE * len(over), "b": BOTTOM + LINE * len(under)}
    height = figure.layout.height + LINE * (len(over) + len(under))
    figure.update_layout(title_text=title, title_y=1 - LINE / height, margin=margin, height=height)
    figure.update_layout(legend={"y": LINE * (len(under) + 0.5) / height})
    figure.add_annotation(
        x=0, y=0, xref="paper", yref="paper", yshift=-BOTTOM, text="<br>".join(under), showarrow=False,
        xanchor="left", yanchor="top", align="left", font={"size": 12, "color": named("ink-soft")},
    )  # fmt: skip
    return figure
