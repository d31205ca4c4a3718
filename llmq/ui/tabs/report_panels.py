"""The parts of the Outliers tab that show a watched run: its maps, what went to 16 bit, and the paper's figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import gradio as gr

from llmq.figures.bars import columns_figure
from llmq.figures.heatmaps import map_figure, token_figure
from llmq.figures.lines import features_figure, peaks_figure
from llmq.inspect.emergence import emergence
from llmq.inspect.report import PHASES, OutlierReport
from llmq.inspect.views import shares_table, strongest_table
from llmq.labs.outliers import (
    CHANNEL_HEADERS,
    MASSIVE_HEADERS,
    SHARE_HEADERS,
    account_line,
    emergence_line,
    massive_rows,
)
from llmq.ui.parts.figure import figure_view, sent

KINDS = ["q/k/v", "o", "gate/up", "down"]


class Panel:
    """One part. `find` gives a kept report; `build` makes the components and says which are the `inputs` of a drawing,
    whose `changes` ask for a new one, which `outputs` it fills, and which a new report sets up (`framed`)."""

    inputs: Sequence = ()
    changes: Sequence = ()
    framed: Sequence = ()
    outputs: Sequence

    def __init__(self, find: Callable[[str | None], OutlierReport | None]):
        self.find = find

    def frame(self, report: OutlierReport) -> dict:
        return {}

    def draw(self, key, threshold, *inputs) -> dict:
        """Every picture and table of a kept report at one threshold."""
        report = self.find(key)
        if report is None:
            return {part: gr.skip() for part in self.outputs}
        return self.drawn(report, threshold, *inputs)


class MapPanel(Panel):
    """Heatmaps by layer and channel and by token and channel, and their tables."""

    def build(self) -> None:
        with gr.Row(equal_height=True):
            self.kind = gr.Radio(KINDS, value="down", label="Input of", elem_id="kind")
            self.phase = gr.Radio(list(PHASES), value="prefill", label="Phase", elem_id="phase")
        self.map = figure_view(elem_id="outlier-map")
        self.shares = table("What reaches the threshold", SHARE_HEADERS, "outlier-shares")
        self.channels = table("Strongest channels", CHANNEL_HEADERS, "outlier-channels")
        self.layer = gr.Slider(0, 31, 0, step=1, label="Layer", info="Token by token, prompt only.", elem_id="layer")
        self.tokens = figure_view(elem_id="token-map")
        self.inputs = [self.kind, self.phase, self.layer]
        self.changes = [self.kind.change, self.phase.input, self.layer.change]
        self.outputs, self.framed = [self.map, self.tokens, self.shares, self.channels], [self.kind, self.layer]

    def frame(self, report: OutlierReport) -> dict:
        inside = [module for module in report.modules if module.layer is not None]
        loudest = max(inside, key=lambda module: module.absmax).layer if inside else 0  # the first one worth a look
        last = max((module.layer for module in inside), default=0)
        return {self.kind: _kinds_of(report), self.layer: gr.Slider(maximum=last, value=loudest)}

    def drawn(self, report: OutlierReport, threshold, kind, phase, layer) -> dict:
        return {
            self.map: sent(map_figure(report, kind, phase, threshold)),
            self.tokens: sent(token_figure(report, kind, int(layer), threshold)),
            self.shares: filled(shares_table(report, threshold)),
            self.channels: filled(strongest_table(report, threshold)),
        }


class MomentsPanel(Panel):
    """What each layer really did, the prompt and then token by token."""

    def build(self) -> None:
        gr.Markdown(
            "Filled: the columns that the layer itself multiplied in 16 bit, read from its own list after each call "
            "(bitsandbytes' `state.idx`). Rings: what the hooks found in its input. Move through the generated tokens."
        )
        with gr.Row(equal_height=True):
            self.kind = gr.Radio(KINDS, value="down", label="Input of", elem_id="moment-kind")
            self.moment = gr.Slider(
                0, 8, 0, step=1, label="Moment", info="0 is the prompt, then each generated token.", elem_id="moment",
                min_width=220,
            )  # fmt: skip
        self.figure = figure_view(elem_id="moment-figure")
        self.said = gr.Markdown("", elem_id="moment-agreement")
        self.inputs = self.framed = [self.kind, self.moment]
        self.changes, self.outputs = [self.kind.change, self.moment.change], [self.figure, self.said]

    def frame(self, report: OutlierReport) -> dict:
        moments = gr.Slider(maximum=max(1, report.generated_tokens), value=0)
        return {self.kind: _kinds_of(report), self.moment: moments}

    def drawn(self, report: OutlierReport, threshold, kind, moment) -> dict:
        moment = min(max(int(moment or 0), 0), report.generated_tokens)
        figure = columns_figure(report, kind, moment, threshold)
        return {self.figure: sent(figure), self.said: account_line(report, threshold)}


class FiguresPanel(Panel):
    """The paper's own figures of this model, and its massive activations."""

    def build(self) -> None:
        gr.Markdown(
            "The paper calls a dimension of the hidden state an *outlier feature* when its magnitude is at least 6 in "
            "at least 25 % of the layers and at 6 % of the positions; counted here over the watched prompt."
        )
        self.said = gr.Markdown("", elem_id="emergence")
        self.features = figure_view(elem_id="features-figure")
        self.peaks = figure_view(elem_id="peaks-figure")
        gr.Markdown(
            "**Massive activations** are something else: a few numbers many times larger than the rest, in the "
            "residual stream and in what `down_proj` reads. The table says at which token; it is often the first."
        )
        self.massive = table("Massive activations", MASSIVE_HEADERS, "massive")
        self.outputs = [self.said, self.features, self.peaks, self.massive]

    def drawn(self, report: OutlierReport, threshold) -> dict:
        found = emergence(report)
        return {
            self.said: emergence_line(found),
            self.features: sent(features_figure(found)),
            self.peaks: sent(peaks_figure(report)),
            self.massive: filled(massive_rows(report)),
        }


def _kinds_of(report: OutlierReport) -> gr.Radio:
    """A choice of the kinds of linear layer inside the stack; of all there are where none is."""
    kinds = [kind for kind in report.kinds if kind != "lm_head"] or report.kinds
    return gr.Radio(kinds, value="down" if "down" in kinds else kinds[0])


def table(label: str, headers: list[str], elem_id: str) -> gr.Dataframe:
    """Hidden until it is `filled`."""
    return gr.Dataframe(
        headers=headers, value=[], label=label, interactive=False, wrap=True, elem_id=elem_id, type="array",
        elem_classes=["llmq-table"], visible=False,
    )  # fmt: skip


def filled(rows: list[list[str]], *, visible: bool = True) -> gr.Dataframe:
    """A `table` with something in it, shown."""
    return gr.Dataframe(value=rows, visible=visible)
