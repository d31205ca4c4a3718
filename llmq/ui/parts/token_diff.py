"""The component that shows two texts token by token; its value is `token_alignment.diff_value(...)` or `{}`."""

from __future__ import annotations

import gradio as gr

from llmq.ui.shell.assets import script

TEMPLATE = """
<div class="llmq-diff">
  <p class="llmq-diff-summary" data-part="summary">The comparison of the texts appears here when a run has finished.</p>
  <div class="llmq-panes" data-part="texts"></div>
</div>
"""


def token_diff_view(*, elem_id: str = "token-diff", **options) -> gr.HTML:
    """The component; its value is `diff_value(...)` or `{}`. `options` go to `gr.HTML`."""
    return gr.HTML(
        value=options.pop("value", {}),
        html_template=TEMPLATE,
        js_on_load=script("token_diff.js"),
        apply_default_css=False,
        elem_id=elem_id,
        elem_classes=["llmq-flush"],
        **options,
    )
