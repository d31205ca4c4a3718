"""The part of the Lab tab that rounds one tensor: a layer's input or weight, or numbers of one's own.

Taking a tensor out of a model is asked of the machine. Everything else is computed from the tensor that was taken,
beside the machine's line, and shown as soon as the drawn method is measured; the table of all methods follows.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import closing

import gradio as gr

from llmq.contestant import shown_name
from llmq.errors import UserError
from llmq.figures.rounding import error_figure, histogram_figure
from llmq.labs.rounding import (
    EXAMPLE,
    HEADERS,
    METHODS_SHOWN,
    Rounded,
    Rounding,
    Taken,
    first_layer,
    layer_names,
    typed,
)
from llmq.methods.rtn import BITS, GROUP
from llmq.ui.parts.controls import model_field, whole
from llmq.ui.parts.explanation import explanation
from llmq.ui.parts.figure import figure_view, sent
from llmq.ui.parts.how import explained_methods, how_it_works
from llmq.ui.parts.keeping import Keeping
from llmq.ui.parts.notices import Answers, notice
from llmq.ui.parts.progress import progress_of
from llmq.ui.parts.status import status_line, working
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import ASKED, QUIET, STREAMED, tell_end
from llmq.ui.tabs.map_panel import filled, table

OWN = "numbers"  # what is rounded: none of a model's tensors
SOURCES = [("Numbers of your own", OWN), ("A layer's input", "input"), ("A layer's weight", "weight")]
GONE = "The tensor is no longer kept on the server; take it again."


class RoundingPanel:
    """Builds the part inside an open tab; `wire` connects it."""

    def __init__(self, state: AppState):
        self.state = state
        self.keeping = Keeping(state, Rounding.kind)

    def build(self) -> None:
        explanation(
            "Every method turns numbers into a few codes and a scale. Take a tensor, choose a method, and see which "
            "codes it uses, how far each number is off, and what one outlier does to all the others."
        )
        with gr.Row(equal_height=True):
            self._build_source()
        with gr.Row(equal_height=True):
            self._build_rounding()
        with gr.Accordion("How this method works", open=False, elem_id="rounding-how"):
            self.how = how_it_works("absmax", elem_id="rounding-explained")
        self.status = status_line("", elem_id="rounding-status")
        self.finding = gr.Markdown("", elem_id="rounding-finding")
        self.sums = gr.HTML("", elem_id="rounding-sums", elem_classes=["llmq-flush"])
        with gr.Row(elem_classes=["llmq-beside"]):
            with gr.Column(min_width=300):
                self.histogram = figure_view(elem_id="rounding-histogram")
            with gr.Column(min_width=300):
                self.errors = figure_view(elem_id="rounding-errors")
        self.table = table("Every method on this tensor", HEADERS, "rounding-table")
        explanation(
            "SQNR: 6 dB more is like one bit more. A planted outlier is left out of the errors: they show what it does "
            "to the other numbers. In a model, methods made for weights leave inputs in 16 bit; here they round them "
            "too. GPTQ, AWQ and SmoothQuant choose by what a layer makes of a text, which one tensor cannot show: the "
            "race compares them."
        )
        self.keeping.build("rounding", "this answer")
        self.taken = gr.State(None)

    def _build_source(self) -> None:
        self.source = gr.Radio(SOURCES, value=OWN, label="What to round", elem_id="rounding-what", min_width=220)
        self.numbers = gr.Textbox(
            EXAMPLE, label="Your numbers", lines=4, max_lines=8, elem_id="rounding-numbers", min_width=220,
            info="A row on each line, with spaces between the numbers.",
        )  # fmt: skip
        offered = self.state.access.offered
        self.model = model_field(
            self.state.model, elem_id="rounding-model", names=offered, min_width=200, visible=False
        )
        self.layer = gr.Dropdown(
            [], value=None, label="Layer", info="Block and name.", allow_custom_value=True, elem_id="rounding-layer",
            min_width=200, visible=False,
        )  # fmt: skip
        self.prompt = gr.Textbox(
            "", label="Prompt", placeholder="Name three colours.", elem_id="rounding-prompt", min_width=200,
            visible=False,
        )  # fmt: skip
        self.take = gr.Button("Take it", elem_id="rounding-run", elem_classes=["llmq-run"], visible=False)

    def _build_rounding(self) -> None:
        choices = [(shown_name(name), name) for name in METHODS_SHOWN]
        self.method = gr.Dropdown(choices, value="absmax", label="Method", elem_id="rounding-method", min_width=220)
        self.bits = gr.Slider(
            BITS.low, BITS.high, 4, step=1, label="Bits", info="For ‘rounded to nearest’.", elem_id="rounding-bits",
            min_width=260,
        )  # fmt: skip
        self.group = gr.Slider(
            GROUP.low, GROUP.shown, 128, step=GROUP.step, label="Group", elem_id="rounding-group", min_width=260,
            info="Numbers that share a scale in group methods; 0 is a row.",
        )  # fmt: skip
        self.outlier = gr.Slider(
            0, 100, 0, step=1, label="Planted outlier", info="So many times the largest number; 0 is none.",
            elem_id="rounding-outlier", min_width=260,
        )  # fmt: skip

    @property
    def settings(self) -> list:
        return [self.source, self.numbers, self.model, self.layer, self.prompt, self.method, self.bits, self.group,
                self.outlier]  # fmt: skip

    @property
    def shown(self) -> list:
        return [self.status, self.finding, self.sums, self.histogram, self.errors, self.table, self.keeping.key]

    def wire(self, tab: gr.Tab, stop) -> None:
        moved = [self.method.change, self.bits.input, self.group.input, self.outlier.input, self.numbers.change]
        drawn = {"fn": self._draw, "inputs": [self.taken, *self.settings], "outputs": self.shown}
        gr.on([tab.select, *moved], **drawn, trigger_mode="always_last", **STREAMED)
        self.method.change(lambda name: explained_methods([name]), self.method, self.how, **QUIET)
        shown = [self.numbers, self.model, self.layer, self.prompt, self.take]
        chosen = self.source.change(self._sourced, [self.source, self.model], [*shown, self.taken], **QUIET)
        chosen.then(**drawn, **STREAMED)
        self.model.change(self._layers, self.model, self.layer, **QUIET)
        asked = self.take.click(self._take, self.settings, [self.taken, *self.shown], **ASKED)
        tell_end(asked, self.status.elem_id)
        self.status.stop(stop, None, None, **QUIET)
        self.keeping.wire(self._open, self.shown)

    def _sourced(self, source, model) -> dict:
        """The fields that belong to what is rounded; a tensor of the other kind is let go."""
        own = source == OWN
        return {
            self.numbers: gr.Textbox(visible=own),
            self.model: gr.Dropdown(visible=not own),
            self.layer: self._layers(model, visible=not own),
            self.prompt: gr.Textbox(visible=source == "input"),
            self.take: gr.Button(visible=not own),
            self.taken: None,
        }

    def _layers(self, model, **look) -> gr.Dropdown:
        """The field for a layer of a model."""
        try:
            opened = self.state.access.describe_model(str(model or ""))
            return gr.Dropdown(choices=layer_names(opened), value=first_layer(opened), **look)
        except UserError:
            return gr.Dropdown(choices=[], value=None, **look)

    def _question(self, source, numbers, model, layer, prompt, method, bits, group, outlier) -> Rounding:
        own = source == OWN
        return Rounding(
            model=str(model or ""), device=self.state.device, layer=str(layer or ""), what="weight" if own else source,
            prompt=str(prompt or ""), numbers=str(numbers or "") if own else "", method=method,
            bits=whole("bits", bits), group=whole("group", group), outlier=outlier,
        )  # fmt: skip

    def _take(
        self, source, numbers, model, layer, prompt, method, bits, group, outlier, request: gr.Request
    ) -> Iterator[dict]:
        """Take the tensor out of the model, keep it for all that is computed from it, and draw."""
        settings = (source, numbers, model, layer, prompt, method, bits, group, outlier)
        key = None
        try:
            found = Answers(self.state, self._question(*settings), request)
            yield {self.status: working("Starting")}
            with closing(iter(found)) as items:
                for item in items:
                    if isinstance(item, Taken):
                        key = self.state.keep(item)
                        break
                    if line := progress_of(item):
                        yield {self.status: line}
        except (UserError, ValueError, TypeError) as error:
            yield {self.status: f"Not taken: {error}"}
            raise notice(error) from error
        if key:
            yield {self.taken: key}
            yield from self._draw(key, *settings)
        else:
            yield {self.status: found.early or "Stopped before the tensor was taken."}

    def _draw(self, key, *settings) -> Iterator[dict]:
        """What is drawn of the kept tensor, or of the typed numbers; then the table, too."""
        own = settings[0] == OWN
        taken = None if own else self.state.kept(key)
        if not (own or taken):
            yield {self.status: GONE if key else "Choose a layer and take its tensor."}
            return
        try:
            question = self._question(*settings)
            for answer in question.answers(taken or typed(question.numbers)):
                yield self._shown(answer)
        except (UserError, ValueError, TypeError) as error:
            yield {self.status: f"Not rounded: {error}"}

    def _shown(self, answer: Rounded) -> dict:
        made = [histogram_figure(answer.view, answer.method), error_figure(answer.view, answer.method)]
        shown = {
            self.status: "" if answer.rows else "Measuring the other methods",
            self.finding: answer.finding,
            self.sums: sums_markup(answer),
            self.histogram: sent(made[0]),
            self.errors: sent(made[1]),
        }
        if not answer.rows:
            return shown
        return shown | {self.table: filled(answer.table())} | self.keeping.kept(answer)

    def _open(self, upload: str) -> dict:
        """A saved answer in the place of what is shown."""
        try:
            answer = self.keeping.answer_in(upload)
        except UserError as error:
            return {self.status: f"Not opened: {error}"}
        return self._shown(answer) | {self.status: "A saved answer. Take the tensor again to change anything."}


def sums_markup(answer: Rounded) -> str:
    """Markup: the formula with the numbers of one element in it, and of the one that is furthest off."""
    names = ("A typical number", "The number that is furthest off")[-len(answer.view.worked) :]
    worked = zip(names, answer.view.worked, strict=True)
    return "".join(
        f"<h2>{name}: {html.escape(where)}</h2><pre>{html.escape(chr(10).join(lines))}</pre>"
        for name, (where, *lines) in worked
    ).join(('<div class="llmq-sums">', "</div>"))
