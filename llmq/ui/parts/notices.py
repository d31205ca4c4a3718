"""Failures a person may be shown, as Gradio notices. Gradio renders markup in them, so messages are escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterator

import gradio as gr

from llmq.errors import Ended
from llmq.machine.door import Question
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import owner_of


def notice(error: Exception | str) -> gr.Error:
    """An error notice that leaves by itself, since a status line says the same; markup in it is shown as text."""
    return gr.Error(html.escape(str(error)), duration=8, print_exception=False)


class Answers:
    """What the machine yields for a question. Where that was ended early, what was found stays; `early` then says why
    it is all, in a sentence for the line that says what is going on."""

    def __init__(self, state: AppState, question: Question, request: gr.Request):
        self._items, self.early = state.run(question, owner_of(request)), ""

    def __iter__(self) -> Iterator[object]:
        try:
            yield from self._items
        except Ended as ended:
            self.early = f"Ended early: {ended}."
