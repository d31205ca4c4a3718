"""The tabs' handlers without a browser or a server: plain generators over scripted streams, their last word checked."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from browser_support import ROOT
from page_form import filled
from test_compare_view import NAMES, script
from test_observatory_views import SILENCED, cause, read, report

from llmq import files
from llmq.errors import Ended, UserError
from llmq.events import Finished, Loading, Progress, Run
from llmq.fields import fields_of
from llmq.labs import lab_classes
from llmq.labs.compare import Comparison
from llmq.labs.outliers import ReportAnswer
from llmq.labs.rows import RowAnswer
from llmq.machine.thread import Stuck
from llmq.ui.parts.controls import linked, value_of
from llmq.ui.shell import state as shell_state
from llmq.ui.shell.state import AppState
from llmq.ui.tabs.compare_tab import UNSAVED, CompareTab
from llmq.ui.tabs.lab_tab import LabTab
from llmq.ui.tabs.outliers_tab import OutliersTab
from llmq.ui.tabs.silencing_card import recorded_value

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
        return tuple(filled(PROMPT, model, NAMES, temperature=temperature))

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
    *_, last = tab._generate(*page.form(), ANN)
    assert last["texts"] == ["a" * 20 + "!"] * 2 and (last["status"], last["state"]) == ("Finished.", "done")
    assert last["asked"]["prompt"] == PROMPT and last["pieces"]
    (job, owner) = page.jobs[0]
    assert isinstance(job, Comparison) and (job.prompt, owner) == (PROMPT, "ann")
    recording = tab._keep(ANN).value["path"]
    assert Run.load(recording).settings["prompt"] == PROMPT
    assert tab._keep(ANN) == gr.skip(), "taken once"


def test_a_recording_fills_the_form_with_what_it_answers(tmp_path):
    page = Page(*script())
    tab = page.compare
    list(tab._generate(*page.form(), ANN))
    run = Run.load(tab._keep(ANN).value["path"])
    run.settings["contestants"] = ["fp16", "bnb-int8@3"]
    for timed in run.events:
        if getattr(timed.event, "contestant", "") == "bnb-int8":
            object.__setattr__(timed.event, "contestant", "bnb-int8@3")
    shown = tab._replay_upload(str(run.save(tmp_path / "run.jsonl")))
    assert shown[tab.result]["frames"] and "example" not in shown[tab.result]
    assert not shown[tab.download].interactive, "what could be downloaded is not what is shown"
    assert [shown[part] for part in (tab.prompt, tab.model, *tab.methods, tab.threshold)] == [
        PROMPT, "demo", "fp16", "bnb-int8", "none", 3.0,
    ]  # fmt: skip
    assert shown[tab.max_new_tokens] == 8
    assert tab._filled({"max_new_tokens": 4096}) == {tab.max_new_tokens: 1024}, "as much as the form can hold"


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_the_download_and_not_the_result(monkeypatch, caplog):
    page = Page(*script())
    monkeypatch.setattr(files, "_replace", full_disk)
    *_, whole, last = page.compare._generate(*page.form(), ANN)
    assert last == whole | {"status": f"Finished. {UNSAVED}"} and last["headline"] and last["pieces"]
    assert "/" not in UNSAVED and page.compare._keep(ANN) == gr.skip()
    key = page.state.keep(ReportAnswer(report(), threshold=6.0))
    with pytest.raises(gr.Error, match="could not save it") as raised:
        page.outliers.keeping._write(key)
    assert "/" not in raised.value.message
    assert [record.exc_info for record in caplog.records] == [None, None], "a line each"


def test_a_comparison_that_is_refused_or_fails_says_so():
    page = Page(*script()[:12], UserError("no <b>room</b>"))
    tab = page.compare
    (refused,) = tab._generate(*page.form(temperature=99), ANN)
    assert refused["notice"].startswith("Not started: ") and "99" in refused["notice"]
    assert page.jobs == [] and tab._keep(ANN) == gr.skip()
    *_, last = tab._generate(*page.form(), ANN)
    assert last["status"] == "Ended early: no <b>room</b>"


@pytest.mark.parametrize("content", [b"no json", b"\xff\xfe", b"{}"])
def test_a_wrong_upload_is_refused_without_a_place_on_the_server(tmp_path, content):
    path = tmp_path / "gradio" / "junk.jsonl"
    path.parent.mkdir()
    path.write_bytes(content)
    tab = Page().compare
    notice = tab._replay_upload(str(path))[tab.result]["notice"]
    assert notice.startswith("Not replayed: junk.jsonl") and str(tmp_path) not in notice
    assert "choose a recorded run" in tab._replay("../etc/passwd")[tab.result]["notice"]


def test_no_refusal_is_the_value_before_it():
    """A browser is told of a value that differs: the same words twice would leave its form folded."""
    page = Page()
    for part, refused in (
        (page.compare.result, lambda: {page.compare.result: next(page.compare._generate(*page.form("none"), ANN))}),
        (page.compare.result, lambda: page.compare._replay("none")),
        (page.outliers.status, lambda: next(page.outliers._watch("p", "demo", "mystery", 6.0, 2, ANN))),
        (page.outliers.status, lambda: page.outliers._open(__file__)),
    ):
        first, second = refused()[part], refused()[part]
        assert first != second and {name for name in first if first[name] != second[name]} <= {"run", "number"}


@pytest.mark.parametrize(
    "settings", [{"sampling": [1]}, {"sampling": {"temperature": "hot"}}, {"sampling": {"temperature": [1]}}]
)
def test_a_recording_with_values_that_no_run_has_is_refused(tmp_path, settings):
    run = Run({"contestants": ["fp16"], "prompt": "p", "model": "demo"} | settings, {})
    tab = Page().compare
    assert tab._replay_upload(str(run.save(tmp_path / "run.jsonl")))[tab.result]["notice"].startswith("Not replayed: ")


def test_a_recording_that_would_take_minutes_to_prepare_is_refused(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("{}\n" * 60_000)
    tab = Page().compare
    assert "60,001 lines" in tab._replay_upload(str(path))[tab.result]["notice"]


def test_a_comparison_that_is_stopped_keeps_its_text():
    page = Page(*script()[:30], *(Finished(contestant=name, reason="stopped") for name in NAMES))
    *_, last = page.compare._generate(*page.form(), ANN)
    assert last["texts"][0].startswith("aaa") and last["status"] == "Stopped."
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
        {"kind": kind, "model": "demo", "device": "cpu", "text": "x", "tokens": 3, "stopped": False,
         "results": ROWS[kind]},
        True,
    )  # fmt: skip


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


def words(value) -> str:
    """Everything that a line says."""
    return value if isinstance(value, str) else " ".join(str(value.get(name, "")) for name in ("text", "note", "doing"))


def progress(value) -> tuple | None:
    """What a line says is going on, and how far it is."""
    return None if isinstance(value, str) else (value.get("doing", value.get("text")), value.get("fraction"))


def experiment(kind: str, *inputs) -> Case:
    def section(page: Page):
        return next(part for part in page.outliers.what_if.sections if part.lab.kind == kind)

    def ask(page: Page) -> Iterator[dict]:
        return page.outliers.what_if.handler(section(page))("demo", PROMPT, [], ANN, "english", *inputs)

    def shows(page: Page, seen: dict) -> bool:
        drawn = "data" in seen[section(page).figure]
        return drawn == (kind != "ablation") and len(seen[section(page).rows]) == len(ROWS[kind])

    return Case(
        ask, outcome(kind), lambda page: section(page).status, "Measured on 3 tokens",
        "Stopped before anything was measured.", "Not run", shows,
    )  # fmt: skip


ASKED = ["fp16", "llm-int8", "vectorwise", "absmax"]
CASES = {
    "watch": Case(
        lambda page: page.outliers._watch(PROMPT, "demo", "bnb-int8", 6.0, 2, ANN), ReportAnswer(report(), 6.0),
        lambda page: page.outliers.status, "2 generated tokens watched in 3 linear layers",
        "Stopped before anything ran.", "Not run",
        lambda page, seen: page.state.kept(seen[page.outliers.keeping.key]).report.generated_tokens == 2,
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
    "card": Case(
        lambda page: page.outliers.card.silence("demo", PROMPT, ANN), outcome("silencing"),
        lambda page: page.outliers.map.card, "Measured on 3 tokens", "Stopped before anything was measured.", "Not run",
        lambda page, seen: seen[section_of(page, "silencing").finding],
    ),
    "ablation": experiment("ablation"),
    "silencing": experiment("silencing", 1),
    "amplifying": experiment("amplifying", 4, "3", ASKED),
    "thresholds": experiment("thresholds", "llm-int8"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_job_that_ends_well_is_shown(name):
    case, page = CASES[name], Page(*WORKING, CASES[name].found)
    updates = list(case.call(page))
    lines = [update[case.status(page)] for update in updates if case.status(page) in update]
    assert ("Reading the text", 0.5) in [progress(line) for line in lines]
    seen = shown(updates)
    assert case.good in words(seen[case.status(page)]) and case.shows(page, seen)
    assert [owner for _, owner in page.jobs] == ["ann"]


@pytest.mark.parametrize("name", CASES)
def test_a_job_that_fails_says_why_where_it_speaks_and_in_a_notice(name):
    case, page = CASES[name], Page(*WORKING, UserError("no <b>room</b>"))
    seen, notice = said(case.call(page))
    assert (
        words(seen[case.status(page)]).strip() == f"{case.failed}: no <b>room</b>"
        and notice == "no &lt;b&gt;room&lt;/b&gt;"
    )


@pytest.mark.parametrize("name", CASES)
def test_a_job_stopped_before_it_found_anything_says_so(name):
    case, page = CASES[name], Page(*WORKING)
    assert words(shown(case.call(page))[case.status(page)]).strip() == case.stopped


@pytest.mark.parametrize("kind", [Ended, Stuck])
@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_what_was_found_stays_where_a_job_is_ended_early_and_its_line_says_why(name, found, kind):
    case = CASES[name]
    page = Page(*WORKING, *([case.found] if found else []), kind("its <2> minutes were over"))
    seen = shown(case.call(page))
    told = words(seen[case.status(page)])
    whole = found and name == "read"  # there is no half of it
    assert whole or "Ended early: its <2> minutes were over." in told
    assert not found or (case.good in told and case.shows(page, seen))


@pytest.mark.parametrize("panel", ["map", "moments", "figures"])
def test_a_panel_draws_the_kept_report_and_nothing_for_a_forgotten_one(panel):
    page = Page(ReportAnswer(report(), 6.0))
    key = shown(page.outliers._watch(PROMPT, "demo", "bnb-int8", 6.0, 2, ANN))[page.outliers.keeping.key]
    part = getattr(page.outliers, panel)
    inputs = {"map": ("down", "prefill", 1), "moments": ("down", 1), "figures": ()}[panel]
    drawn = shown([part.draw(key, 6.0, *inputs)])
    figures = [value for value in drawn.values() if isinstance(value, dict) and "layout" in value]
    assert drawn.keys() == set(part.outputs) and len(figures) == {"map": 2, "moments": 1, "figures": 2}[panel]
    assert all(value == gr.skip() for value in part.draw("run-99", 6.0, *inputs).values())


def section_of(page: Page, kind: str):
    return page.outliers.what_if.section(lab_classes()[kind])


def saved(page: Page, keeping, seen: dict) -> str:
    """The file of the answer that a part shows."""
    return keeping._write(seen[keeping.key]).value["path"]


def test_a_watched_run_says_what_came_out_and_opens_again_without_a_model(tmp_path):
    page = Page(ReportAnswer(report(), 6.0, PROMPT))
    tab = page.outliers
    first = next(tab._watch(PROMPT, "demo", "bnb-int8", 6.0, 2, ANN))[tab.status]
    assert (first["state"], first["asked"]["prompt"]) == ("running", PROMPT)
    seen = shown(tab._watch(PROMPT, "demo", "bnb-int8", 6.0, 2, ANN))
    told = seen[tab.status]
    assert told["state"] == "done" and told["text"].endswith(
        "int8 · bitsandbytes keeps 6 of 48 columns (12%) in 16 bit, the orange ones."
    )
    assert told["asked"] == {
        "prompt": PROMPT,
        "settings": "SmolLM2-135M (demo) · int8 · bitsandbytes · threshold 6",
    }
    page.items = ()
    opened = shown([tab._open(saved(page, tab.keeping, seen))])
    assert opened[tab.status] == told | {"state": "opened", "banner": "A saved run"}
    assert [opened[part] for part in (tab.prompt, tab.model, tab.method, tab.threshold)] == [
        PROMPT, "demo", "bnb-int8", 6.0,
    ]  # fmt: skip
    assert tab.map.draw(opened[tab.keeping.key], 6.0, "down", "prefill", 1)[tab.map.map]["data"]


def test_another_threshold_says_something_else_and_runs_nothing():
    page = Page(ReportAnswer(report(), 6.0))
    key = shown(page.outliers._watch(PROMPT, "demo", "bnb-int8", 6.0, 2, ANN))[page.outliers.keeping.key]
    page.jobs.clear()
    assert "keeps 0 of 48 columns" in page.outliers._judge(key, 11.0)[page.outliers.status]["text"]
    assert page.outliers._judge("run-99", 11.0)[page.outliers.status] == gr.skip() and page.jobs == []


def test_what_both_read_opens_again_with_the_cause_of_a_token():
    page = Page(*WORKING, read())
    part = page.outliers.agreement
    seen = shown(part._read(PROMPT, "", "prompt", "demo", "bnb-int8", 6.0, 8, ANN))
    again = shown([part._open(saved(page, part.keeping, seen))])
    assert again[part.reading] == seen[part.reading] and again[part.status] == seen[part.status]
    page.items = (cause(),)
    explained = shown(part._explain(seen[part.key], True, SimpleNamespace(position=2), ANN))
    again = shown([part._open(saved(page, part.keeping, explained))])
    assert again[part.cause_status] == explained[part.cause_status] and again[part.layers]["data"]
    assert again[part.reading] == seen[part.reading]


@pytest.mark.parametrize("kind", ROWS)
def test_a_labs_answer_opens_again_and_other_files_are_refused_by_name(kind, tmp_path):
    page = Page(*WORKING, outcome(kind))
    section = section_of(page, kind)
    inputs = {"ablation": (), "silencing": (1,), "amplifying": (4, "3", ASKED), "thresholds": ("llm-int8",)}[kind]
    seen = shown(page.outliers.what_if.handler(section)("demo", PROMPT, [], ANN, "english", *inputs))
    path = saved(page, section.keeping, seen)
    again = shown([page.outliers.what_if.opener(section)(path)])
    for part in (section.finding, section.table, section.rows, section.figure):
        assert again[part] == seen[part]
    assert again[section.status].startswith("A saved answer, SmolLM2-135M (demo). Measured on 3 tokens")
    refused = page.outliers.agreement._open(path)[page.outliers.agreement.status]
    name = path.rsplit("/", 1)[1]
    assert refused.startswith(f"Not opened: {name} holds an answer of the kind '{kind}'")


@pytest.mark.parametrize("content", [b"no json", b"\xff\xfe", b"{}", b'{"kind": "silencing"}', b'{"kind": "outliers"}'])
def test_a_wrong_answer_is_refused_without_a_place_on_the_server(tmp_path, content):
    path = tmp_path / "gradio" / "junk.json"
    path.parent.mkdir()
    path.write_bytes(content)
    page = Page()
    for part, said in (
        (page.outliers.status, page.outliers._open(str(path))),
        (page.outliers.agreement.status, page.outliers.agreement._open(str(path))),
        (section_of(page, "silencing").status, page.outliers.what_if.opener(section_of(page, "silencing"))(str(path))),
    ):
        told = words(said[part])
        assert told.startswith("Not opened: ") and "junk.json" in told and str(tmp_path) not in told


def test_files_of_visitors_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(shell_state, "MOST_FILE_BYTES", 10)
    state = Page().state
    paths = []
    for number in range(3):
        paths.append(state.download_path(f"{number}.json"))
        paths[-1].write_text("12345")
        os.utime(paths[-1], (number, number))
    upload = state.folder / "hash" / "x.jsonl"
    upload.parent.mkdir()
    upload.write_text("12345")
    state.prune()
    assert [path.exists() for path in (*paths, upload)] == [False, False, True, True]


def test_a_file_that_goes_while_files_are_counted_costs_nobody_a_result(monkeypatch):
    state = AppState(run=lambda job, owner: iter(()), stop=lambda owner: 0, device="cpu", device_label="CPU")
    (state.folder / "theirs").write_bytes(b"x")
    whole = Path.is_file

    def goes(path: Path) -> bool:
        found = whole(path)
        path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", goes)
    assert state.download_path("mine").parent == state.folder and not (state.folder / "theirs").exists()
    state.close()


def test_what_is_no_longer_kept_is_not_saved():
    page = Page()
    with pytest.raises(gr.Error, match="no longer kept"):
        page.outliers.keeping._write("run-99")


def test_the_card_silences_one_channel_through_the_labs_own_section():
    page = Page(*WORKING, outcome("silencing"))
    section, card = section_of(page, "silencing"), page.outliers.map.card
    seen = shown(page.outliers.card.silence("demo", PROMPT, ANN))
    assert page.jobs[0][0].counts == (1,) and page.jobs[0][0].prompt == PROMPT
    told = seen[card]
    assert not told["running"] and told["doing"].startswith("Measured on 3 tokens")
    assert len(seen[section.rows]) == len(SILENCED) and seen[section.finding]
    updates = list(page.outliers.card.silence("demo", PROMPT, ANN))
    answers = [update[card] for update in updates if "change" in update[card]]
    assert answers[-1]["change"] == ["10", "beyond measure"] and answers[-1]["texts"][1][0] == "Without channel 5"
    assert {"running": True, "doing": "Reading the text", "fraction": 0.5} in [update[card] for update in updates]


@pytest.mark.parametrize(("event", "layer"), [
    ({"type": "heatmap", "x": 3, "y": "12"}, 12), ({"type": "heatmap", "x": 3, "y": "head"}, gr.skip()),
    ({"type": "scatter", "x": 3, "y": 4}, gr.skip()),
])  # fmt: skip
def test_a_click_on_the_map_names_a_layer(event, layer):
    assert Page().outliers.map.layer_of(SimpleNamespace(**event)) == layer


@pytest.mark.parametrize(("event", "moment"), [
    ({"type": "bar", "x": 3, "y": 9}, 3), ({"type": "bar", "x": "a", "y": 9}, gr.skip()),
    ({"type": "scatter", "x": 3, "y": "4"}, gr.skip()),
])  # fmt: skip
def test_a_click_on_a_bar_names_a_moment(event, moment):
    assert Page().outliers.moments.moment_of(SimpleNamespace(**event)) == moment


def test_a_link_opens_the_outliers_as_they_were():
    tab = Page().outliers
    request = SimpleNamespace(query_params={"method": "llm-int8@3", "threshold": "4.5", "kind": "o"})
    wished = {tab.method: "llm-int8@3", tab.threshold: 4.5, tab.map.kind: "o", tab.parts: gr.skip()}
    assert tab.from_link(request) == wished
    assert tab.from_link(SimpleNamespace(query_params={"part": "what-if"}))[tab.parts].selected == "what-if"
    wrong = SimpleNamespace(query_params={"method": "int9", "threshold": "99", "kind": "x", "part": "nowhere"})
    assert all(value == gr.skip() for value in tab.from_link(wrong).values())


def test_until_somebody_measures_the_card_shows_a_recording_where_there_is_one():
    page = Page()
    assert "change" not in recorded_value(page.state)
    page.state.recorded_answers = {"silencing": ROOT / "assets" / "lesson" / "silencing.json"}
    value = recorded_value(page.state)
    assert value["change"] == ["35.84", "8,716"] and value["recorded"].startswith("Recording: SmolLM2-135M (demo), ")
    assert value["texts"][0][1].startswith("Planning a 3-day itinerary") and not value["running"]


@pytest.mark.parametrize("lab", lab_classes().values(), ids=lambda lab: lab.kind)
def test_a_link_fills_a_control_with_what_it_would_give(lab):
    for field in fields_of(lab):
        if field.kind.label and field.default not in (MISSING, None, (), ""):
            shown = linked(field, field.kind.spell(field.default))
            one_of_them = field.default[:1] if isinstance(shown, int | float) and type(field.default) is tuple else None
            assert value_of(field, shown) == (one_of_them or field.default), field.named


def test_a_link_to_a_lab_sets_what_is_possible_and_nothing_else():
    tab = LabTab(Page().state)
    with gr.Blocks():
        tab.build()
    asked = {"view": "lab", "part": "race", "contestants": "fp8,nf4", "tokens": "1024", "nonsense": "1"}
    section = tab.parts["Race"].panel.sections[0]
    by_name = {field.name: component for field, component in section.controls}
    request = SimpleNamespace(query_params=asked)
    wished = tab.from_link(request)
    assert wished[by_name["contestants"]] == ["fp8", "nf4"] and wished[by_name["tokens"]] == 1024
    request.query_params = asked | {"contestants": "nonsense", "tokens": "1e400"}
    assert not {by_name["contestants"], by_name["tokens"]} & set(tab.from_link(request))
    request.query_params = asked | {"view": "compare"}
    assert not {by_name["contestants"], by_name["tokens"]} & set(tab.from_link(request))
