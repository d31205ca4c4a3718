"""What a running job yields, as the value of a status line. No gradio."""

from __future__ import annotations

from llmq.events import Loading
from llmq.preparation import Working
from llmq.ui.tabs.compare_view import status_line as line_of


def progress_of(item: object) -> dict | str:
    """The line with its bar; '' for what is not worth a line."""
    if isinstance(item, Working):
        message = item.message[:1].upper() + item.message[1:]
        return {"text": message, "fraction": item.fraction} if message else ""
    line = line_of(item)
    return {"text": line, "fraction": None} if isinstance(item, Loading) and line else line
