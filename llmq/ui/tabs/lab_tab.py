"""The Lab tab: how a tensor is rounded, what bits stand for, which method loses least, and how each works."""

from __future__ import annotations

from functools import partial

import gradio as gr

from llmq.labs import lab_classes, load_answer
from llmq.labs.rows import TableLab
from llmq.ui.parts.bits import bits_view
from llmq.ui.parts.controls import METHOD_CHOICES, model_field
from llmq.ui.parts.explanation import explanation
from llmq.ui.parts.how import explained_methods, how_it_works
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import QUIET, owner_of
from llmq.ui.tabs.labs_panel import LabsPanel
from llmq.ui.tabs.rounding_panel import RoundingPanel


class LabPart:
    """A part of labs that share a model and, where one of them asks for it, a prompt."""

    def __init__(self, state: AppState, name: str):
        self.state, self.name = state, name
        self.labs = tuple(lab for lab in lab_classes().values() if lab.part == name)
        self.panel = LabsPanel(state, self.labs)

    def build(self) -> None:
        first = next((lab for lab in self.labs if lab.prompted), self.labs[0])
        kind, offered = self.labs[0].kind, self.state.access.offered
        with gr.Tab(self.name, id=kind, elem_id=f"part-{kind}") as self.tab:
            with gr.Row(equal_height=True):
                self.model = model_field(self.state.model, elem_id=f"{kind}-model", names=offered, min_width=220)
                self.prompt = gr.Textbox(
                    "", label="Prompt", info=first.prompted, elem_id=f"{kind}-prompt", placeholder=first.example,
                    min_width=220, visible=bool(first.prompted),
                )  # fmt: skip
            self.panel.build()

    def wire(self, stop) -> None:
        self.panel.wire(self.prompt, self.model, stop)
        for lab in self.labs:
            if lab.kind in self.state.recorded_answers:
                section = self.panel.section(lab)
                self.tab.select(partial(self.recorded, lab), section.rows, section.outputs, **QUIET)

    def recorded(self, lab: type[TableLab], rows) -> dict:
        """The recorded answer where the lab was not asked here."""
        section, path = self.panel.section(lab), self.state.recorded_answers.get(lab.kind)
        if rows or path is None:
            return {section.status: gr.skip()}
        return self.panel.opened(section, load_answer(path), "A recording")


class LabTab:
    """Builds the tab inside an open `gr.Blocks`; `wire()` connects it."""

    def __init__(self, state: AppState):
        self.state = state
        self.rounding = RoundingPanel(state)
        names = sorted({lab.part for lab in lab_classes().values() if lab.part})
        self.parts = {name: LabPart(state, name) for name in names}

    def build(self) -> None:
        with gr.Column(elem_id="lab-view"), gr.Tabs(elem_id="lab-parts"):
            with gr.Tab("Rounding", id="rounding", elem_id="part-rounding") as self.rounding_part:
                with gr.Column(elem_classes=["llmq-part"]):
                    self.rounding.build()
            for part in self.parts.values():
                part.build()
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

    def wire(self, tab: gr.Tab) -> None:
        self.rounding.wire(tab, self._stop)
        for part in self.parts.values():
            part.wire(self._stop)
        self.method.change(lambda name: explained_methods([name]), self.method, self.how, **QUIET)

    @property
    def linked(self) -> list:
        """What a link to this tab carries."""
        return [component for part in self.parts.values() for component in part.panel.linked]

    def from_link(self, request: gr.Request) -> dict:
        """What the address asks of the labs; what it does not name stays."""
        wishes, query = {self.linked[0]: gr.skip()}, dict(request.query_params)  # Gradio wants to hear of one
        for part in self.parts.values() if query.get("view") == "lab" else ():
            wishes |= part.panel.from_link(query)
        return wishes

    def _stop(self, request: gr.Request) -> None:
        self.state.stop(owner_of(request))
