"""A plotly figure that changes in place: a slider that moves it makes nothing flicker. Its value is `sent(figure)`."""

from __future__ import annotations

import json

import gradio as gr
import plotly.graph_objects as go

from llmq.ui.assets import script, serve_plotly

_TEMPLATE = """
<div class="llmq-figure" data-part="figure" hidden></div>
<p class="llmq-quiet" data-part="failed" hidden>The figure could not be drawn in this browser; the tables hold its
  numbers.</p>
"""


def figure_view(*, elem_id: str) -> gr.HTML:
    """The component, empty and without height until it has a figure."""
    return gr.HTML(
        value={},
        html_template=_TEMPLATE,
        js_on_load=script("plotly.js", "figure.js"),
        apply_default_css=False,
        elem_id=elem_id,
        elem_classes=["llmq-flush"],
        plotly_path=serve_plotly(),
    )


def sent(figure: go.Figure | None) -> dict:
    """A figure as it goes to the browser."""
    return {} if figure is None else json.loads(figure.to_json())
