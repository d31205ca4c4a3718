"""The address of the page, which follows the link of the tab that is open."""

from __future__ import annotations

import gradio as gr

from llmq.ui.shell.assets import script
from llmq.ui.shell.wiring import QUIET


def keep_in_address(link: gr.Textbox) -> None:
    """Write what `link` holds into the address whenever it changes, so that the form outlives a reload."""
    link.change(None, link, None, js=script("address.js"), **QUIET)
