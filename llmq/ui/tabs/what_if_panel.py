"""The What-if part of the Outliers tab: channels silenced or amplified, the threshold moved, one half in 8 bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gradio as gr

from llmq.errors import BadChoice, UserError
from llmq.experiments.ablation import Ablation
from llmq.experiments.channels import Amplifying, Silencing
from llmq.experiments.lab import Experiment, Outcome
from llmq.experiments.tables import HEADERS, finding, rows_of
from llmq.experiments.thresholds import Thresholds
from llmq.figures.lines import FIGURES
from llmq.ui.parts.figure import figure_view, sent
from llmq.ui.parts.notices import notice
from llmq.ui.parts.progress import progress_of
from llmq.ui.parts.status import status_line
from llmq.ui.shell.state import AppState

THRESHOLD_METHODS = ["llm-int8", "bnb-int8"]
QUIET = {"show_progress": "hidden"}


@dataclass
class Section:
    """One experiment on the page: its controls, its button, and where its result goes."""

    kind: str
    inputs: list
    button: gr.Button
    status: gr.HTML
    finding: gr.Markdown
    figure: gr.HTML | None
    table: gr.Dataframe
    rows: gr.State


class WhatIfPanel:
    """Builds the part inside an open tab; `wire` connects it to the shared prompt and model."""

    def __init__(self, state: AppState):
        self.state = state

    def build(self) -> None:
        with gr.Accordion("Which half breaks naive 8 bit?", open=True, elem_id="ablation"):
            gr.Markdown("Weights alone in 8 bit (W8A32), activations alone (W32A8), both (W8A8), on the same text.")
            self.ablation = self._section("ablation", "Measure", [])
        with gr.Accordion("Make channels louder without changing the function", open=True, elem_id="amplifying"):
            gr.Markdown(
                "Each norm's weight times s, the columns that read it divided by s: in 16 bit the same model, with "
                "activations s times as large, as outliers are. It is SmoothQuant run backwards: SmoothQuant divides "
                "activations to make them easy to round, this multiplies them to make them hard."
            )
            with gr.Row(equal_height=True):
                self.factor = gr.Slider(1, 64, 16, step=1, label="s", elem_id="factor", min_width=220)
                self.channels = gr.Textbox(
                    "", label="Channels", placeholder="three, spread evenly",
                    info="Numbers such as 7,19, or empty.", elem_id="amplified-channels", min_width=200,
                )  # fmt: skip
            self.amplifying = self._section("amplifying", "Measure at this s", [self.factor, self.channels])
        with gr.Accordion("Silence the strongest channels", open=True, elem_id="silencing"):
            gr.Markdown(
                "The k strongest channels of what layers read behind a norm are set to 0 everywhere, and as many "
                "random ones. Perplexity, and how the prompt goes on."
            )
            self.count = gr.Slider(1, 16, 1, step=1, label="k", elem_id="silenced-count")
            self.silencing = self._section("silencing", "Silence", [self.count])
        with gr.Accordion("Move the threshold and measure again", open=True, elem_id="thresholds"):
            gr.Markdown(
                "A **lower** threshold keeps more columns in 16 bit: nearer to FP16, more work. **Off** is not the "
                "lowest threshold but none at all."
            )
            self.method = gr.Radio(THRESHOLD_METHODS, value="llm-int8", label="Method", elem_id="threshold-method")
            self.thresholds = self._section("thresholds", "Measure all", [self.method])

    def _section(self, kind: str, label: str, inputs: list) -> Section:
        button = gr.Button(label, variant="primary", elem_id=f"{kind}-run", size="md")
        status = status_line("", elem_id=f"{kind}-status")
        said = gr.Markdown("", elem_id=f"{kind}-finding", visible=False)
        figure = figure_view(elem_id=f"{kind}-figure") if kind in FIGURES else None
        table = gr.Dataframe(
            headers=HEADERS[kind], value=[], label="Measured", interactive=False, wrap=True, type="array",
            elem_id=f"{kind}-table", elem_classes=["llmq-table"], visible=False,
        )  # fmt: skip
        return Section(kind, inputs, button, status, said, figure, table, gr.State([]))

    def wire(self, prompt, model) -> None:
        self._wire(self.ablation, self._ablation, [model])
        self._wire(self.silencing, self._silencing, [model, prompt, self.count])
        self._wire(self.thresholds, self._thresholds, [model, self.method])
        inputs = [model, self.factor, self.channels, self.amplifying.rows]
        self._wire(self.amplifying, self._amplifying, inputs, self.factor.release)

    def _wire(self, section: Section, handler: Callable, inputs: list, *more) -> None:
        outputs = [section.status, section.finding, section.table, section.rows]
        outputs += [section.figure] if section.figure else []
        gr.on(
            [section.button.click, *more], handler, inputs, outputs, concurrency_limit=16,
            concurrency_id="runs", api_name=section.kind, trigger_mode="always_last", **QUIET,
        )  # fmt: skip

    def _ablation(self, model, request: gr.Request) -> Iterator[dict]:
        """W8A8, W32A8 and W8A32 on the reference text."""
        yield from self._run(self.ablation, lambda: Ablation(**self._shared(model)), [], request)

    def _silencing(self, model, prompt, count, request: gr.Request) -> Iterator[dict]:
        """Silence the strongest channels, and as many random ones."""
        make = lambda: Silencing(**self._shared(model), prompt=str(prompt or ""), counts=(whole("k", count),))  # noqa: E731
        yield from self._run(self.silencing, make, [], request)

    def _thresholds(self, model, method, request: gr.Request) -> Iterator[dict]:
        """Every threshold measured anew."""
        make = lambda: Thresholds(**self._shared(model), method=str(method))  # noqa: E731
        yield from self._run(self.thresholds, make, [], request)

    def _amplifying(self, model, factor, channels, rows, request: gr.Request) -> Iterator[dict]:
        """Amplify channels by s. Rows of the same model and channels stay beside the new ones."""

        def make() -> Amplifying:
            return Amplifying(**self._shared(model), factors=(float(factor),), channels=channel_numbers(channels))

        yield from self._run(self.amplifying, make, list(rows or []), request)

    def _shared(self, model) -> dict:
        return {"model": model, "device": self.state.device}

    def _run(
        self, section: Section, make: Callable[[], Experiment], kept: list[dict], request: gr.Request
    ) -> Iterator[dict]:
        """Stream one experiment: the status with its bar, and the result whenever a row is measured."""
        outcome = None
        try:
            experiment = make()
            yield {section.status: "Starting"}
            for item in self.state.run(experiment, request.session_hash or "nobody"):
                if isinstance(item, Outcome):
                    outcome = item
                    yield self._shown(section, outcome.result, kept)
                elif line := progress_of(item):
                    yield {section.status: line}
        except (UserError, ValueError, TypeError) as error:
            yield {section.status: f"Not run: {error}"}
            raise notice(error) from error
        yield {section.status: _ended(outcome)}

    def _shown(self, section: Section, result: dict, kept: list[dict]) -> dict:
        rows = merged(kept, [row | {"model": result["model"]} for row in result["results"]])
        whole = result | {"results": rows}
        said = finding(whole)
        update = {
            section.finding: gr.Markdown(said, visible=bool(said)),
            section.table: gr.Dataframe(value=rows_of(whole), visible=True),
            section.rows: rows,
        }
        if section.figure:
            update[section.figure] = sent(FIGURES[section.kind](rows))
        return update


def _ended(outcome: Outcome | None) -> str:
    if outcome is None:
        return "Stopped before anything was measured."
    tokens = f"{outcome.result['tokens']} tokens of {outcome.result['text']}"
    return f"{'Stopped early; what was measured stays. ' if outcome.result['stopped'] else ''}Measured on {tokens}."


def merged(kept: list[dict], rows: list[dict]) -> list[dict]:
    """Amplifications of the same channels of the same model stay beside the new ones, which replace their equals."""
    if not kept or not rows:
        return rows or kept
    new = {(row["factor"], row["method"]) for row in rows}
    same = [row for row in kept if all(row[key] == rows[0][key] for key in ("model", "channels"))]
    old = [row for row in same if (row["factor"], row["method"]) not in new]
    return sorted([*old, *rows], key=lambda row: row["factor"])


def channel_numbers(text: str | None) -> tuple[int, ...] | None:
    """'7, 19' as numbers; None for nothing. Raises BadChoice naming what is no number."""
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    for part in parts:
        if not part.isascii() or not part.isdigit():
            raise BadChoice(f"channel is {part!r}; write whole numbers with commas, such as 7,19")
    return tuple(map(int, parts)) or None


def whole(name: str, value) -> int:
    """A slider's number; anything else that is not whole is refused by name."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise BadChoice(f"{name} is {value!r}; choose a whole number")
    return int(value)
