"""The Outliers tab: what to watch, what came out in a sentence, and the parts that show it, a module each."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import gradio as gr

from llmq.contestant import Contestant
from llmq.errors import UserError
from llmq.inspect.report import OutlierReport
from llmq.labs.outliers import MAX_NEW_TOKENS, Inspection, Preparation, ReportAnswer
from llmq.ui.parts.address import keep_in_address
from llmq.ui.parts.controls import METHOD_CHOICES, model_field
from llmq.ui.parts.examples import EXAMPLES
from llmq.ui.parts.explanation import explanation
from llmq.ui.parts.glossary import KINDS
from llmq.ui.parts.keeping import Keeping
from llmq.ui.parts.notices import Answers, notice
from llmq.ui.parts.progress import progress_of
from llmq.ui.parts.story import asked_of, headline, watched_line
from llmq.ui.parts.watched import refused, watched_view
from llmq.ui.shell.assets import script
from llmq.ui.shell.link import outlier_wishes
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import ASKED, QUIET, STREAMED, owner_of, tell_end
from llmq.ui.tabs.agreement_panel import AgreementPanel
from llmq.ui.tabs.figures_panel import FiguresPanel
from llmq.ui.tabs.labs_panel import LabsPanel
from llmq.ui.tabs.map_panel import MapPanel
from llmq.ui.tabs.moments_panel import MomentsPanel
from llmq.ui.tabs.silencing_card import SilencingCard, recorded_value

log = logging.getLogger(__name__)
PARTS = {
    "activations": "Activations",
    "moments": "Sent to 16 bit",
    "figures": "The paper's figures",
    "agreement": "Agreement and cause",
    "what-if": "What if",
}
ABOUT = (
    "A layer reads a table of numbers: a row for each token, a column for each channel. LLM.int8() keeps a column in "
    "16 bit when any number in it reaches the threshold. Prefill has a row for every token of the prompt; decode has "
    "one row, so it keeps fewer columns."
)
IDLE = "A few numbers inside a language model are many times larger than the rest. Watch where they are."
REDRAWN = "Move the threshold to redraw the pictures; the model is not run again."
FIRST = "Nothing is watched yet. Press Watch above, or open a saved run under Activations."


class OutliersTab:
    """Builds the tab inside an open `gr.Blocks`; `wire()` connects it."""

    def __init__(self, state: AppState):
        self.state = state
        self.map, self.moments, self.figures = MapPanel(recorded_value(state)), MomentsPanel(), FiguresPanel()
        self.panels = (self.map, self.moments, self.figures)
        self.agreement, self.what_if = AgreementPanel(state), LabsPanel(state)
        self.card = SilencingCard(self.what_if)
        self.keeping = Keeping(state, ReportAnswer.kind)

    def build(self) -> None:
        with gr.Column(elem_id="outliers-view", elem_classes=["llmq-view", "llmq-outliers"]):
            with gr.Column(elem_id="outlier-form", elem_classes=["llmq-form"]):
                self._build_form()
            self.status = watched_view(IDLE, elem_id="outlier-status")
            with gr.Column(elem_classes=["llmq-unwatched", "llmq-for-watching"]):
                explanation(ABOUT)
            with gr.Tabs(elem_id="observatory") as self.parts:
                built = (self.map, self.moments, self.figures, self.agreement, self.what_if)
                for (name, title), panel in zip(PARTS.items(), built, strict=True):
                    with gr.Tab(title, id=name, elem_id=f"part-{name}"):
                        self._build_part(panel)
            self.link = gr.Textbox(
                label="Link to this view", buttons=["copy"], elem_id="outlier-link", interactive=False, max_lines=1
            )

    def _build_part(self, panel) -> None:
        if panel in (self.moments, self.figures):
            gr.HTML(f'<p class="llmq-quiet">{FIRST}</p>', elem_classes=["llmq-flush", "llmq-unwatched"])
        panel.build()
        if panel is self.map:
            self.keeping.build("report", "this watched run")

    def _build_form(self) -> None:
        with gr.Row(elem_classes=["llmq-ask"]):
            self.prompt = gr.Textbox(
                EXAMPLES[0][1], label="Prompt", lines=2, max_lines=8, elem_id="outlier-prompt", scale=1,
                min_width=260,
            )  # fmt: skip
            self.watch = gr.Button(
                "Watch", variant="primary", elem_id="watch", scale=0, min_width=150, elem_classes=["llmq-for-watching"]
            )
        with gr.Row(equal_height=True, elem_classes=["llmq-choices"]):
            offered = self.state.access.offered
            self.model = model_field(self.state.model, elem_id="outlier-model", names=offered, min_width=200)
            self.method = gr.Dropdown(
                METHOD_CHOICES, value="bnb-int8", label="Method",
                allow_custom_value=True, elem_id="outlier-method", min_width=200,
                elem_classes=["llmq-for-methods"],
            )  # fmt: skip
            self.new_tokens = gr.Slider(
                0, MAX_NEW_TOKENS, 8, step=1, label="Tokens to write and watch", elem_id="outlier-new-tokens",
                min_width=200, elem_classes=["llmq-for-watching"],
            )  # fmt: skip

    @property
    def threshold(self) -> gr.Slider:
        return self.map.threshold

    @property
    def linked(self) -> list:
        """What a link to this tab carries besides the prompt and the model."""
        return [self.method, self.threshold, self.map.kind, self.parts]

    def wire(self, tab: gr.Tab) -> None:
        for panel in self.panels:
            panel.prepare(self._report)
        shown = [self.status, self.keeping.key, *(part for panel in self.panels for part in panel.framed)]
        form = [self.prompt, self.model, self.method, self.threshold, self.new_tokens]
        asked = gr.on([self.watch.click, self.prompt.submit], self._watch, form, shown, **ASKED)
        tell_end(asked, self.status.elem_id)
        self.keeping.wire(self._open, [*shown, *form])
        for panel in self.panels:
            inputs = [self.keeping.key, self.threshold, *panel.inputs]
            changed = [self.keeping.key.change, self.threshold.input, *panel.changes]
            gr.on(changed, panel.draw, inputs, panel.outputs, trigger_mode="always_last", **QUIET)
        gr.on(  # the key: the threshold may have moved while the run went on
            [self.keeping.key.change, self.threshold.input], self._judge, [self.keeping.key, self.threshold],
            self.status, trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        self.agreement.wire(self.prompt, self.model, self.method, self.threshold, self._stop)
        self.what_if.wire(self.prompt, self.model, self._stop)
        self.card.wire(self.map.card, self.prompt, self.model, self._stop)
        self.status.stop(self._stop, None, None, **QUIET)
        tab.select(self._prepare, [self.model, self.method], None, concurrency_limit=1, **STREAMED)
        self._wire_link(tab)

    def _wire_link(self, tab: gr.Tab) -> None:
        carried = [self.prompt, self.model, self.method, self.threshold, self.map.kind]
        moved = [tab.select, self.parts.select, *(part.change for part in carried)]
        gr.on(moved, None, carried, self.link, js=script("outlier_link.js"), **QUIET)
        keep_in_address(self.link)

    def from_link(self, request: gr.Request) -> dict:
        """What the address asks of this tab; what it does not name stays."""
        query = dict(request.query_params)
        wishes = outlier_wishes(query)
        part = query.get("part")
        return {
            self.method: wishes.get("method", gr.skip()),
            self.threshold: wishes.get("threshold", gr.skip()),
            self.map.kind: kind if (kind := query.get("kind")) in KINDS else gr.skip(),
            self.parts: gr.Tabs(selected=part) if part in PARTS else gr.skip(),
        }

    def _report(self, key: str | None) -> OutlierReport | None:
        answer = self.state.kept(key)
        return answer and answer.report

    def _watch(self, prompt, model, method, threshold, new_tokens, request: gr.Request) -> Iterator[dict]:
        """Run the prompt with every linear layer's input watched."""
        told = {"state": "running", "text": "", "doing": "Starting", "fraction": None, "note": "", "banner": ""}
        answer = None
        try:
            contestant = Contestant.parse(str(method), threshold)
            inspection = Inspection(
                prompt=prompt, model=model, contestant=contestant, new_tokens=int(new_tokens), device=self.state.device
            )
            told |= {"asked": asked_of(model, contestant.label, prompt)}
            yield {self.status: told}
            for item in (items := Answers(self.state, inspection, request)):
                if isinstance(item, ReportAnswer):
                    answer = item
                    if answer.report.generated_tokens < new_tokens and not answer.report.stopped:
                        doing = {"text": headline(answer.report, threshold), "doing": "The prompt is read; generating"}
                        told = told | doing
                        yield self._shown(answer) | {self.status: told}
                elif line := progress_of(item):
                    told = told | {"doing": line["text"], "fraction": line["fraction"]}
                    yield {self.status: told}
        except (UserError, ValueError, TypeError) as error:
            yield {self.status: self._refused(f"Not run: {error}")}
            raise notice(error) from error
        if answer:
            yield self._shown(answer, early=items.early)
        else:
            yield {self.status: self._refused(items.early or "Stopped before anything ran.")}

    def _shown(self, answer: ReportAnswer, banner: str = "", early: str = "") -> dict:
        """A watched run, `banner` above it; `early`: why it is not whole. The panels draw it when they hear that it is
        another."""
        report = answer.report
        frame = {
            self.status: {
                "state": "opened" if banner else "done",
                "asked": asked_of(report.model, report.method, answer.prompt),
                "text": headline(report, answer.threshold),
                "doing": "",
                "note": f"{early} {watched_line(report)} {REDRAWN}".strip(),
                "banner": banner,
            }
        }
        for panel in self.panels:
            frame |= panel.frame(report)
        return frame | self.keeping.kept(answer)

    def _open(self, upload: str) -> dict:
        """A saved run in the place of the watched one, and the form as it was."""
        try:
            answer = self.keeping.answer_in(upload)
        except UserError as error:
            return {self.status: self._refused(f"Not opened: {error}")}
        report = answer.report
        name, _, _ = report.method.partition("@")
        form = {self.model: report.model, self.method: name, self.threshold: answer.threshold}
        if answer.prompt:
            form |= {self.prompt: answer.prompt}
        return self._shown(answer, "A saved run") | form

    def _refused(self, text: str) -> dict:
        return refused(text, self.state.next_run())

    def _judge(self, key, threshold) -> dict:
        """The sentence at another threshold."""
        report = self._report(key)
        return {self.status: {"text": headline(report, threshold)} if report else gr.skip()}

    def _prepare(self, model, method, request: gr.Request) -> None:
        """Load the demo model while the visitor reads the tab; a larger one may not fit beside what is loaded."""
        if model != "demo":
            return
        try:
            job = Preparation(model=model, contestant=Contestant.parse(str(method)), device=self.state.device)
            for _ in self.state.run(job, owner_of(request)):
                pass
        except UserError as error:
            log.info("not loaded ahead: %s", error)

    def _stop(self, request: gr.Request) -> None:
        self.state.stop(owner_of(request))
