"""The tabs' handlers without a browser or a server: plain generators over scripted streams, their last word checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import gradio as gr
import pytest
from test_compare_view import NAMES, script
from test_observatory_views import SILENCED, cause, read, report

from llmq.errors import UserError
from llmq.events import Finished, Loading, Progress, Run
from llmq.labs import lab_classes
from llmq.labs.compare import Comparison
from llmq.labs.outliers import ReportAnswer
from llmq.labs.rows import RowAnswer
from llmq.ui.shell.state import AppState
from llmq.ui.tabs.compare_tab import CompareTab
from llmq.ui.tabs.outliers_tab import OutliersTab

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # Gradio's, where a handler gets too few or many inputs
ANN = SimpleNamespace(session_hash="ann")
PROMPT = "Plan a 3-day itinerary in Paris."
WORKING = (Loading(contestant="bnb-int8"), Progress("reading the text", 0.5))


class Page:
    """Both tabs over jobs that yield what they are told; a stopped job is one whose stream ends early."""

    def __init__(self, *items):
        self.items, self.jobs, self.stopped = items, [], []
        self.state = AppState(run=self._run, stop=self._stop, device="cpu", device_label="a CPU")
        self.compare, self.outliers = CompareTab(self.state), OutliersTab(self.state)
        with gr.Blocks() as blocks:
            self.compare.sidebar()
            self.compare.build()
            with gr.Tab("Outliers") as tab:
                self.outliers.build()
            self.compare.wire(blocks)
            self.outliers.wire(tab)

    def _run(self, job, owner) -> Iterator:
        self.jobs.append((job, owner))
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item

    def _stop(self, owner) -> int:
        self.stopped.append(owner)
        return 1

    def form(self, model: str = "demo", temperature: float = 0) -> tuple:
        return (PROMPT, model, *NAMES, "none", 6.0, 8, "interleave", temperature, 0, 1, 0)

    def explain(self) -> Iterator[dict]:
        key = self.state.keep(read())
        return self.outliers.agreement._explain(key, True, SimpleNamespace(position=2), ANN)


def shown(updates) -> dict:
    """Component -> what it shows after these updates; of a component's own update, its value."""
    page: dict = {}
    for update in updates:
        page |= update
    return {part: getattr(value, "value", value) for part, value in page.items()}


def said(updates) -> tuple[dict, str]:
    """What is shown when a handler ends in a notice, and the notice."""
    seen = []
    with pytest.raises(gr.Error) as raised:
        for update in updates:
            seen.append(update)
    return shown(seen), raised.value.message


def test_a_comparison_from_the_click_to_the_recording():
    page = Page(*script())
    tab = page.compare
    opened = shown(tab._open(*page.form()))
    assert [opened[pane] for pane in tab.panes] == ["", "", ""]
    streamed = shown(tab._generate(*page.form(), ANN))
    assert [streamed[pane] for pane in tab.panes[:2]] == ["a" * 20 + "!"] * 2
    closed = shown([tab._close(ANN)])
    assert closed[tab.status] == "Finished." and "agree on all 20 tokens" in closed[tab.verdict]
    assert closed[tab.diff]["first_divergence"] is None and "methods=fp16%2Cbnb-int8" in closed[tab.query]
    (job, owner) = page.jobs[0]
    assert isinstance(job, Comparison) and (job.prompt, owner) == (PROMPT, "ann")
    recording = closed[tab.download]["path"]
    assert Run.load(recording).settings["prompt"] == PROMPT
    assert tab._close(ANN).keys() == {tab.query}, "taken once"
    replayed = shown(tab._replay(None, recording))
    assert replayed[tab.status].startswith("Recording: ") and replayed[tab.panes[1]] == "a" * 20 + "!"


def test_a_comparison_that_is_refused_or_fails_says_so():
    page = Page(*script()[:12], UserError("no <b>room</b>"))
    tab = page.compare
    for handler in (tab._open(*page.form(temperature=99)), tab._generate(*page.form(temperature=99), ANN)):
        seen, notice = said(handler)
        assert seen[tab.status].startswith("Not started: ") and "99" in notice
    assert page.jobs == []
    seen, notice = said(tab._generate(*page.form(), ANN))
    assert seen[tab.status] == "Ended early: no <b>room</b>" and notice == "no &lt;b&gt;room&lt;/b&gt;"
    seen, notice = said(tab._replay("../etc/passwd", None))
    assert seen[tab.status].startswith("Not replayed: ") and "choose a recorded run" in notice


def test_a_comparison_that_is_stopped_keeps_its_text():
    page = Page(*script()[:30], *(Finished(contestant=name, reason="stopped") for name in NAMES))
    streamed = shown(page.compare._generate(*page.form(), ANN))
    assert streamed[page.compare.panes[0]].startswith("aaa")
    assert shown([page.compare._close(ANN)])[page.compare.status] == "Stopped."
    page.compare._stop(ANN)
    page.outliers._stop(ANN)
    assert page.stopped == ["ann", "ann"]


