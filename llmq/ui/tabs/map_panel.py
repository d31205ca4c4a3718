"""The Activations part of the Outliers tab: heatmaps by layer and channel and by token and channel, and their tables.

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
from llmq.ui.parts.figure import figure_view, sent

PHASES = ("prefill", "decode")
KINDS = ["q/k/v", "o", "gate/up", "down"]
Find = Callable[[str | None], OutlierReport | None]


class MapPanel:
    def build(self) -> None:
        with gr.Row(equal_height=True):
            self.kind = gr.Radio(KINDS, value="down", label="Input of", elem_id="kind")
            self.phase = gr.Radio(list(PHASES), value="prefill", label="Phase", elem_id="phase")
        self.map = figure_view(elem_id="outlier-map")
        self.shares = table("What reaches the threshold", SHARE_HEADERS, "outlier-shares")
        self.channels = table("Strongest channels", CHANNEL_HEADERS, "outlier-channels")
        self.layer = gr.Slider(0, 31, 0, step=1, label="Layer", info="Token by token, prompt only.", elem_id="layer")
        self.tokens = figure_view(elem_id="token-map")

    def prepare(self, find: Find) -> None:
        self.find = find
        self.inputs = [self.kind, self.phase, self.layer]
        self.changes = [self.kind.change, self.phase.input, self.layer.change]
        self.outputs, self.framed = [self.map, self.tokens, self.shares, self.channels], [self.kind, self.layer]

    def frame(self, report: OutlierReport) -> dict:
        kinds = kinds_of(report)
        layers = [module.layer for module in report.modules if module.layer is not None]
        return {
            self.kind: gr.Radio(kinds, value="down" if "down" in kinds else kinds[0]),
            self.layer: gr.Slider(maximum=max(layers, default=0), value=_loudest_layer(report)),
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


def kinds_of(report: OutlierReport) -> list[str]:
    """The kinds of linear layer inside the stack; all there are where none is."""
    return [kind for kind in report.kinds if kind != "lm_head"] or report.kinds


def table(label: str, headers: list[str], elem_id: str) -> gr.Dataframe:
    """Hidden until it is `filled`."""
    return gr.Dataframe(
        headers=headers, value=[], label=label, interactive=False, wrap=True, elem_id=elem_id, type="array",
        elem_classes=["llmq-table"], visible=False,
    )  # fmt: skip


def filled(rows: list[list[str]]) -> gr.Dataframe:
    """A `table` with something in it, shown."""
    return gr.Dataframe(value=rows, visible=True)


def _loudest_layer(report: OutlierReport) -> int:
    """The layer with the largest |x|: the first one worth a look."""
    inside = [module for module in report.modules if module.layer is not None]
    return max(inside, key=lambda module: module.absmax).layer if inside else 0
