"""The tab 'Does it fit?': a model, a card, a context; what each method needs there, without loading anything.

Every change is answered at once, beside the queue and without the device.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from pathlib import Path

import gradio as gr

from llmq.cards import CARDS, HERE
from llmq.contestant import Contestant
from llmq.errors import BadChoice, NoModel, UserError
from llmq.labs import save_answer
from llmq.labs.advice import METHODS, Advice, Place, advise, stored_results
from llmq.memory import forecast
from llmq.models.opening import Model
from llmq.models.presets import PRESETS, model_title
from llmq.ui.parts.address import keep_in_address
from llmq.ui.parts.advice_card import advice_card
from llmq.ui.parts.controls import model_field
from llmq.ui.parts.fit import fit_panel
from llmq.ui.parts.keeping import download
from llmq.ui.parts.notices import notice
from llmq.ui.parts.picture import picture, pictured
from llmq.ui.shell.access import ANYBODY, Access
from llmq.ui.shell.assets import script
from llmq.ui.shell.link import fit_wishes_of
from llmq.ui.shell.state import AppState
from llmq.ui.shell.wiring import QUIET
from llmq.ui.tabs.fit_view import METHODS_SHOWN, failed, fit_view

NO_MODEL = "the configuration of {} makes no model; choose another one, or mend its config.json"
log = logging.getLogger(__name__)
OTHER = "other"  # in the card field: an amount of memory, typed
PLACE = re.compile(r"(?<![\w./:-])(?:/[\w.@+~-]+){2,}/?")  # a path from the root


class FitTab:
    """Builds the tab inside an open `gr.Blocks`; `wire()` connects it."""

    def __init__(self, state: AppState):
        self.state = state

    def build(self) -> None:
        with gr.Column(elem_id="fit-view"):
            with gr.Row(equal_height=True, elem_id="fit-form"):
                self._build_form()
            self.panel = fit_panel()
            self.advice = gr.HTML("", elem_id="advice", elem_classes=["llmq-flush"])
            with gr.Row(elem_classes=["llmq-keeping"]):
                self.save = gr.Button("Save as JSON", size="sm", elem_id="fit-save", min_width=120)
                self.draw = gr.Button("Save as PNG", size="sm", elem_id="fit-draw", min_width=120)
                self.file = gr.DownloadButton("The file", elem_id="fit-file", visible="hidden")
            self.picture = picture(elem_id="fit-picture")
            with gr.Column(elem_classes=["llmq-keep"]):
                self.link = gr.Textbox(
                    label="Link to this answer", buttons=["copy"], elem_id="fit-link", interactive=False, max_lines=1
                )

    def _build_form(self) -> None:
        large = self.state.model in PRESETS and self.state.model != "demo"
        self.model = model_field(
            self.state.model if large else "llama-3.1-8b-instruct",
            info=None if self.state.access.public else "Or a hub id, owner/name.",
            elem_id="fit-model", min_width=240, scale=3,
        )  # fmt: skip
        self.card = gr.Dropdown(
            [("this machine", HERE), *((card.title, card.name) for card in CARDS.values()), ("other", OTHER)],
            value="rtx-4080", label="Card", info="With the memory that its driver counts.", elem_id="fit-card",
            min_width=260, scale=2,
        )  # fmt: skip
        self.memory = gr.Textbox(
            "16 GiB", label="Its memory", info="In GiB or GB.", elem_id="fit-memory", min_width=120, visible=False
        )
        self.context = gr.Number(
            8192, precision=0, step=1024, label="Context", info="Tokens to remember.", elem_id="fit-context",
            min_width=110, scale=1,
        )  # fmt: skip
        self.batch = gr.Number(
            1, precision=0, label="Batch", info="Texts at once.", elem_id="fit-batch", min_width=110, scale=1
        )

    @property
    def form(self) -> list[gr.components.Component]:
        return [self.model, self.card, self.memory, self.context, self.batch]

    def wire(self, page: gr.Blocks, tab: gr.Tab) -> None:
        changed = [part.change for part in self.form]
        gr.on(
            [tab.select, *changed], self._answer, self.form,
            [self.panel, self.advice, self.memory, self.save, self.draw],
            trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        gr.on([tab.select, *changed], None, self.form, self.link, js=script("fit_link.js"), **QUIET)
        keep_in_address(self.link)
        written = self.save.click(self._written, self.form, self.file, **QUIET)
        written.success(None, None, None, js=download("fit"), **QUIET)
        self.draw.click(self._drawn, self.form, self.picture, **QUIET)
        page.load(self._from_link, None, self.form, **QUIET)

    def _answer(self, model, card, memory, context, batch) -> dict:
        """What every method needs, whether the card has it, and what follows from that."""
        view, advice = answers(model, card, memory, context, batch, self.state.access, self.state.device)
        shown = gr.Button(interactive=advice is not None)
        found = {self.panel: view, self.advice: advice_card(advice), self.save: shown, self.draw: shown}
        return found | {self.memory: gr.Textbox(visible=card == OTHER)}

    def _written(self, *form) -> gr.DownloadButton:
        """The answer to the form as a file. Raises gr.Error, as `_drawn` does, where there is none."""
        advice = self._advice(form)
        path = self.state.download_path(f"{_name(advice)}-{self.state.next_run()}.json")
        save_answer(advice, path)
        return gr.DownloadButton(value=str(path))

    def _drawn(self, *form) -> dict:
        """The answer to the form as a picture."""
        advice = self._advice(form)
        return pictured(advice.picture(), _name(advice), self.state.next_run())

    def _advice(self, form: tuple) -> Advice:
        view, advice = answers(*form, self.state.access, self.state.device)
        if advice is None:
            raise notice(view["headline"])
        return advice

    def _from_link(self, request: gr.Request) -> dict:
        wishes = fit_wishes_of(dict(request.query_params))
        return {getattr(self, name): value for name, value in wishes.items()} or {self.batch: gr.skip()}


def answer(model, card, memory, context, batch, access: Access = ANYBODY) -> dict:
    """The view of a form's values, or of what is wrong with them, in one line that names no place on this machine."""
    view, _ = answers(model, card, memory, context, batch, access)
    return view


