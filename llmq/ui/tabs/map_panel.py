"""The Activations part of the Outliers tab: the heatmap by layer and channel with what changes it beside it, one
channel silenced, and below them a layer's tokens and the tables.

Every part that shows a watched run has the same face: `build`, `prepare` with the way to a kept report, `framed` and
`frame` for what a new report sets up, `inputs`, `changes`, `outputs` and `draw` for what is drawn of it.
"""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from llmq.figures.heatmaps import map_figure, token_figure
from llmq.inspect.report import OutlierReport
from llmq.inspect.views import shares_table, strongest_table
from llmq.labs.outliers import CHANNEL_HEADERS, SHARE_HEADERS
from llmq.ui.parts.explanation import explanation, shown
from llmq.ui.parts.figure import figure_view, sent
from llmq.ui.parts.glossary import KINDS, kinds_explained
from llmq.ui.parts.silence import silence_view
from llmq.ui.parts.story import loudest_line
from llmq.ui.shell.wiring import QUIET

TABLE_PIXELS = 720  # a table is scrolled by itself beyond
PHASES = [("reading the prompt", "prefill"), ("writing", "decode")]
Find = Callable[[str | None], OutlierReport | None]
TO_THE_TOKENS = "() => document.querySelector('#layer')?.scrollIntoView({ block: 'start' })"


class MapPanel:
    def __init__(self, example: dict):
        self.example = example

    def build(self) -> None:
        with gr.Row(elem_classes=["llmq-beside", "llmq-needs"]):
            with gr.Column(scale=5, min_width=300):
                self.map = figure_view(elem_id="outlier-map", snug=True)
            with gr.Column(scale=2, min_width=300, elem_classes=["llmq-knobs"]):
                self._build_knobs()
        self.card = silence_view(self.example, elem_id="silence-card")
        with gr.Column(elem_classes=["llmq-needs"]):
            gr.Markdown("## One layer, token by token")
            explanation("Which tokens have the large numbers? Click a row of the picture above, or move the slider.")
            self.layer = gr.Slider(0, 31, 0, step=1, label="Layer", elem_id="layer")
            self.tokens = figure_view(elem_id="token-map")
            with gr.Accordion("The figures as tables", open=False, elem_id="outlier-tables"):
                explanation("Prefill: while the model reads the prompt. Decode: while it writes, token by token.")
                self.shares = table("What reaches the threshold", SHARE_HEADERS, "outlier-shares")
                self.channels = table("Strongest channels", CHANNEL_HEADERS, "outlier-channels")

    def _build_knobs(self) -> None:
        self.threshold = gr.Slider(
            2, 20, 6.0, step=0.1, label="Threshold", elem_id="outlier-threshold",
        )  # fmt: skip
        self.kind = gr.Radio(list(KINDS), value="down", label="Input of", elem_id="kind")
        shown(kinds_explained())
        self.phase = gr.Radio(PHASES, value="prefill", label="While", elem_id="phase")

    def prepare(self, find: Find) -> None:
        self.find = find
        self.inputs = [self.kind, self.phase, self.layer]
        self.changes = [self.kind.change, self.phase.input, self.layer.change]
        self.outputs = [self.map, self.tokens, self.shares, self.channels]
        self.framed = [self.kind, self.layer, self.card]
        opened = self.map.select(self.layer_of, None, self.layer, **QUIET)
        opened.success(None, None, None, js=TO_THE_TOKENS, **QUIET)

    def frame(self, report: OutlierReport) -> dict:
        kinds = kinds_of(report)
        chosen = {} if set(KINDS) <= set(kinds) else {"value": kinds[0]}  # where all are there, what was chosen stays
        layers = [module.layer for module in report.modules if module.layer is not None]
        return {
            self.kind: gr.Radio(kinds, **chosen),
            self.layer: gr.Slider(maximum=max(layers, default=0), value=_loudest_layer(report)),
            self.card: {"lead": loudest_line(report)},
        }

    def draw(self, key, threshold, kind, phase, layer) -> dict:
        """Every picture and table of a kept report at one threshold."""
        report = self.find(key)
        if report is None:
            return {part: gr.skip() for part in self.outputs}
        tokens = token_figure(report, kind, int(layer), threshold)
        return {
            self.map: sent(map_figure(report, kind, phase, threshold)),
            self.tokens: sent(tokens),
            self.shares: filled(shares_table(report, threshold)),
            self.channels: filled(strongest_table(report, threshold)),
        }

    def layer_of(self, event: gr.EventData):
        """The layer of a cell that was clicked."""
        row = str(event.y)
        return int(row) if event.type == "heatmap" and row.isdecimal() else gr.skip()


def kinds_of(report: OutlierReport) -> list[str]:
    """The kinds of linear layer inside the stack; all there are where none is."""
    return [kind for kind in report.kinds if kind != "lm_head"] or report.kinds


def table(label: str, headers: list[str], elem_id: str) -> gr.Dataframe:
    """Hidden until it is `filled`."""
    return gr.Dataframe(
        headers=headers, value=[], label=label, interactive=False, wrap=True, elem_id=elem_id, type="array",
        max_height=TABLE_PIXELS, elem_classes=["llmq-table"], visible=False,
    )  # fmt: skip


def filled(rows: list[list[str]]) -> gr.Dataframe:
    """A `table` with something in it, shown."""
    return gr.Dataframe(value=rows, visible=True)


def _loudest_layer(report: OutlierReport) -> int:
    """The layer with the largest |x|: the first one worth a look."""
    inside = [module for module in report.modules if module.layer is not None]
    return max(inside, key=lambda module: module.absmax).layer if inside else 0
