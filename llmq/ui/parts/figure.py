"""A plotly figure that changes in place: a slider that moves it makes nothing flicker. Its value is `sent(figure)`.

A click on a mark triggers `select` with its `x`, `y` and the `type` of its trace: 'bar', 'heatmap', 'scatter'.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator

import gradio as gr
import plotly.graph_objects as go

from llmq.figures.palette import PAINT
from llmq.ui.parts.glossary import spoken_in
from llmq.ui.shell.assets import component, script, serve_plotly

_TEMPLATE = """
<figure class="llmq-figure" hidden><figcaption><span data-part="title"></span>
  <p class="llmq-quiet" data-part="words" hidden></p></figcaption><div data-part="figure"></div></figure>
<p class="llmq-quiet" data-part="failed" hidden>The figure could not be drawn in this browser; the tables hold its
  numbers.</p>
"""


def figure_view(*, elem_id: str, snug: bool = False) -> gr.HTML:
    """The component, empty and without height until it has a figure; a `snug` one leaves room on the first screen for
    what is around it, and keeps its place free."""
    js = script("plotly.js") + PAINT + script("figure.js")
    view = component(_TEMPLATE, js, elem_id=elem_id, value={}, plotly_path=serve_plotly(), snug=snug)
    view.elem_classes = [*view.elem_classes, *(["llmq-snug"] if snug else [])]
    return view


def sent(figure: go.Figure | None) -> dict:
    """A figure as it goes to the browser, its title apart: plotly's titles do not wrap."""
    if figure is None:
        return {}
    plain = json.loads(figure.to_json())
    title = plain["layout"].pop("title", {}).get("text", "")
    plain["layout"]["margin"]["t"] = 40
    caption = html.unescape(title)
    return {"title": caption, "words": " · ".join(spoken_in(_texts(plain), caption)), **plain}


def _texts(plain: dict) -> Iterator[str]:
    """What a figure says at its axes, in its legend and above its panels."""
    layout = plain["layout"]
    yield from (trace["name"] for trace in plain["data"] if trace.get("name") and trace.get("showlegend", True))
    yield from (note.get("text", "") for note in layout.get("annotations", []))
    axes = (value for name, value in layout.items() if "axis" in name)
    yield from (axis.get("title", {}).get("text", "") for axis in axes)
