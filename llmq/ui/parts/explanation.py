"""A paragraph of the page's own."""

from __future__ import annotations

import gradio as gr

from llmq.ui.parts.glossary import explained


def explanation(text: str) -> gr.HTML:
    """The component: plain text, `**so**` strong."""
    return shown(explained(text))


def shown(markup: str) -> gr.HTML:
    """Markup of `glossary`, without room around it."""
    return gr.HTML(markup, elem_classes=["llmq-flush"])