SCORES = {"perplexity": 9.0, "kl_to_fp16": 0.1, "top1_agreement": 0.9, "largest_logit_change": 0.5}
SPEEDS = {"tokens_per_second": 5.0, "tokens_per_second_min": 4.0, "tokens_per_second_max": 6.0, "outlier_share": 0.01}
ROWS = {
    "ablation": [{"name": "W8A8", "method": "absmax", **SCORES}],
    "silencing": SILENCED,
    "amplifying": [{"factor": 4.0, "method": "fp16", "channels": [3], **SCORES}],
    "thresholds": [{"threshold": "6", "method": "llm-int8", **SCORES, **SPEEDS}],
}


def outcome(kind: str) -> RowAnswer:
    return RowAnswer(
        lab_classes()[kind],
        {"kind": kind, "model": "demo", "text": "x", "tokens": 3, "stopped": False, "results": ROWS[kind]},
        True,
    )


@dataclass
class Case:
    """A handler: its call, what its job finds, where it speaks, its words in the end, after a stop and for an error."""

    call: Callable[[Page], Iterator[dict]]
    found: object
    status: Callable[[Page], object]
    good: str
    stopped: str
    failed: str
    shows: Callable[[Page, dict], bool]


def experiment(kind: str, *inputs) -> Case:
    def section(page: Page):
        return next(part for part in page.outliers.what_if.sections if part.lab.kind == kind)

    def ask(page: Page) -> Iterator[dict]:
        return page.outliers.what_if.handler(section(page))("demo", PROMPT, [], ANN, *inputs)

    def shows(page: Page, seen: dict) -> bool:
        drawn = "data" in seen[section(page).figure]
        return drawn == (kind != "ablation") and len(seen[section(page).rows]) == len(ROWS[kind])

    return Case(
        ask, outcome(kind), lambda page: section(page).status, "Measured on 3 tokens",
        "Stopped before anything was measured.", "Not run", shows,
    )  # fmt: skip


CASES = {
    "watch": Case(
        lambda page: page.outliers._watch(PROMPT, "demo", "bnb-int8", 6.0, 2, ANN), ReportAnswer(report(), 6.0),
        lambda page: page.outliers.status, "2 generated tokens watched in 3 linear layers",
        "Stopped before anything ran.", "Not run",
        lambda page, seen: page.state.kept(seen[page.outliers.report_key]).generated_tokens == 2,
    ),
    "read": Case(
        lambda page: page.outliers.agreement._read(PROMPT, "", "prompt", "demo", "bnb-int8", 6.0, 8, ANN), read(),
        lambda page: page.outliers.agreement.status, "of 3 tokens have another first choice",
        "Stopped before both had read the text.", "Not read",
        lambda page, seen: len(seen[page.outliers.agreement.reading]["tokens"]) == 3,
    ),
    "explain": Case(
        Page.explain, cause(),
        lambda page: page.outliers.agreement.cause_status, "With only model.layers.0.a in 16 bit",
        "Stopped before anything was found.", "Not explained",
        lambda page, seen: bool(seen[page.outliers.agreement.layers]["data"]),
    ),
    "ablation": experiment("ablation"),
    "silencing": experiment("silencing", 1),
    "amplifying": experiment("amplifying", 4, "3"),
    "thresholds": experiment("thresholds", "llm-int8"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_job_that_ends_well_is_shown(name):
    case, page = CASES[name], Page(*WORKING, CASES[name].found)
    updates = list(case.call(page))
    lines = [update[case.status(page)] for update in updates if case.status(page) in update]
    assert {"text": "Reading the text", "fraction": 0.5} in lines
    seen = shown(updates)
    assert case.good in seen[case.status(page)] and case.shows(page, seen)
    assert [owner for _, owner in page.jobs] == ["ann"]


@pytest.mark.parametrize("name", CASES)
def test_a_job_that_fails_says_why_where_it_speaks_and_in_a_notice(name):
    case, page = CASES[name], Page(*WORKING, UserError("no <b>room</b>"))
    seen, notice = said(case.call(page))
    assert seen[case.status(page)] == f"{case.failed}: no <b>room</b>" and notice == "no &lt;b&gt;room&lt;/b&gt;"


@pytest.mark.parametrize("name", CASES)
def test_a_job_stopped_before_it_found_anything_says_so(name):
    case, page = CASES[name], Page(*WORKING)
    assert shown(case.call(page))[case.status(page)] == case.stopped


@pytest.mark.parametrize("panel", ["map", "moments", "figures"])
def test_a_panel_draws_the_kept_report_and_nothing_for_a_forgotten_one(panel):
    page = Page(ReportAnswer(report(), 6.0))
    key = shown(page.outliers._watch(PROMPT, "demo", "bnb-int8", 6.0, 2, ANN))[page.outliers.report_key]
    part = getattr(page.outliers, panel)
    inputs = {"map": ("down", "prefill", 1), "moments": ("down", 1), "figures": ()}[panel]
    drawn = shown([part.draw(key, 6.0, *inputs)])
    figures = [value for value in drawn.values() if isinstance(value, dict) and "layout" in value]
    assert drawn.keys() == set(part.outputs) and len(figures) == {"map": 2, "moments": 1, "figures": 2}[panel]
    assert all(value == gr.skip() for value in part.draw("run-99", 6.0, *inputs).values())
