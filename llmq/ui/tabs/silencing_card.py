"""The card beside the heatmap that silences one channel: the silencing lab's own section, asked for one channel."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from llmq.labs import load_answer
from llmq.labs.silencing import Silencing
from llmq.models.presets import model_title
from llmq.ui.parts.story import silenced
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import ASKED, QUIET, tell_end
from llmq.ui.tabs.labs_panel import LabsPanel

LONGEST = 60  # characters of a prompt that says what was measured
LEAD = "A few channels carry far more than the rest. Switch off the strongest, and see what is left of the model."


def recorded_value(state: AppState) -> dict:
    """What the card shows until somebody measures: a recording, where the app has one."""
    value = {"lead": LEAD, "running": False, "doing": ""}
    path = state.recorded_answers.get(Silencing.kind)
    if path is None:
        return value
    answer = load_answer(path)
    made = answer.result["conditions"]
    where = (
        f"{model_title(answer.result['model'])}, {made.get('device_name', 'unknown')}, {str(made.get('date', ''))[:10]}"
    )
    return value | silenced(answer.rows) | {"recorded": f"Recording: {where}.", "said": Silencing.finding(answer.rows)}


class SilencingCard:
    def __init__(self, labs: LabsPanel):
        self.labs = labs

    def wire(self, card: gr.HTML, prompt, model, stop) -> None:
        self.card, self.section = card, self.labs.section(Silencing)
        asked = card.submit(self.silence, [model, prompt], [card, *self.section.outputs], **ASKED)
        for part in (card, self.section.status):
            tell_end(asked, part.elem_id)
        card.stop(stop, None, None, **QUIET)

    def silence(self, model, prompt, request: gr.Request) -> Iterator[dict]:
        """The lab's section asked for one channel; the card shows the same."""
        section = self.section
        wanted = [1 if field.name == "counts" else component.value for field, component in section.controls]
        for update in self.labs.handler(section)(model, prompt, [], request, *wanted):
            yield update | {self.card: self._told(update, f"Measured: {model_title(str(model))}, “{shorten(prompt)}”.")}

    def _told(self, update: dict, where: str) -> dict:
        told, status = {}, update.get(self.section.status)
        if isinstance(status, dict):
            told |= {"running": True, "doing": status["text"], "fraction": status["fraction"]}
        elif status is not None:
            told |= {"running": False, "doing": status, "number": self.labs.state.next_run()}
        if rows := update.get(self.section.rows):
            told |= silenced(rows) | {"recorded": where, "said": Silencing.finding(rows)}
        return told


def shorten(prompt) -> str:
    """A prompt in one line, as long as a line has room for."""
    text = " ".join(str(prompt or "").split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
