"""The Outliers tab: what to watch, and the parts that show it. Each part is a module of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import gradio as gr

from llmq.contestant import Contestant
from llmq.errors import UserError
from llmq.events import Loading
from llmq.inspect.report import OutlierReport
from llmq.labs.outliers import MAX_NEW_TOKENS, Inspection, Preparation, ReportAnswer
from llmq.methods import METHODS
from llmq.models.presets import PRESETS
from llmq.ui.parts.examples import EXAMPLES
from llmq.ui.parts.notices import notice
from llmq.ui.parts.progress import progress_of
from llmq.ui.parts.status import status_line
from llmq.ui.shell.state import AppState
from llmq.ui.tabs.agreement_panel import AgreementPanel
from llmq.ui.tabs.figures_panel import FiguresPanel
from llmq.ui.tabs.labs_panel import LabsPanel
from llmq.ui.tabs.map_panel import MapPanel
from llmq.ui.tabs.moments_panel import MomentsPanel

log = logging.getLogger(__name__)
QUIET = {"show_progress": "hidden", "api_visibility": "private"}


class OutliersTab:
    """Builds the tab inside an open `gr.Blocks`; `wire()` connects it."""

    def __init__(self, state: AppState):
        self.state = state
        self.map, self.moments, self.figures = MapPanel(), MomentsPanel(), FiguresPanel()
        self.agreement, self.what_if = AgreementPanel(state), LabsPanel(state)

    def build(self) -> None:
        gr.Markdown(
            "LLM.int8() keeps a column of a layer's input in 16 bit when any |x| in it reaches the threshold. "
            "Prefill pools the whole prompt; decode sees one token at a time, so its sets are smaller."
        )
        self._build_form()
        with gr.Tabs(elem_id="observatory"):
            with gr.Tab("Activations", id="activations"):
                self.map.build()
            with gr.Tab("Sent to 16 bit", id="moments"):
                self.moments.build()
            with gr.Tab("The paper's figures", id="figures"):
                self.figures.build()
            with gr.Tab("Agreement and cause", id="agreement"):
                self.agreement.build()
            with gr.Tab("What if", id="what-if"):
                self.what_if.build()

    def _build_form(self) -> None:
        self.prompt = gr.Textbox(EXAMPLES[0][1], label="Prompt to watch", lines=2, elem_id="outlier-prompt")
        with gr.Row(equal_height=True):
            self.model = gr.Dropdown(
                [(preset.title, preset.name) for preset in PRESETS.values()], value=self.state.model, label="Model",
                allow_custom_value=True,
                elem_id="outlier-model", min_width=200,
            )  # fmt: skip
            self.method = gr.Dropdown(
                [(method.label, name) for name, method in METHODS.items()], value="bnb-int8", label="Method",
                elem_id="outlier-method", min_width=200,
            )  # fmt: skip
            self.threshold = gr.Slider(
                2, 20, 6.0, step=0.1, label="Threshold", info="Judges a watched run anew, without a new run.",
                elem_id="outlier-threshold", min_width=220,
            )  # fmt: skip
            self.new_tokens = gr.Slider(
                0, MAX_NEW_TOKENS, 8, step=1, label="Generated tokens to watch", elem_id="outlier-new-tokens",
                min_width=200,
            )  # fmt: skip
        with gr.Row():
            self.watch = gr.Button("Watch activations", variant="primary", elem_id="watch", scale=2, min_width=140)
            self.stop = gr.Button("Stop", variant="stop", elem_id="outlier-stop", scale=1, min_width=90)
        self.status = status_line("Ready.", elem_id="outlier-status")
        self.report_key = gr.State(None)

    def wire(self, tab: gr.Tab) -> None:
        panels = (self.map, self.moments, self.figures)
        for panel in panels:
            panel.prepare(self._report)
        gr.on(
            [self.watch.click, self.prompt.submit],
            self._watch,
            [self.prompt, self.model, self.method, self.threshold, self.new_tokens],
            [self.status, self.report_key, *(part for panel in panels for part in panel.framed)],
            show_progress="hidden",
            concurrency_limit=16,
            concurrency_id="runs",
            api_name="page_outliers",
            api_visibility="private",
        )
        for panel in panels:
            inputs = [self.report_key, self.threshold, *panel.inputs]
            changed = [self.report_key.change, self.threshold.input, *panel.changes]
            gr.on(changed, panel.draw, inputs, panel.outputs, trigger_mode="always_last", **QUIET)
        self.agreement.wire(self.prompt, self.model, self.method, self.threshold)
        self.what_if.wire(self.prompt, self.model)
        self.stop.click(self._stop, None, None, queue=False, **QUIET)
        tab.select(self._prepare, [self.model, self.method], None, concurrency_limit=1, **QUIET)

    def _report(self, key: str | None) -> OutlierReport | None:
        return self.state.kept(key)

    def _watch(self, prompt, model, method, threshold, new_tokens, request: gr.Request) -> Iterator[dict]:
        """Run the prompt with every linear layer's input watched."""
        report = None
        try:
            inspection = Inspection(
                prompt=prompt,
                model=model,
                contestant=Contestant.parse(str(method), threshold),
                new_tokens=int(new_tokens),
                device=self.state.device,
            )
            for item in self.state.run(inspection, request.session_hash or "nobody"):
                if isinstance(item, ReportAnswer):
                    report = item.report
                    if report.generated_tokens < new_tokens and not report.stopped:
                        yield self._finished(report) | {
                            self.status: {"text": "The prompt is read; generating", "fraction": None}
                        }
                elif isinstance(item, Loading) and item.contestant:
                    yield {self.status: {"text": f"Loading {item.contestant}, then watching", "fraction": None}}
                elif line := progress_of(item):
                    yield {self.status: line}
        except (UserError, ValueError, TypeError) as error:
            yield {self.status: f"Not run: {error}"}
            raise notice(error) from error
        yield self._finished(report)

    def _finished(self, report: OutlierReport | None) -> dict:
        if report is None:
            return {self.status: "Stopped before anything ran."}
        said = f"{report.prompt_tokens} prompt tokens and {report.generated_tokens} generated tokens watched"
        frame = {
            self.status: f"{'Stopped early: ' if report.stopped else ''}{said} in {len(report.modules)} linear layers.",
            self.report_key: self.state.keep(report),
        }
        for panel in (self.map, self.moments, self.figures):
            frame |= panel.frame(report)
        return frame

    def _prepare(self, model, method, request: gr.Request) -> None:
        """Load the demo model while the visitor reads the tab; a larger one may not fit beside what is loaded."""
        if model != "demo":
            return
        try:
            job = Preparation(model=model, contestant=Contestant.parse(str(method)), device=self.state.device)
            for _ in self.state.run(job, request.session_hash or "nobody"):
                pass
        except UserError as error:
            log.info("not loaded ahead: %s", error)

    def _stop(self, request: gr.Request) -> None:
        self.state.stop(request.session_hash or "nobody")
