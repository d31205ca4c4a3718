"""Failures a person may be shown, as Gradio notices. Gradio renders markup in them, so messages are escaped here."""

from __future__ import annotations

import html

import gradio as gr


def notice(error: Exception | str) -> gr.Error:
    """An error notice that leaves by itself, since a status line says the same; markup in it is shown as text."""
    return gr.Error(html.escape(str(error)), duration=8, print_exception=False)
