"""The block table of a paged KV cache, and what memory is reserved for. No gradio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmq.figures.palette import named
from llmq.figures.style import new_figure, style

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_NUMBERED = 24  # pages in a row, up to which each has its number


def table_figure(title: str, table: Sequence[Sequence[int]], page: int, filled: Sequence[int]) -> go.Figure:
    """A row for every request, with the pages of its tokens in their order; a page's number says where it lies in
    memory, its colour how full it is. `filled`: tokens of each request."""
    width = max(map(len, table), default=0)
    shares = [
        [min(1.0, (tokens - place * page) / page) for place in range(len(row))] + [None] * (width - len(row))
        for row, tokens in zip(table, filled, strict=True)
    ]
    numbers = [[*map(str, row), *[""] * (width - len(row))] for row in table]
    figure = new_figure({
        "type": "heatmap", "z": shares, "text": numbers, "x": list(range(width)),
        "y": [f"request {number}" for number in range(1, len(table) + 1)],
        "texttemplate": "%{text}" if width <= MOST_NUMBERED else None, "textfont": {"color": named("ink")},
        "colorscale": [(0, named("under-2")), (1, named("under-11"))], "zmin": 0, "zmax": 1, "showscale": False,
        "hovertemplate": "%{y}, tokens from " + f"%{{x}} × {page}<br>page %{{text}}, %{{z:.0%}} full<extra></extra>",
        "hoverongaps": False, "xgap": 2, "ygap": 2,
    })  # fmt: skip
    style(figure, title, height=190 + 28 * len(table))
    plain = {"showgrid": False, "zeroline": False}
    figure.update_layout(
        xaxis={"title": {"text": f"page of {page} tokens"}, "dtick": max(1, width // 12), **plain},
        yaxis={"autorange": "reversed", "type": "category", **plain},
    )
    return figure
