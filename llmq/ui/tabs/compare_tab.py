"""The Compare tab: a form, a result, and what can be kept of it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cache
from pathlib import Path

import gradio as gr

from llmq.environment import cpu_capability, describe
from llmq.errors import UserError
from llmq.events import Run, Step
from llmq.labs.compare import SCHEDULES
from llmq.ui.parts.address import keep_in_address
from llmq.ui.parts.controls import METHOD_CHOICES, model_field
from llmq.ui.parts.examples import EXAMPLES
from llmq.ui.parts.how import explained_methods, how_it_works
from llmq.ui.parts.method_settings import method_settings, wire_settings
from llmq.ui.parts.result import result_view
from llmq.ui.shell.assets import script
from llmq.ui.shell.link import query_of, wishes_of
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import ASKED, QUIET, owner_of, tell_end
from llmq.ui.tabs.compare_form import LONGEST_ANSWER, NONE, comparison_of, labels_in
from llmq.ui.tabs.compare_view import PANES, CompareView, asked_of, recording_of, recording_title
from llmq.ui.tabs.server_form import ServerForm

LARGEST_RECORDING = 32_000_000  # bytes
MOST_EVENTS = 50_000  # of a recording: three answers of 4,096 tokens, and memory ten times a second meanwhile
MOST_TOKENS = 3 * 4096  # of a recording, which is made into a picture a token while nobody else is served
MOST_CHARACTERS = 1_000_000  # of its texts
LONGEST_REPLAY = 3600.0  # seconds
UNSAVED = "This run cannot be downloaded: the server could not save it."
UNREADABLE = "it holds values that no run has"
ADVICE = 'model => void window.open("?" + new URLSearchParams({ view: "fit", model: model || "" }))'  # beside the run
log = logging.getLogger(__name__)


class CompareTab:
    """Builds the tab inside an open `gr.Blocks`; `wire()` connects it once every component exists."""

    def __init__(self, state: AppState):
        self.state, self.server = state, ServerForm(state)

    def build(self) -> None:
        with gr.Column(elem_id="compare-view", elem_classes=["llmq-view"]):
            with gr.Column(elem_id="compare-form", elem_classes=["llmq-form"]):
                self._build_question()
                self._build_choices()
                self._build_settings()
            self.result = result_view(self._example())
            self._build_keeping()

    def _build_question(self) -> None:
        with gr.Row(elem_classes=["llmq-ask"]):
            self.prompt = gr.Textbox(
                EXAMPLES[0][1], label="Prompt", lines=2, max_lines=8, elem_id="prompt", scale=1, min_width=260,
                placeholder="Ask something; Shift + Enter generates",
            )  # fmt: skip
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=0, min_width=150)
        with gr.Row(elem_id="examples", elem_classes=["llmq-examples"]):
            self.examples = [
                gr.Button(name, size="sm", min_width=84, elem_id=f"example-{i}") for i, (name, _) in enumerate(EXAMPLES)
            ]

    def _build_choices(self) -> None:
        with gr.Row(equal_height=True, elem_classes=["llmq-choices"]):
            offered = self.state.access.offered
            self.model = model_field(self.state.model, elem_id="model", names=offered, min_width=220)
            self.methods = [self._method(index) for index in range(PANES)]

    def _method(self, index: int) -> gr.Dropdown:
        values = [*self.state.methods, NONE, NONE]
        return gr.Dropdown(
            ([("none", NONE)] if index == 2 else []) + METHOD_CHOICES,
            value=values[index],
            label=("Left", "Right", "Third")[index],
            allow_custom_value=True,
            elem_id=f"method-{index}",
            min_width=180,
        )

    def _build_settings(self) -> None:
        """What most people leave alone."""
        with gr.Accordion("Settings", open=False, elem_id="settings"):
            free = "" if self.state.access.public else "A model may also be a hub id (owner/name) or a local folder. "
            gr.Markdown(
                f"{free}A method may be typed with its settings: `bnb-int8@0` has no threshold, `gptq@bits=3:group=64` "
                "has 3 bits."
            )
            chosen = [method.value for method in self.methods]
            self.method_settings = method_settings(chosen, elem_id="method-settings")
            with gr.Accordion("How these methods work", open=False, elem_id="compare-how"):
                self.how = how_it_works(*self.state.methods, elem_id="compare-explained")
            self.server.build()
            with gr.Row(equal_height=True):
                self.max_new_tokens = gr.Slider(
                    1,
                    LONGEST_ANSWER,
                    512,
                    step=1,
                    label="New tokens",
                    info="At most.",
                    elem_id="max-new-tokens",
                    min_width=220,
                )
                self.threshold = gr.Slider(
                    0, 20, 6.0, step=0.1, label="Threshold", info="Of outliers, for LLM.int8(); 0 is off.",
                    elem_id="threshold", min_width=220,
                )  # fmt: skip
                self.schedule = gr.Radio(
                    list(zip(("both at once", "one after the other", "servers meanwhile"), SCHEDULES, strict=True)),
                    value=SCHEDULES[0], label="Schedule", info="Of methods only one step runs at a time.",
                    elem_id="schedule",
                    min_width=280,
                )  # fmt: skip
            with gr.Row(equal_height=True):
                self.temperature = gr.Slider(
                    0, 2, 0, step=0.05, label="Temperature", info="0 picks the likeliest token (greedy).",
                    elem_id="temperature", min_width=220,
                )  # fmt: skip
                self.top_k = gr.Slider(
                    0, 200, 0, step=1, label="Top-k", info="Draw from the k likeliest; 0 is off.", elem_id="top-k"
                )
                self.top_p = gr.Slider(
                    0.05,
                    1,
                    1,
                    step=0.05,
                    label="Top-p",
                    info="Draw from the likeliest that reach p; 1 is off.",
                    elem_id="top-p",
                )
                self.seed = gr.Number(
                    0,
                    precision=0,
                    minimum=0,
                    label="Seed",
                    info="The same random numbers for all methods.",
                    elem_id="seed",
                )

    def _build_keeping(self) -> None:
        with gr.Column(elem_classes=["llmq-keep"]):
            gr.Markdown("## Share, keep, replay")
            with gr.Row():
                self.link = gr.Textbox(
                    label="Link to these settings", buttons=["copy"], elem_id="link", min_width=240, scale=3,
                    interactive=False, max_lines=1,
                )  # fmt: skip
                self.download = gr.DownloadButton(
                    "Download this run", elem_id="download", interactive=False, min_width=200, scale=1
                )
                self.advise = gr.Button("Should I quantize it?", elem_id="advise", min_width=200, scale=1)
            with gr.Row(elem_id="recordings"):
                runs = [(recording_title(path), name) for name, path in self.state.recorded_runs.items()]
                self.recording = gr.Dropdown(
                    runs, value=runs[0][1] if runs else None, label="Recorded run", elem_id="recording", min_width=240,
                    scale=2,
                )  # fmt: skip
                self.upload = gr.UploadButton(
                    "Open a downloaded run", file_types=[".jsonl"], type="filepath", elem_id="upload", min_width=200,
                    scale=1,
                )  # fmt: skip
                self.replay = gr.Button("Replay", elem_id="replay", min_width=120, scale=1)

    def _example(self) -> dict:
        """The recording that plays until somebody generates: the page shows what it is for by itself."""
        for path in self.state.recorded_runs.values():
            return recording_of(Run.load(path), self.state.next_run(), example=True)
        return {}

    @property
    def settings(self) -> dict[str, gr.components.Component]:
        """What a link carries, by its name there."""
        names = ["prompt", "model", *(f"method_{index}" for index in range(PANES)), "threshold", "max_new_tokens"]
        names += ["schedule", "temperature", "top_k", "top_p", "seed"]
        parts = [self.prompt, self.model, *self.methods, self.threshold, self.max_new_tokens]
        parts += [self.schedule, self.temperature, self.top_k, self.top_p, self.seed]
        return dict(zip(names, parts, strict=True))

    def wire(self, page: gr.Blocks) -> None:
        for button, (_, text) in zip(self.examples, EXAMPLES, strict=True):
            button.click(None, None, self.prompt, js=f"() => {json.dumps(text)}", **QUIET)
        form = list(self.settings.values())
        generated = gr.on(
            [self.generate.click, self.prompt.submit], self._generate, [*form, self.server.address, self.server.key],
            self.result, **ASKED,
        )  # fmt: skip
        generated.then(self._keep, None, self.download, **QUIET)
        self.advise.click(None, self.model, None, js=ADVICE, **QUIET)
        tell_end(generated, self.result.elem_id)
        shown = [self.result, self.download, *form]
        tell_end(self.replay.click(self._replay, self.recording, shown, **QUIET), self.result.elem_id)
        self.upload.upload(self._replay_upload, self.upload, shown, **QUIET)
        chosen = [method.change for method in self.methods]
        gr.on(chosen, lambda *names: explained_methods(names), self.methods, self.how, **QUIET)
        self.result.stop(self._stop, None, None, **QUIET)
        gr.on([part.change for part in form], None, form, self.link, js=script("link.js"), **QUIET)
        self.server.wire(self.methods[-1])
        wire_settings(self.method_settings, self.methods, **QUIET)
        keep_in_address(self.link)
        loaded = page.load(self._from_link, None, form, **QUIET)
        loaded.then(None, form, self.link, js=script("link.js"), **QUIET).then(None, js=script("opened.js"), **QUIET)

    def _generate(
        self, prompt, model, left, right, third, threshold, max_new_tokens, schedule, temperature, top_k, top_p, seed,
        server, key, request: gr.Request,
    ) -> Iterator[dict]:  # fmt: skip
        """Run one prompt through two or three methods; stream what the result shows."""
        owner = owner_of(request)
        self.state.take_recording(owner)
        try:
            comparison = comparison_of(
                self.state.devices, prompt, model, left, right, third, threshold, max_new_tokens, schedule,
                temperature, top_k, top_p, seed, self.server.keys(server, key),
            )  # fmt: skip
            source = self.state.access.open_model(comparison.model).source
        except UserError as error:
            yield self._notice(f"Not started: {error}")
            return
        run = Run(comparison.settings(), {})
        view = CompareView(
            labels_in(comparison), self.state.next_run(), self.state.device, asked_of(run.settings),
            cpu=cpu_capability(),
        )  # fmt: skip
        value: dict = {}
        for value in view.updates(run.record(self.state.run(comparison, owner), time.monotonic)):
            yield value
        run.environment = describe(comparison.device, source)
        try:
            path = run.save(self.state.download_path(f"llmq-{view.run}-{datetime.now():%Y%m%d-%H%M%S}.jsonl"))
        except UserError as error:
            log.error("a run is not saved: %s", error)
            yield value | {"status": f"{value['status']} {UNSAVED}"}
        else:
            self.state.keep_recording(owner, path)

    def _keep(self, request: gr.Request) -> gr.DownloadButton:
        """What can be downloaded once a run is over."""
        path = self.state.take_recording(owner_of(request))
        return gr.DownloadButton(value=str(path), interactive=True) if path else gr.skip()

    def _replay(self, name: str | None) -> dict:
        """Show a recorded run at its own pace, and fill the form with what it answers."""
        if name not in self.state.recorded_runs:
            return {self.result: self._notice("Not replayed: choose a recorded run.")}
        return self._shown(lambda: _bundled(self.state.recorded_runs[name]))

    def _replay_upload(self, upload: str) -> dict:
        return self._shown(lambda: _played(_uploaded(Path(upload))))

    def _shown(self, play: Callable[[], tuple[dict, dict]]) -> dict:
        try:
            value, wishes = play()
            form = self._filled(dict(wishes))
        except UserError as error:
            return {self.result: self._notice(f"Not replayed: {error}")}
        except Exception as error:  # the boundary: the file may come from anybody
            log.error("a recording cannot be shown: %r", error)
            return {self.result: self._notice(f"Not replayed: {UNREADABLE}")}
        played = value | {"run": self.state.next_run()}
        return {self.result: played, self.download: gr.DownloadButton(interactive=False)} | form

    def _notice(self, text: str) -> dict:
        """Another value each time: a browser is not told of one that it has."""
        return {"notice": text, "run": self.state.next_run()}

    def _stop(self, request: gr.Request) -> None:
        self.state.stop(owner_of(request))

    def _from_link(self, request: gr.Request) -> dict:
        """Fill the form from the address; what the address does not name stays."""
        return self._filled(wishes_of(dict(request.query_params))) or {self.seed: gr.skip()}

    def _filled(self, wishes: dict) -> dict:
        if methods := wishes.pop("methods", None):
            names = [*methods, NONE, NONE][:PANES]
            wishes |= {f"method_{index}": name for index, name in enumerate(names)}
        if "max_new_tokens" in wishes:
            wishes["max_new_tokens"] = min(wishes["max_new_tokens"], LONGEST_ANSWER)
        return {self.settings[name]: value for name, value in wishes.items()}


def _played(run: Run) -> tuple[dict, dict]:
    """A run as a browser plays it, and what the form said."""
    return recording_of(run, ""), wishes_of(query_of(run.settings))


@cache
def _bundled(path: Path) -> tuple[dict, dict]:
    """The same for a run that came with the page: everybody replays these."""
    return _played(Run.load(path))


def _uploaded(path: Path) -> Run:
    """A run that a visitor uploaded. Raises UserError that names no place on this machine."""
    if path.stat().st_size > LARGEST_RECORDING:
        raise UserError(f"{path.name} is larger than {LARGEST_RECORDING // 1_000_000} MB")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not a saved run: not text") from error
    if len(lines) > MOST_EVENTS:
        raise UserError(f"{path.name} has {len(lines):,} lines; up to {MOST_EVENTS:,} can be played")
    run = Run.from_lines(lines, name=path.name)
    texts = [timed.event.text for timed in run.events if isinstance(timed.event, Step)]
    if len(texts) > MOST_TOKENS or sum(map(len, texts)) > MOST_CHARACTERS:
        raise UserError(f"{path.name} has more text than up to {MOST_TOKENS:,} tokens can be")
    if run.seconds > LONGEST_REPLAY:
        raise UserError(f"{path.name} plays for {run.seconds / 3600:,.0f} hours; up to one hour can be played")
    return run
