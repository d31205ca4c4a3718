"""The component that shows what both methods made of a text; its value is `reading_value.reading_value(...)` or `{}`.

A click on a token raises `select` with its `position`; the arrow keys move through the text.
"""

from __future__ import annotations

import gradio as gr

from llmq.figures.palette import KL_EDGES
from llmq.ui.shell.assets import component, script

_NATS = [f"under {KL_EDGES[0]:g}", *(f"{edge:g}" for edge in KL_EDGES[:-1]), f"{KL_EDGES[-1]:g} and more"]
_SHADES = " ".join(f'<span class="llmq-token llmq-kl{level}">{text}</span>' for level, text in enumerate(_NATS))
_TEMPLATE = f"""
<div class="llmq-reading">
  <p data-part="summary" data-placeholder="The text appears here, each token shaded by how
    much the methods differ on it."></p>
  <p class="llmq-legend llmq-explained" data-part="legend" hidden>KL in nats: {_SHADES}
    <span class="llmq-token llmq-other">another first choice</span></p>
  <p class="llmq-reading-text" data-part="text"></p>
  <p class="llmq-quiet" data-part="help" hidden>Point at a token to see what both
    methods found likeliest there; click it for the chain of cause.</p>
  <p class="llmq-reading-about" data-part="about"></p>
  <div class="llmq-panes" data-part="lists"></div>
</div>
"""


def reading_view(*, elem_id: str) -> gr.HTML:
    """The component."""
    return component(_TEMPLATE, script("reading.js"), elem_id=elem_id, value={}, edges=KL_EDGES)
