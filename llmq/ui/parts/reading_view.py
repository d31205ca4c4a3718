"""The component that shows what both methods made of a text; its value is `reading_value.reading_value(...)` or `{}`.

A click on a token raises `select` with its `position`; the arrow keys move through the text.
"""

from __future__ import annotations

import gradio as gr

from llmq.ui.shell.assets import script

_TEMPLATE = """
<div class="llmq-reading">
  <p class="llmq-diff-summary" data-part="summary" data-placeholder="The text appears here, each token shaded by how
    much the methods differ on it."></p>
  <p class="llmq-legend" data-part="legend" hidden>KL in nats:
    <span class="llmq-token llmq-kl0">under 0.001</span> <span class="llmq-token llmq-kl1">0.001</span>
    <span class="llmq-token llmq-kl2">0.01</span> <span class="llmq-token llmq-kl3">0.1</span>
    <span class="llmq-token llmq-kl4">1 and more</span>
    <span class="llmq-token llmq-other">another first choice</span></p>
  <p class="llmq-reading-text" data-part="text"></p>
  <p class="llmq-quiet" data-part="help" hidden>Point at a token for both methods' five likeliest; click it for the
    chain of cause.</p>
  <p class="llmq-reading-about" data-part="about"></p>
  <div class="llmq-panes" data-part="lists"></div>
</div>
"""


def reading_view(*, elem_id: str) -> gr.HTML:
    """The component."""
    return gr.HTML(
        value={},
        html_template=_TEMPLATE,
        js_on_load=script("reading.js"),
        apply_default_css=False,
        elem_id=elem_id,
        elem_classes=["llmq-flush"],
    )
