"""The Outliers tab: one prompt with every linear layer's input watched; the threshold moves without a new run."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from llmq.contestants import Contestant
from llmq.errors import UserError
from llmq.events import Loading
from llmq.inspect.report import OutlierReport
from llmq.inspect.run import MAX_NEW_TOKENS, Inspection
from llmq.models.presets import PRESETS
from llmq.quant import METHODS
from llmq.ui.compare_view import status_line as line_of
from llmq.ui.examples import EXAMPLES
from llmq.ui.notices import notice
from llmq.ui.outlier_page import map_figure
from llmq.ui.outlier_tables import shares_table, strongest_table, token_figure
from llmq.ui.session import Session
from llmq.ui.status import status_line

PHASES = ("prefill", "decode")
SHARE_HEADERS = ["Input of", "Phase", "Layers with outliers", "Channels over", "Values over", "Largest |x|"]
CHANNEL_HEADERS = ["Input of", "Channel", "Largest |x|", "Layer", "Phase", "Over the threshold in layers"]
DARK_SCRIPT = "(...inputs) => [...inputs.slice(0, -1), document.body.classList.contains('dark')]"


class OutliersTab:
    """Builds the tab inside an open `gr.Blocks`; `wire()` connects it."""

    def __init__(self, session: Session):
        self.session = session

    def build(self) -> None:
        gr.Markdown(
            "LLM.int8() keeps a column of a layer's input in 16 bit when any |x| in it reaches the threshold. "
            "Prefill pools the whole prompt; decode sees one token at a time, so its sets are smaller."
        )
        self.prompt = gr.Textbox(EXAMPLES[0][1], label="Prompt to watch", lines=2, elem_id="outlier-prompt")
        with gr.Row(equal_height=True):
            self.model = gr.Dropdown(
                list(PRESETS), value=self.session.model, label="Model", allow_custom_value=True,
                elem_id="outlier-model", min_width=200,
            )  # fmt: skip
            self.method = gr.Dropdown(
                [(method.label, name) for name, method in METHODS.items()], value="bnb-int8", label="Method",
                elem_id="outlier-method", min_width=200,
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
        self.dark = gr.Checkbox(visible=False)
        with gr.Row(equal_height=True):
            self.threshold = gr.Slider(
                2, 20, 6.0, step=0.1, label="Threshold", info="Judges this run's activations anew, without a new run.",
                elem_id="outlier-threshold", min_width=220,
            )  # fmt: skip
            self.kind = gr.Radio(["q/k/v", "o", "gate/up", "down"], value="down", label="Input of", elem_id="kind")
            self.phase = gr.Radio(list(PHASES), value="prefill", label="Phase", elem_id="phase")
        self.map = gr.Plot(label="Layer × channel", show_label=False, visible=False, elem_id="outlier-map")
        self.shares = self._table("What reaches the threshold", SHARE_HEADERS, "outlier-shares")
        self.channels = self._table("Strongest channels", CHANNEL_HEADERS, "outlier-channels")
        self.layer = gr.Slider(0, 31, 0, step=1, label="Layer", info="Token by token, prompt only.", elem_id="layer")
        self.tokens = gr.Plot(label="Token × channel", show_label=False, visible=False, elem_id="token-map")

    def _table(self, label: str, headers: list[str], elem_id: str) -> gr.Dataframe:
        return gr.Dataframe(
            headers=headers, value=[], label=label, interactive=False, wrap=True, elem_id=elem_id, type="array"
        )

    def wire(self) -> None:
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        questions = [self.report_key, self.threshold, self.kind, self.phase, self.layer, self.dark]
        pictures = [self.map, self.tokens, self.shares, self.channels]
        done = gr.on(
            [self.watch.click, self.prompt.submit],
            self._watch,
            [self.prompt, self.model, self.method, self.threshold, self.new_tokens],
            [self.status, self.report_key, self.kind, self.layer],
            show_progress="hidden",
            concurrency_limit=16,
            concurrency_id="runs",
            api_name="outliers",
        )
        done.then(self._draw, questions, pictures, js=DARK_SCRIPT, **quiet)
        gr.on(
            [self.threshold.input, self.kind.input, self.phase.input],
            self._draw, questions, pictures, js=DARK_SCRIPT, trigger_mode="always_last", **quiet,
        )  # fmt: skip
        self.layer.input(self._draw_tokens, questions, self.tokens, js=DARK_SCRIPT, trigger_mode="always_last", **quiet)
        self.stop.click(self._stop, None, None, queue=False, **quiet)

    def _watch(self, prompt, model, method, threshold, new_tokens, request: gr.Request) -> Iterator[dict]:
        """Run the prompt with every linear layer's input watched."""
        report = None
        try:
            inspection = Inspection(
                prompt=prompt,
                model=model,
                contestant=Contestant.parse(str(method), threshold),
                new_tokens=int(new_tokens),
                device=self.session.device,
            )
            for item in self.session.run(inspection, request.session_hash or "nobody"):
                if isinstance(item, OutlierReport):
                    report = item
                else:
                    yield {self.status: line_of(item) if not isinstance(item, Loading) else _loading(item)}
        except (UserError, ValueError, TypeError) as error:
            yield {self.status: f"Not run: {error}"}
            raise notice(error) from error
        yield self._finished(report)

    def _finished(self, report: OutlierReport | None) -> dict:
        if report is None:
            return {self.status: "Stopped before anything ran."}
        kinds = [kind for kind in report.kinds if kind != "lm_head"]
        layers = [module.layer for module in report.modules if module.layer is not None]
        said = f"{report.prompt_tokens} prompt tokens and {report.generated_tokens} generated tokens watched"
        return {
            self.status: f"{'Stopped early: ' if report.stopped else ''}{said} in {len(report.modules)} linear layers.",
            self.report_key: self.session.keep_report(report),
            self.kind: gr.Radio(kinds, value="down" if "down" in kinds else kinds[0]),
            self.layer: gr.Slider(maximum=max(layers, default=0), value=_loudest_layer(report)),
        }

    def _draw(self, key, threshold, kind, phase, layer, dark) -> dict:
        """Every picture and table of a kept report at one threshold."""
        report = self.session.report(key)
        if report is None:
            return {self.map: gr.skip(), self.tokens: gr.skip(), self.shares: gr.skip(), self.channels: gr.skip()}
        return {
            self.map: gr.Plot(map_figure(report, kind, phase, threshold, dark=bool(dark)), visible=True),
            self.tokens: self._tokens(report, kind, layer, threshold, dark),
            self.shares: shares_table(report, threshold),
            self.channels: strongest_table(report, threshold),
        }

    def _draw_tokens(self, key, threshold, kind, phase, layer, dark):
        report = self.session.report(key)
        return gr.skip() if report is None else self._tokens(report, kind, layer, threshold, dark)

    def _tokens(self, report: OutlierReport, kind: str, layer: float, threshold: float, dark) -> gr.Plot:
        figure = token_figure(report, kind, int(layer), threshold, dark=bool(dark))
        return gr.Plot(figure, visible=figure is not None)

    def _stop(self, request: gr.Request) -> None:
        self.session.stop(request.session_hash or "nobody")


def _loading(event: Loading) -> str:
    return line_of(event) if not event.contestant else f"Loading {event.contestant}, then watching"


def _loudest_layer(report: OutlierReport) -> int:
    """The layer with the largest |x|: the first one worth a look."""
    inside = [module for module in report.modules if module.layer is not None]
    return max(inside, key=lambda module: module.absmax).layer if inside else 0
