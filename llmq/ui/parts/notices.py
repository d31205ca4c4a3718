"""Failures a person may be shown, as Gradio notices. Gradio renders markup in them, so messages are escaped here."""

from __future__ import annotations

import html

import gradio as gr


def notice(error: Exception | str) -> gr.Error:
    """An error notice that stays until closed; a prompt's or a model's markup in it is shown as text."""
    return gr.Error(html.escape(str(error)), duration=None, print_exception=False)