def answers(
    model, card, memory, context, batch, access: Access, device: str = "cpu"
) -> tuple[dict, Advice | None]:  # fmt: skip
    """As `answer`, and the advice for it, None where something is wrong. `device`: this machine's."""
    name = str(model or "").strip()
    typed = str(memory or "") if card == OTHER else str(card)
    try:
        place = Place.here(device) if card == HERE else Place.named(typed)
        asked, batch = (_whole(*pair) for pair in (("context", context), ("batch", batch)))
        opened = described(name, access)
        contestants = [Contestant.parse(method) for method in METHODS_SHOWN]
        tokens = min(asked, opened.context)
        result = forecast(opened, contestants, tokens=tokens, batch=batch, device_bytes=place.bytes)
        advice = advise(opened, Contestant.parse_all(METHODS), place, stored_results(), tokens=tokens, batch=batch)
    except NoModel:
        return failed(f"Not counted: {NO_MODEL.format(name)}"), None
    except UserError as error:
        return failed(f"Not counted: {_without_places(str(error), name)}"), None
    except Exception:  # the boundary: a configuration may come from anybody
        log.exception("%s cannot be counted", name)
        return failed(f"Not counted: {NO_MODEL.format(name)}"), None
    counted = typed.strip().lower() in CARDS
    view = fit_view(result, title=model_title(name), place=place.name, asked=asked, by_driver=counted)
    return view, advice


def _name(advice: Advice) -> str:
    """Of a file."""
    return "llmq-advice-" + re.sub(r"[^\w.-]+", "-", advice.result["model"]).strip("-")[-60:]


def described(name: str, access: Access) -> Model:
    """The model, counted once for as long as its configuration does not change."""
    source = access.describe_model(name).source
    if source.kind != "folder":
        return _described(name, access, 0)
    try:
        changed = (Path(source.location) / "config.json").stat().st_mtime_ns
    except OSError:
        changed = 0
    return _described(name, access, changed)


@lru_cache(maxsize=16)
def _described(name: str, access: Access, changed: int) -> Model:
    return access.describe_model(name)


def _whole(name: str, value) -> int:
    if isinstance(value, int | float) and 1 <= value <= 10**9 and value == int(value):
        return int(value)
    raise BadChoice(f"{name} is {'empty' if value is None else value}; choose a whole number over 0")


def _without_places(message: str, typed: str) -> str:
    """Paths of this machine leave a message, but for the one that somebody typed."""
    return PLACE.sub(lambda found: found[0] if found[0] in typed else "a folder here", message)
