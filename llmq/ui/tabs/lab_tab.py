"""The Lab tab: how a tensor is rounded, what bits stand for, which method loses least, and how each works."""

from __future__ import annotations

import gradio as gr

from llmq.ui.parts.bits import bits_view
from llmq.ui.parts.explanation import explanation
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import owner_of
from llmq.ui.tabs.rounding_panel import RoundingPanel


class LabTab:
    """Builds the tab inside an open `gr.Blocks`; `wire()` connects it."""

    def __init__(self, state: AppState):
        self.state = state
        self.rounding = RoundingPanel(state)

    def build(self) -> None:
        with gr.Column(elem_id="lab-view"), gr.Tabs(elem_id="lab-parts"):
            with gr.Tab("Rounding", id="rounding", elem_id="part-rounding") as self.rounding_part:
                with gr.Column(elem_classes=["llmq-part"]):
                    self.rounding.build()
            with gr.Tab("Bits", id="bits", elem_id="part-bits"):
                explanation(
                    "A number of 16 or 8 bits, bit by bit: click a box to turn it over. A floating-point number has "
                    "fine steps near 0 and coarse ones far from it; an int8 code has the same step everywhere, and a "
                    "scale says how long it is."
                )
                bits_view(elem_id="bits")

    def wire(self, tab: gr.Tab) -> None:
        self.rounding.wire(tab, self._stop)

    def _stop(self, request: gr.Request) -> None:
        self.state.stop(owner_of(request))
