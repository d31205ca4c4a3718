"""How many earlier choices a later token flips, and in which layers columns became outliers. No gradio, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmq.figures.palette import named
from llmq.figures.style import DASHES, MARKS, escape, new_figure, style

if TYPE_CHECKING:
    import plotly.graph_objects as go


def causal_figure(rows: Sequence[dict]) -> go.Figure:
    """Above, bars: the share of earlier first choices that flip, for each method and change; below, lines: columns that
    became outliers in each layer. `rows`: `method`, `change`, `share`, `flipped`, `asked`, `joined_by_layer`."""
    figure, changes = new_figure(), list(dict.fromkeys(row["change"] for row in rows))
    for number, change in enumerate(changes):
        there = [row for row in rows if row["change"] == change]
        figure.add_bar(
            x=[escape(row["method"]) for row in there], y=[100 * row["share"] for row in there], name=escape(change),
            marker={"color": named(f"line-{number}")}, text=[f"{row['flipped']:,}" for row in there],
            textposition="outside", cliponaxis=False, customdata=[row["asked"] for row in there],
            hovertemplate="%{x}<br>%{text} of %{customdata:,} choices flip<extra></extra>",
        )  # fmt: skip
    drawn = [row for row in rows if any(row["joined_by_layer"]) and row["change"] == changes[0]]
    for number, row in enumerate(drawn):
        color = named(f"line-{number}" if number < 3 else "ink-soft")
        figure.add_scatter(
            x=list(range(len(row["joined_by_layer"]))), y=row["joined_by_layer"], xaxis="x2", yaxis="y2",
            name=escape(row["method"]), legend="legend2", mode="lines+markers",
            line={"color": color, "dash": DASHES[number % 4]},
            marker={"symbol": MARKS[number % 4], "size": 7, "color": color},
            hovertemplate=f"{escape(row['method'])}<br>layer %{{x}}: %{{y:.3~r}} columns<extra></extra>",
        )  # fmt: skip
    style(figure, "Earlier first choices that flip", height=560)
    figure.update_layout(
        barmode="group", xaxis={"type": "category", "anchor": "y"},
        yaxis={"title": {"text": "% flipped"}, "rangemode": "tozero", "domain": [0.6, 1]},
    )  # fmt: skip
    if drawn:
        figure.update_layout(
            legend2={"orientation": "h", "x": 0, "y": 0.4, "yanchor": "bottom"},
            xaxis2={"title": {"text": "layer"}, "anchor": "y2"},
            yaxis2={"title": {"text": "new outlier columns"}, "domain": [0, 0.38], "rangemode": "tozero"},
        )  # fmt: skip
    return figure
