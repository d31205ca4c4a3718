"""The Agreement part of the Outliers tab: both methods read one text; a click on a token asks why it came out so."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from llmq.contestant import Contestant
from llmq.errors import UserError
from llmq.figures.bars import layer_error_figure
from llmq.inspect.cause import Cause
from llmq.labs.agreement import MAX_NEW_TOKENS, Read, Reading, drift_line
from llmq.labs.cause import PATCH_HEADERS, PATCHES_TITLE, CauseAnswer, Explanation, cause_line, patch_rows
from llmq.ui.parts.controls import whole
from llmq.ui.parts.explanation import explanation
from llmq.ui.parts.figure import figure_view, sent
from llmq.ui.parts.keeping import Keeping
from llmq.ui.parts.notices import Answers, notice
from llmq.ui.parts.progress import progress_of
from llmq.ui.parts.reading_view import reading_view
from llmq.ui.parts.status import status_line, working
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import ASKED, QUIET, owner_of, tell_end

TEXTS = [("FP16's answer to the prompt", "continuation"), ("The prompt", "prompt"), ("This text", "text")]


class AgreementPanel:
    """Builds the part inside an open tab; `wire` connects it to the shared prompt, model and method."""

    def __init__(self, state: AppState):
        self.state = state
        self.keeping = Keeping(state, "agreement", "cause")

    def build(self) -> None:
        with gr.Column(elem_classes=["llmq-part"]):
            self._build_reading()
        with gr.Column(elem_classes=["llmq-part"]):
            self._build_cause()
        self.keeping.build("agreement", "what both read")

    def _build_reading(self) -> None:
        explanation(
            "FP16 and the method above read the same text, so a difference at one token is not carried into the "
            "next. Apart from that both write freely, and the page shows where they part."
        )
        with gr.Row(equal_height=True):
            self.text = gr.Radio(TEXTS, value="continuation", label="Both read", elem_id="text-kind")
            self.new_tokens = gr.Slider(
                1, MAX_NEW_TOKENS, 32, step=1, label="Tokens of the answer", elem_id="reading-tokens", min_width=200
            )
        self.pasted = gr.Textbox(
            "", label="Text to read", lines=4, visible=False, elem_id="pasted", placeholder="Paste a few sentences."
        )
        self.read = gr.Button("Read with both", variant="primary", elem_id="read", elem_classes=["llmq-run"])
        self.status = status_line("", elem_id="reading-status")
        self.reading = reading_view(elem_id="reading")
        self.drift = gr.Textbox("", show_label=False, container=False, visible=False, elem_id="drift", lines=2)
        self.key = gr.State(None)

    def _build_cause(self) -> None:
        gr.Markdown("## Chain of cause", elem_id="cause-title")
        explanation(
            "How far is each layer's output off at one token (SQNR)? And which single module, computed in 16 bit, "
            "repairs it?"
        )
        self.cause_status = status_line("Click a token of the text that both have read.", elem_id="cause-status")
        self.patch = gr.Checkbox(
            True, label="Try every module in 16 bit. Stop ends it; what is found stays.", elem_id="patch"
        )
        self.layers = figure_view(elem_id="layer-errors")
        self.patches = gr.Dataframe(
            headers=PATCH_HEADERS, value=[], label=PATCHES_TITLE, interactive=False, wrap=True,
            type="array", elem_id="patches", elem_classes=["llmq-table"], visible=False,
        )  # fmt: skip

    def wire(self, prompt, model, method, threshold, stop) -> None:
        self.text.change(lambda kind: gr.Textbox(visible=kind == "text"), self.text, self.pasted, **QUIET)
        asked = self.read.click(
            self._read,
            [prompt, self.pasted, self.text, model, method, threshold, self.new_tokens],
            self.shown,
            **ASKED,
        )
        tell_end(asked, self.status.elem_id)
        asked = self.reading.select(
            self._explain,
            [self.key, self.patch],
            [self.cause_status, self.layers, self.patches, self.keeping.key],
            trigger_mode="always_last",
            **ASKED,
        )
        tell_end(asked, self.cause_status.elem_id)
        for status in (self.status, self.cause_status):
            status.stop(stop, None, None, **QUIET)
        self.keeping.wire(self._open, self.shown)

    @property
    def shown(self) -> list:
        """What another reading changes."""
        reading = [self.status, self.reading, self.drift, self.key, self.keeping.key]
        return [*reading, self.cause_status, self.layers, self.patches]

    def _read(self, prompt, pasted, kind, model, method, threshold, new_tokens, request: gr.Request) -> Iterator[dict]:
        """Both methods read one text; agreement token by token."""
        read = None
        try:
            reading = Reading(
                prompt=str((pasted if kind == "text" else prompt) or ""),
                text=kind,
                model=model,
                contestant=Contestant.parse(str(method), threshold),
                new_tokens=whole("tokens of the answer", new_tokens),
                device=self.state.device,
            )
            yield {self.status: working("Starting"), self.reading: {}, self.drift: gr.Textbox(visible=False)}
            for item in (items := Answers(self.state, reading, request)):
                if isinstance(item, Read):
                    read = item
                elif line := progress_of(item):
                    yield {self.status: line}
        except (UserError, ValueError, TypeError) as error:
            yield {self.status: f"Not read: {error}"}
            raise notice(error) from error
        if read is None:
            yield {self.status: items.early or "Stopped before both had read the text."}
            return
        yield self._read_frame(read)

    def _read_frame(self, read: Read) -> dict:
        """A text that both have read."""
        drift, kept = drift_line(read), self.keeping.kept(read)
        said = f"{len(read.agreement.diverging)} of {len(read.agreement.tokens)} tokens have another first choice"
        return {
            self.status: f"{said}; they are underlined.",
            self.reading: read.value(),
            self.drift: gr.Textbox(drift, visible=bool(drift)),
            self.key: kept[self.keeping.key],
            self.cause_status: "Click a token, an underlined one if there is one.",
            self.layers: {},
            self.patches: gr.Dataframe(value=[], visible=False),
            **kept,
        }

    def _open(self, upload: str) -> dict:
        """A saved reading, and with it the cause of one of its tokens where that was saved."""
        try:
            answer = self.keeping.answer_in(upload)
        except UserError as error:
            return {self.status: f"Not opened: {error}"}
        if isinstance(answer, Read):
            return self._read_frame(answer)
        cause = {self.cause_status: cause_line(answer.cause, answer.read), **self.keeping.kept(answer)}
        return self._read_frame(answer.read) | self._shown(answer.cause, answer.read) | cause

    def _explain(self, key, patch, event: gr.EventData, request: gr.Request) -> Iterator[dict]:
        """The chain of cause of the chosen token, growing while modules are tried."""
        read = self.state.kept(key)
        if read is None:
            yield {self.cause_status: "This text is no longer kept; read it again."}
            return
        self.state.stop(owner_of(request))  # another token: the one before is no longer wanted
        cause = None
        try:
            explanation = Explanation.of(read, whole("token", event.position), bool(patch))
            for item in (items := Answers(self.state, explanation, request)):
                if isinstance(item, Cause):
                    cause = item
                    yield self._shown(cause, read)
                elif line := progress_of(item):
                    found = f"{cause_line(cause, read)} " if cause else ""
                    yield {self.cause_status: _after(found, line)}
        except (UserError, ValueError, TypeError) as error:
            yield {self.cause_status: f"Not explained: {error}"}
            raise notice(error) from error
        if cause is None:
            yield {self.cause_status: items.early or "Stopped before anything was found."}
        else:
            early = items.early or ("Stopped early." if cause.stopped else "")
            said, kept = f"{early} {cause_line(cause, read)}".strip(), self.keeping.kept(CauseAnswer(cause, read))
            yield {self.cause_status: said} | kept

    def _shown(self, cause: Cause, read: Read) -> dict:
        return {
            self.cause_status: working(cause_line(cause, read)),
            self.layers: sent(layer_error_figure(cause)),
            self.patches: gr.Dataframe(value=patch_rows(cause, read), visible=bool(cause.patches)),
        }


def _after(found: str, line: dict) -> dict:
    """Progress behind what is known already."""
    return line | {"text": f"{found}{line['text']}"}
