"""One line that says what is going on, announced to screen readers; whatever it says is text, not markup."""

from __future__ import annotations

import gradio as gr

_TEMPLATE = '<p class="llmq-status" role="status"></p>'
_SCRIPT = """
const line = element.querySelector(".llmq-status");
const show = () => { line.textContent = props.value || ""; };
watch("value", show);
show();
"""


def status_line(text: str, *, elem_id: str) -> gr.HTML:
    """The component; its value is the text."""
    return gr.HTML(
        value=text,
        html_template=_TEMPLATE,
        js_on_load=_SCRIPT,
        apply_default_css=False,
        elem_id=elem_id,
        elem_classes=["llmq-flush"],
    )
