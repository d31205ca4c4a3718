"""The Sent-to-16-bit part of the Outliers tab: what each layer really did, the prompt and then token by token."""

from __future__ import annotations

import gradio as gr

from llmq.figures.bars import columns_figure
from llmq.inspect.report import OutlierReport
from llmq.labs.outliers import account_line
from llmq.ui.parts.explanation import explanation, shown
from llmq.ui.parts.figure import figure_view, sent
from llmq.ui.parts.glossary import KINDS, kinds_explained
from llmq.ui.tabs.map_panel import QUIET, Find, kinds_of


class MomentsPanel:
    def build(self) -> None:
        explanation(
            "Dots: columns that the layer really kept in 16 bit. Rings: columns where we saw a number that reaches the "
            "threshold. A dot in every ring: both agree. Move through the tokens, or click a bar."
        )
        with gr.Column(elem_classes=["llmq-needs"]):
            with gr.Row(equal_height=True):
                self.kind = gr.Radio(list(KINDS), value="down", label="Input of", elem_id="moment-kind")
                self.moment = gr.Slider(
                    0, 8, 0, step=1, label="Token", info="0 is the prompt, then each token that was written.",
                    elem_id="moment", min_width=220,
                )  # fmt: skip
            shown(kinds_explained())
            self.figure = figure_view(elem_id="moment-figure")
            self.said = gr.Markdown("", elem_id="moment-agreement")

    def prepare(self, find: Find) -> None:
        self.find = find
        self.inputs, self.changes = [self.kind, self.moment], [self.kind.change, self.moment.change]
        self.outputs, self.framed = [self.figure, self.said], [self.kind, self.moment]
        self.figure.select(self.moment_of, None, self.moment, **QUIET)

    def frame(self, report: OutlierReport) -> dict:
        kinds = kinds_of(report)
        return {
            self.kind: gr.Radio(kinds, value="down" if "down" in kinds else kinds[0]),
            self.moment: gr.Slider(maximum=max(1, report.generated_tokens), value=0),
        }

    def draw(self, key, threshold, kind, moment) -> dict:
        """The columns of one moment."""
        report = self.find(key)
        if report is None:
            return {part: gr.skip() for part in self.outputs}
        moment = min(max(int(moment or 0), 0), report.generated_tokens)
        figure = columns_figure(report, kind, moment, threshold)
        return {self.figure: sent(figure), self.said: account_line(report, threshold)}

    def moment_of(self, event: gr.EventData):
        """The moment of a bar that was clicked."""
        return event.x if event.type == "bar" and isinstance(event.x, int) else gr.skip()
