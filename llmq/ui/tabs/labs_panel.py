"""Sections of labs whose answers are tables, made of their annotated fields: the What-if part of the Outliers tab has
one for every lab that asks for one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import gradio as gr

from llmq.contestant import shown_name
from llmq.errors import UserError
from llmq.fields import Field, fields_of
from llmq.figures.pages import texts_markup
from llmq.labs import lab_classes
from llmq.labs.rows import RowAnswer, TableLab
from llmq.models.presets import model_title
from llmq.ui.parts.controls import control, linked, value_of
from llmq.ui.parts.explanation import explanation
from llmq.ui.parts.figure import figure_view, sent
from llmq.ui.parts.keeping import Keeping
from llmq.ui.parts.notices import Answers, notice
from llmq.ui.parts.progress import progress_of
from llmq.ui.parts.status import status_line, working
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import ASKED, QUIET, tell_end
from llmq.ui.tabs.map_panel import TABLE_PIXELS

ABOUT = (
    "Each experiment asks the model above, and writes on from the prompt above. The method and the threshold above "
    "play no part here: every experiment has its own."
)


@dataclass
class Section:
    """One lab on the page: its controls by field, its button, and where its answer goes."""

    lab: type[TableLab]
    controls: list[tuple[Field, gr.components.Component]]
    button: gr.Button
    status: gr.HTML
    finding: gr.Markdown
    figure: gr.HTML
    table: gr.Dataframe
    texts: gr.HTML
    takeaway: gr.Textbox
    rows: gr.State
    keeping: Keeping

    @property
    def outputs(self) -> list:
        """What a question of this section may change."""
        shown = [self.status, self.finding, self.table, self.texts, self.takeaway, self.rows, self.figure]
        return [*shown, self.keeping.key]


class LabsPanel:
    """Builds the part inside an open tab; `wire` connects it to the shared prompt and model. `labs`: other ones than
    those that ask for a section."""

    def __init__(self, state: AppState, labs: Sequence[type[TableLab]] = ()):
        self.state, self.labs = state, labs

    def build(self) -> None:
        if not self.labs:
            explanation(ABOUT)
        labs = self.labs or [lab for lab in lab_classes().values() if lab.panel]
        self.sections = [self._section(lab) for lab in labs]

    def from_link(self, query: Mapping[str, str]) -> dict:
        """What a link to the part of a lab asks of its controls, as far as it is possible."""
        wishes = {}
        for section in self.sections:
            for field, component in section.controls if query.get("part") == section.lab.kind else ():
                with suppress(KeyError, UserError):
                    wishes[component] = linked(field, query[field.name])
        return wishes

    @property
    def linked(self) -> list:
        """What a link may set."""
        return [component for section in self.sections for _, component in section.controls]

    def section(self, lab: type[TableLab]) -> Section:
        """The section of a lab."""
        return next(section for section in self.sections if section.lab is lab)

    def _section(self, lab: type[TableLab]) -> Section:
        kind = lab.kind
        keeping = Keeping(self.state, kind)
        with gr.Accordion(lab.title, open=True, elem_id=kind, elem_classes=["llmq-part"]):
            explanation(lab.about)
            with gr.Row(equal_height=True):
                made = [(field, control(field, f"{kind}-{field.name}")) for field in fields_of(lab)]
            button = gr.Button(lab.button, elem_id=f"{kind}-run", size="md", elem_classes=["llmq-run"])
            status = status_line("", elem_id=f"{kind}-status")
            said = gr.Markdown("", elem_id=f"{kind}-finding", visible=False)
            figure = figure_view(elem_id=f"{kind}-figure")
            table = gr.Dataframe(
                headers=lab.headers(), value=[], label="Measured", interactive=False, wrap=True, type="array",
                max_height=TABLE_PIXELS, elem_id=f"{kind}-table", elem_classes=["llmq-table"], visible=False,
            )  # fmt: skip
            texts = gr.HTML("", elem_id=f"{kind}-texts", visible=False)
            takeaway = gr.Textbox(
                label="To copy", buttons=["copy"], interactive=False, elem_id=f"{kind}-takeaway", visible=False,
                max_lines=6,
            )  # fmt: skip
            if lab.explained:
                explanation(lab.explained)
            keeping.build(kind, "this answer")
        controls = [(field, component) for field, component in made if component is not None]
        return Section(lab, controls, button, status, said, figure, table, texts, takeaway, gr.State([]), keeping)

    def wire(self, prompt, model, stop) -> None:
        for section in self.sections:
            inputs = [model, prompt, section.rows, *(component for _, component in section.controls)]
            moved = [component.release for field, component in section.controls if getattr(field.kind, "live", False)]
            asked = gr.on(
                [section.button.click, *moved], self.handler(section), inputs, section.outputs,
                trigger_mode="always_last", **ASKED,
            )  # fmt: skip
            tell_end(asked, section.status.elem_id)
            section.status.stop(stop, None, None, **QUIET)
            section.keeping.wire(self.opener(section), section.outputs)

    def handler(self, section: Section):
        """What the section's button calls; Gradio puts the request where the parameter of that type stands."""

        def ask(model, prompt, rows, request: gr.Request, *values) -> Iterator[dict]:
            make = partial(self._question, section, model, prompt, values)
            yield from self._run(section, make, list(rows or []), request)

        ask.__doc__ = section.lab.about
        return ask

    def _question(self, section: Section, model, prompt, values) -> TableLab:
        given = {field.name: value_of(field, v) for (field, _), v in zip(section.controls, values, strict=True)}
        return section.lab(model=model, device=self.state.device, prompt=str(prompt or ""), **given)

    def _run(self, section: Section, make, kept: list[dict], request: gr.Request) -> Iterator[dict]:
        """Stream one lab: the status with its bar, and the answer whenever a row is measured."""
        answer = None
        try:
            question = make()
            yield {section.status: working("Starting")}
            for item in (items := Answers(self.state, question, request)):
                if isinstance(item, RowAnswer):
                    answer = item
                    rows = self._rows(section, answer, kept)
                    yield self._shown(section, rows)
                elif line := progress_of(item):
                    yield {section.status: line}
        except (UserError, ValueError, TypeError) as error:
            yield {section.status: f"Not run: {error}"}
            raise notice(error) from error
        yield {section.status: _ended(answer, items.early)} | (self._kept(section, answer, rows) if answer else {})

    def opener(self, section: Section):
        """What shows a saved answer of the section."""

        def show(upload: str) -> dict:
            try:
                answer = section.keeping.answer_in(upload)
            except UserError as error:
                return {section.status: f"Not opened: {error}"}
            return self.opened(section, answer, "A saved answer")

        return show

    def opened(self, section: Section, answer: RowAnswer, what: str) -> dict:
        """What shows an answer that was not measured now; `what` says where it is from."""
        rows = self._rows(section, answer, [])
        device = answer.result.get("conditions", {}).get("device_name", "")
        said = (
            f"{what}, {model_title(str(answer.result['model']))}{f' on {device}' if device else ''}. {_ended(answer)}"
        )
        return self._shown(section, rows) | self._kept(section, answer, rows) | {section.status: said}

    def _rows(self, section: Section, answer: RowAnswer, kept: list[dict]) -> list[dict]:
        """The rows of an answer, beside those that stay."""
        return section.lab.beside(kept, [row | {"model": answer.result["model"]} for row in answer.rows])

    def _kept(self, section: Section, answer: RowAnswer, rows: list[dict]) -> dict:
        return section.keeping.kept(replace(answer, result=answer.result | {"results": rows}))

    def _shown(self, section: Section, rows: list[dict]) -> dict:
        lab, named = section.lab, [_named(row) for row in rows]
        said, figures, taken = lab.finding(named), lab.figures(named), lab.takeaway(named)
        texts = lab.texts(named)
        return {
            section.finding: gr.Markdown(said, visible=bool(said)),
            section.table: gr.Dataframe(value=[lab.row(row) for row in lab.shown(named)], visible=True),
            section.texts: gr.HTML(texts_markup(texts) if texts else "", visible=bool(texts)),
            section.takeaway: gr.Textbox(value=taken, visible=bool(taken)),
            section.rows: rows,
            section.figure: sent(figures[0].make() if figures else None),
        }


def _named(row: dict) -> dict:
    """A row with its method's name as people read it."""
    return row | {"method": shown_name(row["method"])} if "method" in row else row


def _ended(answer: RowAnswer | None, early: str = "") -> str:
    if answer is None:
        return early or "Stopped before anything was measured."
    told = [f"{name}: not measured: {reason}." for name, reason in answer.result.get("missing", {}).items()]
    if answer.rows:
        stopped = early or ("Stopped early; what was measured stays." if answer.result["stopped"] else "")
        result = answer.result
        read = f"Measured on {result['tokens']:,} tokens of {result['text']}." if "text" in result else ""
        told = [f"{stopped} {read}".strip(), *told]
    return " ".join(told)
