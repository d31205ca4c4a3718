"""A figure to download as a PNG, light and on its own ground, made when somebody asks for it.

A value has the `figure` as plotly's JSON, the `name` of the file, and a `number` that tells it from the one before.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import gradio as gr

from llmq.figures.pages import painted
from llmq.ui.shell.assets import component, script, serve_plotly

if TYPE_CHECKING:
    import plotly.graph_objects as go

_TEMPLATE = """
<p class="llmq-quiet" role="status" data-part="failed" hidden>The picture could not be drawn in this browser; the JSON
  holds its numbers.</p>
"""


def picture(*, elem_id: str) -> gr.HTML:
    """The component, which shows nothing."""
    js = script("nodes.js", "plotly.js", "picture.js")
    return component(_TEMPLATE, js, elem_id=elem_id, value={}, plotly_path=serve_plotly())


def pictured(figure: go.Figure, name: str, number: str) -> dict:
    """The value that makes the browser download a figure."""
    return {"figure": json.loads(painted(figure).to_json()), "name": name, "number": number}
