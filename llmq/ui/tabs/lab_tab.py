"""The Lab tab: how a tensor is rounded, what bits stand for, which method loses least, and how each works."""

from __future__ import annotations

import gradio as gr

from llmq.labs import load_answer
from llmq.labs.attention import Attention
from llmq.labs.race import PROMPT, Race
from llmq.ui.parts.bits import bits_view
from llmq.ui.parts.controls import METHOD_CHOICES, model_field
from llmq.ui.parts.explanation import explanation
from llmq.ui.parts.how import explained_methods, how_it_works
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import QUIET, owner_of
from llmq.ui.tabs.labs_panel import LabsPanel
from llmq.ui.tabs.rounding_panel import RoundingPanel


class LabTab:
    """Builds the tab inside an open `gr.Blocks`; `wire()` connects it."""

    def __init__(self, state: AppState):
        self.state = state
        self.rounding, self.race = RoundingPanel(state), LabsPanel(state, (Race,))
        self.attention = LabsPanel(state, (Attention,))

    def build(self) -> None:
        with gr.Column(elem_id="lab-view"), gr.Tabs(elem_id="lab-parts"):
            with gr.Tab("Rounding", id="rounding", elem_id="part-rounding") as self.rounding_part:
                with gr.Column(elem_classes=["llmq-part"]):
                    self.rounding.build()
            with gr.Tab("Race", id="race", elem_id="part-race"):
                self._build_race()
            with gr.Tab("Attention", id="attention", elem_id="part-attention"):
                offered = self.state.access.offered
                self.heads_of = model_field(self.state.model, elem_id="attention-model", names=offered)
                self.attention.build()
            with gr.Tab("Bits", id="bits", elem_id="part-bits"):
                explanation(
                    "A number of 16 or 8 bits, bit by bit: click a box to turn it over. A floating-point number has "
                    "fine steps near 0 and coarse ones far from it; an int8 code has the same step everywhere, and a "
                    "scale says how long it is."
                )
                bits_view(elem_id="bits")

            with gr.Tab("Methods", id="methods", elem_id="part-methods"):
                self.method = gr.Dropdown(METHOD_CHOICES, value="llm-int8", label="Method", elem_id="explained-method")
                self.how = how_it_works("llm-int8", elem_id="explained")

    def _build_race(self) -> None:
        with gr.Row(equal_height=True):
            offered = self.state.access.offered
            self.model = model_field(self.state.model, elem_id="race-model", names=offered, min_width=220)
            self.prompt = gr.Textbox(
                "", label="Prompt", info="What is written on from while speed is measured.", elem_id="race-prompt",
                placeholder=PROMPT, min_width=220,
            )  # fmt: skip
        self.race.build()

    def wire(self, tab: gr.Tab) -> None:
        self.rounding.wire(tab, self._stop)
        self.race.wire(self.prompt, self.model, self._stop)
        self.attention.wire(gr.State(""), self.heads_of, self._stop)
        self.method.change(lambda name: explained_methods([name]), self.method, self.how, **QUIET)
        section = self.race.section(Race)
        tab.select(self._recorded, section.rows, section.outputs, **QUIET)

    def _recorded(self, rows) -> dict:
        """The recorded race where none was run here."""
        section, path = self.race.section(Race), self.state.recorded_answers.get(Race.kind)
        if rows or path is None:
            return {section.status: gr.skip()}
        return self.race.opened(section, load_answer(path), "A recording")

    def _stop(self, request: gr.Request) -> None:
        self.state.stop(owner_of(request))
