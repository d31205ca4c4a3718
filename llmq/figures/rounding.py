"""Rounding of one tensor drawn: its numbers before and after, and where the errors are. No gradio, no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmq.figures.palette import named
from llmq.figures.style import base_layout, decades, new_figure, style

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from llmq.inspect.rounding import View


def histogram_figure(view: View, title: str) -> go.Figure:
    """How many numbers lie where, before rounding and after it: codes that nobody uses are gaps."""
    figure = new_figure()
    middles = (view.edges[1:] + view.edges[:-1]) / 2
    for number, (name, counts) in enumerate((("before", view.before), ("after", view.after))):
        figure.add_bar(
            x=middles, y=[int(count) or None for count in counts], name=name, opacity=1 - 0.35 * number,
            width=(view.edges[1] - view.edges[0]) * (1 - 0.5 * number), marker={"color": named(f"line-{number}")},
            hovertemplate=f"{name}: %{{y:,}} numbers near %{{x:.4~g}}<extra></extra>",
        )  # fmt: skip
    style(figure, f"{title}: its numbers before and after rounding")
    many = max(view.before.max(), view.after.max()) >= 100
    figure.update_layout(
        barmode="overlay",
        xaxis={"title": {"text": "number"}},
        yaxis={"title": {"text": f"how many of {view.drawn:,}"}, "type": "log" if many else "linear"},
    )
    return decades(figure) if many else figure


def error_figure(view: View, title: str) -> go.Figure:
    """The largest |error| in each cell of the tensor."""
    tall, wide = view.cell
    top = float(view.cells.max()) or 1.0
    heatmap = {
        "type": "heatmap", "z": view.cells, "x0": (wide - 1) / 2, "dx": wide, "y0": (tall - 1) / 2, "dy": tall,
        "zmin": 0, "zmax": top,
        "colorscale": [(0, named("surface")), (1, named("line-1"))],
        "colorbar": {"title": {"text": "|error|", "side": "top"}, "thickness": 14, "outlinewidth": 0},
        "hovertemplate": "near row %{y:.0f}, column %{x:.0f}<br>|error| %{z:.4~g}<extra></extra>",
    }  # fmt: skip
    figure = new_figure(heatmap)
    plain = {"showgrid": False, "zeroline": False} | ({"dtick": 1} if max(view.cells.shape) <= 16 else {})
    figure.update_layout(
        **base_layout(),
        title={"text": f"{title}: the largest error in cells of {tall} × {wide} numbers"},
        xaxis={"title": {"text": "column"}, **plain},
        yaxis={"title": {"text": "row", "standoff": 12}, "autorange": "reversed", "automargin": True, **plain},
        height=400,
        margin={"l": 60, "r": 20, "t": 50, "b": 50},
    )
    return figure
