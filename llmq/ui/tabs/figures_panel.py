"""The part of the Outliers tab with the paper's own figures of this model, and its massive activations."""

from __future__ import annotations

import gradio as gr

from llmq.figures.lines import features_figure, peaks_figure
from llmq.inspect.emergence import emergence
from llmq.inspect.report import OutlierReport
from llmq.labs.outliers import MASSIVE_HEADERS, emergence_line, massive_rows
from llmq.ui.parts.explanation import explanation
from llmq.ui.parts.figure import figure_view, sent
from llmq.ui.tabs.map_panel import Find, filled, table


class FiguresPanel:
    def build(self) -> None:
        explanation(
            "The paper calls a channel of the residual stream an outlier feature when it reaches 6 in at least "
            "25% of the layers and at 6% of the tokens; counted here over the watched prompt."
        )
        with gr.Column(elem_classes=["llmq-needs"]):
            self.said = gr.Markdown("", elem_id="emergence")
            self.features = figure_view(elem_id="features-figure")
            self.peaks = figure_view(elem_id="peaks-figure")
            explanation(
                "**Massive activations** are something else: a few numbers many times larger than the rest, in "
                "the residual stream and in the input of down. The table says at which token; it is often the first."
            )
            self.massive = table("Massive activations", MASSIVE_HEADERS, "massive")

    def prepare(self, find: Find) -> None:
        self.find, self.inputs, self.changes, self.framed = find, [], [], []
        self.outputs = [self.said, self.features, self.peaks, self.massive]

    def frame(self, report: OutlierReport) -> dict:
        return {}

    def draw(self, key, threshold) -> dict:
        report = self.find(key)
        if report is None:
            return {part: gr.skip() for part in self.outputs}
        found = emergence(report)
        return {
            self.said: emergence_line(found),
            self.features: sent(features_figure(found)),
            self.peaks: sent(peaks_figure(report)),
            self.massive: filled(massive_rows(report)),
        }
