"""What all figures share: font, colours, dashes and marks, and text made safe for plotly's labels."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

from llmq.figures.palette import named

if TYPE_CHECKING:
    import plotly.graph_objects as go

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
DASHES = ("solid", "dash", "dot", "dashdot")
MARKS = ("circle", "square", "diamond", "cross")


def escape(text: str) -> str:
    """Text for a plotly label: no markup, no line breaks, no TeX; plotly turns the entities back into characters."""
    visible = text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    printable = "".join(c if c.isprintable() else "�" for c in visible)
    return html.escape(printable, quote=False).replace("$", "&#36;")


def new_figure(*traces: dict) -> go.Figure:
    """A figure of traces as plotly names their parts. Plotly is needed from here on, and not before."""
    import plotly.graph_objects as go

    return go.Figure(traces)


def base_layout() -> dict:
    """The layout every figure begins with: nothing behind it, and its texts in colours by name."""
    font = {"family": FONT, "color": named("ink")}
    clear = "rgba(0,0,0,0)"
    return {
        "template": "none", "paper_bgcolor": clear, "plot_bgcolor": clear, "font": font,
        "hoverlabel": {"bgcolor": named("surface"), "font": font},
    }  # fmt: skip


def style(figure: go.Figure, title: str, *, height: int = 400) -> None:
    """Give a figure that has its traces the layout of all, its title and its axes' lines."""
    axis = {"gridcolor": named("grid"), "zeroline": False, "linecolor": named("grid"), "automargin": True}
    axis |= {"title": {"font": {"size": 13}, "standoff": 10}}
    figure.update_layout(
        **base_layout(),
        font_size=13,
        title={"text": title, "font": {"size": 15}, "x": 0, "xref": "container", "pad": {"l": 12}},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"l": 60, "r": 20, "t": 84, "b": 64},
        height=height,
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    for name in ("xaxis2", "yaxis2", "yaxis3"):
        if any(name in (trace.xaxis and f"xaxis{trace.xaxis[1:]}", trace.yaxis and f"yaxis{trace.yaxis[1:]}")
               for trace in figure.data):  # fmt: skip
            figure.update_layout({name: axis})


def decades(figure: go.Figure) -> go.Figure:
    """Powers of ten alone on a logarithmic axis, as 10, 100, 1,000; between them too where values span less."""
    values = {y for trace in figure.data for y in trace.y if y is not None and 0 < y < math.inf}
    spread = max(values, default=1) / min(values, default=1)
    step = 1 if spread >= 10 else None if spread > 1 else "D2"  # None: plotly's own; D2: 1, 2, 5, 10
    figure.update_layout(yaxis={"dtick": step, "tickformat": ",~r", "exponentformat": "power"})
    return figure
