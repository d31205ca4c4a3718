"""The component that shows two texts token by token; its value is `token_alignment.diff_value(...)` or `{}`."""

from __future__ import annotations

import gradio as gr

from llmq.ui.shell.assets import component, script

TEMPLATE = """
<div class="llmq-diff">
  <p class="llmq-diff-summary" data-part="summary">The comparison of the texts appears here when a run has finished.</p>
  <div class="llmq-panes" data-part="texts"></div>
</div>
"""


def token_diff_view() -> gr.HTML:
    """The component; its value is `diff_value(...)` or `{}`."""
    return component(TEMPLATE, script("token_diff.js"), elem_id="token-diff", value={})
