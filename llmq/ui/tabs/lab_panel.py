"""A section of the What-if part of the Outliers tab: one lab, its controls made of its annotated fields."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from llmq.errors import UserError
from llmq.fields import fields_of
from llmq.labs.rows import RowAnswer, RowLab
from llmq.ui.parts.controls import control, value_of
from llmq.ui.parts.figure import figure_view, sent
from llmq.ui.parts.notices import notice
from llmq.ui.parts.progress import progress_of
from llmq.ui.parts.status import status_line
from llmq.ui.shell.state import AppState
from llmq.ui.tabs.report_panels import filled, table


class LabPanel:
    """One lab: its controls by field, its button, and where its answer goes. Built inside an open tab; `wire` connects
    it to the shared prompt and model."""

    def __init__(self, state: AppState, lab: type[RowLab]):
        self.state, self.lab = state, lab

    def build(self) -> None:
        lab, kind = self.lab, self.lab.kind
        with gr.Accordion(lab.title, open=True, elem_id=kind):
            gr.Markdown(lab.about)
            with gr.Row(equal_height=True):
                made = [(field, control(field, f"{kind}-{field.name}")) for field in fields_of(lab)]
            self.controls = [(field, component) for field, component in made if component is not None]
            self.button = gr.Button(lab.button, variant="primary", elem_id=f"{kind}-run", size="md")
            self.status = status_line("", elem_id=f"{kind}-status")
            self.finding = gr.Markdown("", elem_id=f"{kind}-finding", visible=False)
            self.figure = figure_view(elem_id=f"{kind}-figure")
            self.table = table("Measured", lab.headers(), f"{kind}-table")
        self.rows = gr.State([])

    def wire(self, prompt, model) -> None:
        moved = [component.release for field, component in self.controls if getattr(field.kind, "live", False)]
        gr.on(
            [self.button.click, *moved],
            self.ask,
            [model, prompt, self.rows, *(component for _, component in self.controls)],
            [self.status, self.finding, self.table, self.rows, self.figure],
            concurrency_limit=16,
            concurrency_id="runs",
            api_name=self.lab.kind,
            api_description=self.lab.about,
            trigger_mode="always_last",
            show_progress="hidden",
        )

    def ask(self, model, prompt, rows, request: gr.Request, *values) -> Iterator[dict]:
        """Stream the status with its bar, and the answer whenever a row is there. Gradio puts the request where the
        parameter of that type stands."""
        answer = None
        try:
            given = {field.name: value_of(field, v) for (field, _), v in zip(self.controls, values, strict=True)}
            question = self.lab(model=model, device=self.state.device, prompt=str(prompt or ""), **given)
            yield {self.status: "Starting"}
            for item in self.state.run(question, request.session_hash or "nobody"):
                if isinstance(item, RowAnswer):
                    answer = item
                    yield self._shown(answer.result, list(rows or []))
                elif line := progress_of(item):
                    yield {self.status: line}
        except (UserError, ValueError, TypeError) as error:
            yield {self.status: f"Not run: {error}"}
            raise notice(error) from error
        yield {self.status: _ended(answer)}

    def _shown(self, result: dict, kept: list[dict]) -> dict:
        lab = self.lab
        rows = lab.beside(kept, [row | {"model": result["model"]} for row in result["results"]])
        said, figures = lab.finding(rows), lab.figures(rows)
        return {
            self.finding: gr.Markdown(said, visible=bool(said)),
            self.table: filled([lab.row(row) for row in rows]),
            self.rows: rows,
            self.figure: sent(figures[0].make() if figures else None),
        }


def _ended(answer: RowAnswer | None) -> str:
    if answer is None:
        return "Stopped before anything was measured."
    tokens = f"{answer.result['tokens']} tokens of {answer.result['text']}"
    return f"{'Stopped early; what was measured stays. ' if answer.result['stopped'] else ''}Measured on {tokens}."
