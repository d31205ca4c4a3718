"""The Compare tab: components, handlers that return dicts keyed by component, and their wiring."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import gradio as gr

from llmq.environment import cpu_capability, describe
from llmq.errors import UserError
from llmq.events import Run
from llmq.labs.compare import SCHEDULES
from llmq.methods import METHODS
from llmq.models.opening import open_model
from llmq.models.presets import PRESETS
from llmq.ui.parts.examples import EXAMPLES
from llmq.ui.parts.live import live_panel
from llmq.ui.parts.notices import notice
from llmq.ui.parts.status import status_line
from llmq.ui.parts.token_diff import token_diff_view
from llmq.ui.shell.link import query_of, wishes_of
from llmq.ui.shell.state import AppState
from llmq.ui.shell.theme import CONTESTANT_CLASSES
from llmq.ui.tabs.compare_form import NONE, comparison_of, labels_in
from llmq.ui.tabs.compare_view import PANES, CompareView, labels_of

LARGEST_RECORDING = 32_000_000  # bytes
SIDEBAR_SCRIPT = "() => document.querySelector('.sidebar .toggle-button').click()"
LINK_SCRIPT = "(query) => query ? window.location.origin + window.location.pathname + '?' + query : ''"


class CompareTab:
    """Builds the tab inside an open `gr.Blocks`; `wire()` connects it once every component exists."""

    def __init__(self, state: AppState):
        self.state = state

    def sidebar(self) -> None:
        """Settings that most people leave alone."""
        gr.Markdown("### Settings")
        self.max_new_tokens = gr.Slider(1, 512, 64, step=1, label="New tokens", elem_id="max-new-tokens")
        self.schedule = gr.Radio(
            [("interleave: both at once", SCHEDULES[0]), ("in turn: one after the other", SCHEDULES[1])],
            value=SCHEDULES[0],
            label="Schedule",
            info="Steps never overlap either way; in turn is for figures you publish.",
            elem_id="schedule",
        )
        self.temperature = gr.Slider(
            0, 2, 0, step=0.05, label="Temperature", info="0 picks the likeliest token (greedy).", elem_id="temperature"
        )
        self.top_k = gr.Slider(0, 200, 0, step=1, label="Top-k", info="0 is off.", elem_id="top-k")
        self.top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p (nucleus)", info="1 is off.", elem_id="top-p")
        self.seed = gr.Number(
            0, precision=0, minimum=0, label="Seed", info="Both methods draw with the same noise.", elem_id="seed"
        )

    def build(self) -> None:
        state = self.state
        self.prompt = gr.Textbox(
            EXAMPLES[0][1], label="Prompt", lines=2, max_lines=8, elem_id="prompt", placeholder="Ask something"
        )
        with gr.Row(elem_id="examples", elem_classes=["llmq-examples"]):
            self.examples = [
                gr.Button(name, size="sm", min_width=84, elem_id=f"example-{i}") for i, (name, _) in enumerate(EXAMPLES)
            ]
        with gr.Row(equal_height=True):
            self.model = gr.Dropdown(
                list(PRESETS),
                value=state.model,
                label="Model",
                allow_custom_value=True,
                info="A name, a hub id (owner/name) or a local folder.",
                elem_id="model",
                min_width=220,
            )
            self.methods = [self._method(index) for index in range(PANES)]
            self.threshold = gr.Slider(
                0,
                20,
                6.0,
                step=0.1,
                label="Outlier threshold",
                info="For LLM.int8(). 0 is off.",
                elem_id="threshold",
                min_width=220,
            )
        with gr.Row():
            self.generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=2, min_width=140)
            self.stop = gr.Button("Stop", variant="stop", elem_id="stop", scale=1, min_width=90)
            self.more = gr.Button("Settings", elem_id="more-settings", scale=1, min_width=90)
        self.status = status_line("Ready.", elem_id="status")
        with gr.Row(elem_classes=["llmq-panes"]):
            self.columns, self.panes = zip(*(self._pane(index) for index in range(PANES)), strict=True)
        self.live = live_panel()
        self.verdict = gr.Markdown(elem_id="verdict", elem_classes=["llmq-verdict"])
        gr.Markdown("### Where the texts part")
        self.diff = token_diff_view()
        self._keep_and_share()

    def _keep_and_share(self) -> None:
        gr.Markdown("### Keep, share, replay")
        with gr.Row(elem_classes=["llmq-keep"]):
            self.download = gr.DownloadButton("Download this run", elem_id="download", interactive=False, min_width=200)
            self.link = gr.Textbox(label="Link to these settings", buttons=["copy"], elem_id="link", min_width=240)
        self.query = gr.Textbox(visible=False, elem_id="query")
        with gr.Row(elem_classes=["llmq-keep"]):
            names = list(self.state.recorded_runs)
            self.recording = gr.Dropdown(
                names, value=names[0] if names else None, label="Recorded run", elem_id="recording", min_width=240
            )
            self.upload = gr.File(
                label="… or a run you downloaded (.jsonl)",
                file_types=[".jsonl"],
                type="filepath",
                height=140,
                elem_id="upload",
                min_width=240,
            )
            self.replay = gr.Button("Replay", elem_id="replay", min_width=120)

    def _method(self, index: int) -> gr.Dropdown:
        choices = [(f"{method.label}", name) for name, method in METHODS.items()]
        values = [*self.state.methods, NONE, NONE]
        return gr.Dropdown(
            ([("none", NONE)] if index == 2 else []) + choices,
            value=values[index],
            label=("Left", "Right", "Third")[index],
            allow_custom_value=True,
            info=("The baseline", "Against it", "Or bnb-int8@0: a threshold of its own")[index],
            elem_id=f"method-{index}",
            min_width=180,
        )

    def _pane(self, index: int) -> tuple[gr.Column, gr.Textbox]:
        classes = ["llmq-pane", CONTESTANT_CLASSES[index]]
        with gr.Column(visible=index < len(self.state.methods), elem_classes=classes, min_width=0) as column:
            text = gr.Textbox(
                label=self._pane_label(index),
                lines=9,
                max_lines=24,
                buttons=["copy"],
                interactive=False,
                elem_id=f"pane-{index}",
            )
        return column, text

    def _pane_label(self, index: int) -> str:
        return [*self.state.methods, " ", " "][index]

    def wire(self, page: gr.Blocks) -> None:
        for button, (_, text) in zip(self.examples, EXAMPLES, strict=True):
            button.click(lambda text=text: text, None, self.prompt, show_progress="hidden", api_visibility="private")
        inputs = [
            self.prompt, self.model, *self.methods, self.threshold, self.max_new_tokens, self.schedule,
            self.temperature, self.top_k, self.top_p, self.seed,
        ]  # fmt: skip
        # Three events, because Gradio builds every output of a streaming event anew at each update, changed or not
        # (about 1 ms each, under the GIL that the engine's steps need): the stream has the changing ones only.
        frame, streamed = [self.status, *self.columns, *self.panes, self.verdict, self.diff], [self.status, *self.panes]
        results = [self.status, self.verdict, self.diff, self.download, self.query]
        quiet = {"show_progress": "hidden", "concurrency_limit": 16}
        opened = gr.on(
            [self.generate.click, self.prompt.submit], self._open, inputs, frame, api_visibility="private", **quiet
        )
        ran = opened.success(
            self._generate,
            inputs,
            [*streamed, self.live],
            concurrency_id="runs",
            api_name="page_compare",
            api_visibility="private",
            **quiet,
        )
        ran.then(self._close, None, results, api_visibility="private", **quiet)
        self.replay.click(
            self._replay,
            [self.recording, self.upload],
            [*frame, self.live, self.download, self.query],
            api_visibility="private",
            **quiet,
        )
        self.more.click(None, None, None, js=SIDEBAR_SCRIPT, api_visibility="private")
        self.stop.click(self._stop, None, None, queue=False, show_progress="hidden", api_visibility="private")
        self.query.change(None, self.query, self.link, js=LINK_SCRIPT, api_visibility="private")
        settings = [
            self.prompt, self.model, *self.methods, self.max_new_tokens, self.schedule,
            self.temperature, self.top_k, self.top_p, self.seed,
        ]  # fmt: skip
        page.load(self._from_link, None, settings, show_progress="hidden", api_visibility="private")
        page.unload(self._leave)

    def _open(self, *settings) -> Iterator[dict]:
        """Check the settings and clear the page for a new run."""
        try:
            labels = labels_in(comparison_of(self.state.device, *settings))
        except UserError as error:
            yield {self.status: f"Not started: {error}"}
            raise notice(error) from error
        yield self._frame(labels)

    def _generate(
        self, prompt, model, left, right, third, threshold, max_new_tokens, schedule, temperature, top_k, top_p, seed,
        request: gr.Request,
    ) -> Iterator[dict]:  # fmt: skip
        """Run one prompt through two or three methods; stream their texts, memory and speed."""
        owner = request.session_hash or "nobody"
        self.state.take_outcome(owner)
        try:
            comparison = comparison_of(
                self.state.device, prompt, model, left, right, third, threshold, max_new_tokens, schedule,
                temperature, top_k, top_p, seed,
            )  # fmt: skip
            source = open_model(comparison.model).source
        except UserError as error:
            yield {self.status: f"Not started: {error}"}
            raise notice(error) from error
        run = Run(comparison.settings(), {})
        events = run.record(self.state.run(comparison, owner), time.monotonic)
        view = CompareView(labels_in(comparison), self.state.next_run(), comparison.device, cpu=cpu_capability())
        results: dict = {}
        for update in self._show(view, events):
            if self.verdict in update:  # the last one: the page says 'Finished' when all of it is there
                results = {part: update.pop(part) for part in (self.status, self.verdict, self.diff) if part in update}
            if update:
                yield update
        run.environment = describe(comparison.device, source)
        path = run.save(self.state.download_path(f"llmq-{view.run}-{datetime.now():%Y%m%d-%H%M%S}.jsonl"))
        results[self.download] = gr.DownloadButton(value=str(path), interactive=True)
        self.state.keep_outcome(owner, results | {self.query: query_of(run.settings)})

    def _close(self, request: gr.Request) -> dict:
        """What is known once a run is over: the verdict, the token diff, the recording, the link."""
        return self.state.take_outcome(request.session_hash or "nobody") or {self.query: gr.skip()}

    def _replay(self, name: str | None, upload: str | None) -> Iterator[dict]:
        """Show a recorded run again at its own pace, labelled as a recording."""
        try:
            run = Run.load(self._recording(name, upload))
            labels = labels_of(run.settings)
            about = f"Recording: {run.environment.get('device_name', 'unknown device')}, "
            about += str(run.environment.get("date", "unknown date"))[:10]
        except UserError as error:
            yield {self.status: f"Not replayed: {error}"}
            raise notice(error) from error
        device, cpu = str(run.settings.get("device", "cpu")), str(run.environment.get("cpu_capability", ""))
        view = CompareView(labels, self.state.next_run(), device, opening=about, cpu=cpu)
        yield self._frame(labels)
        yield from self._show(view, run.replay(time.sleep, time.monotonic))

    def _recording(self, name: str | None, upload: str | None) -> Path:
        if upload:
            path = Path(upload)
            if path.stat().st_size > LARGEST_RECORDING:
                raise UserError(f"{path.name} is larger than {LARGEST_RECORDING // 1_000_000} MB")
            return path
        if name not in self.state.recorded_runs:
            raise UserError("choose a recorded run, or upload one")
        return self.state.recorded_runs[name]

    def _show(self, view: CompareView, events) -> Iterator[dict]:
        """One view's updates as component updates."""
        named = {"status": self.status, "live": self.live, "verdict": self.verdict, "diff": self.diff}
        named |= {f"text_{index}": pane for index, pane in enumerate(self.panes)}
        for update in view.updates(events):
            error = update.pop("error", None)
            yield {named[name]: value for name, value in update.items()}
            if error:
                raise notice(error)

    def _frame(self, labels: list[str]) -> dict:
        """An empty page for these contestants."""
        panes = [self._emptied(index, labels) for index in range(PANES)]
        return {self.verdict: "", self.diff: {}} | {part: update for pane in panes for part, update in pane.items()}

    def _emptied(self, index: int, labels: list[str]) -> dict:
        used = index < len(labels)
        return {
            self.columns[index]: gr.Column(visible=used),
            self.panes[index]: gr.Textbox(value="", label=labels[index] if used else " "),
        }

    def _stop(self, request: gr.Request) -> None:
        if not self.state.stop(request.session_hash or "nobody"):
            gr.Info("Nothing of yours is running.", duration=3)

    def _leave(self, request: gr.Request) -> None:
        self.state.stop(request.session_hash or "nobody")

    def _from_link(self, request: gr.Request) -> dict:
        """Fill the form from the address; what the address does not name stays."""
        wishes = wishes_of(dict(request.query_params))
        simple = {
            "prompt": self.prompt, "model": self.model, "schedule": self.schedule,
            "max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "top_k": self.top_k,
            "top_p": self.top_p, "seed": self.seed,
        }  # fmt: skip
        updates = {component: wishes[name] for name, component in simple.items() if name in wishes}
        if methods := wishes.get("methods"):
            updates |= dict(zip(self.methods, [*methods, NONE, NONE], strict=False))
        return updates or {self.seed: gr.skip()}
