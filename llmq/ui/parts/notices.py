"""Failures a person may be shown, as Gradio notices. Gradio renders markup in them, so messages are escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterator

import gradio as gr

from llmq.machine.door import Question
from llmq.machine.jobs import Ended
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import owner_of


def notice(error: Exception | str) -> gr.Error:
    """An error notice that leaves by itself, since a status line says the same; markup in it is shown as text."""
    return gr.Error(html.escape(str(error)), duration=8, print_exception=False)


def answers(state: AppState, question: Question, request: gr.Request) -> Iterator[object]:
    """What the machine yields. Where that was ended early, what was found stays, and a notice says why it is all."""
    try:
        yield from state.run(question, owner_of(request))
    except Ended as ended:
        gr.Warning(html.escape(str(ended)), title="Ended early", duration=8)
