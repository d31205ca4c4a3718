"""What the Lab tab's handlers answer, called as the page calls them; the machine is real, the model tiny."""

from __future__ import annotations

from types import SimpleNamespace

import gradio as gr
import pytest
from tiny_runs import light

from llmq.labs import save_answer
from llmq.labs.decoding import Decoding
from llmq.labs.race import Race
from llmq.labs.rounding import EXAMPLE
from llmq.labs.rows import RowAnswer
from llmq.labs.server import ServerLab
from llmq.machine.door import Machine
from llmq.methods import METHODS
from llmq.ui.parts.how import explained_methods
from llmq.ui.shell.state import AppState
from llmq.ui.tabs.lab_tab import LabTab
from llmq.ui.tabs.rounding_panel import GONE, OWN

ANN = SimpleNamespace(session_hash="ann", client=None)
ADVICE = "write numbers such as 0.5 -1.2 with spaces between them"
ROW = {
    "method": "absmax", "engine": "hf", "perplexity_change": 0.5, "perplexity_change_interval": [0.4, 0.6],
    "kl_to_fp16": 0.3, "bytes": 1000, "emulated": True, "tokens_per_second": None, "calibration_seconds": 0.0,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture
def lab(tiny_folder) -> LabTab:
    machine = Machine()
    state = AppState(
        run=lambda question, owner: machine.run(question), stop=lambda owner: 0, device="cpu", device_label="",
        model=str(tiny_folder),
    )  # fmt: skip
    with gr.Blocks():
        tab = LabTab(state)
        tab.build()
    yield tab
    state.close()


def settings(lab: LabTab, source: str, *, layer="1.down_proj", numbers=EXAMPLE, method="absmax", outlier=0) -> tuple:
    return (source, numbers, lab.state.model, layer, "Hello", method, 4, 128, outlier)


def test_a_tensor_is_taken_once_and_drawn_without_the_machine(lab, monkeypatch):
    panel = lab.rounding
    *_, taken, _, drawn = panel._take(*settings(lab, "weight"), ANN)
    key = taken[panel.taken]
    assert "1.down_proj, weight" in drawn[panel.finding] and drawn[panel.table].value["data"]
    monkeypatch.setattr(lab.state, "run", None)
    first, whole = panel._draw(key, *settings(lab, "weight", method="vectorwise", outlier=20))
    assert panel.table not in first and first[panel.status] == "Measuring the other methods"
    assert (
        len(whole[panel.table].value["data"]) == 12
        and whole[panel.status] == ""
        and lab.state.kept(whole[panel.keeping.key])
    )
    assert "outlier of 20 times" in whole[panel.finding] and METHODS["vectorwise"].label in whole[panel.finding]
    assert whole[panel.histogram]["data"] and whole[panel.errors]["data"] and "<pre>scale" in whole[panel.sums]


def test_what_cannot_be_drawn_is_said_in_the_status(lab):
    panel = lab.rounding
    for key, source, numbers, told in (
        ("run-99", "weight", EXAMPLE, GONE),
        (None, "input", EXAMPLE, "Choose a layer and take its tensor."),
        (
            None,
            OWN,
            "1 <b>",
            "Not rounded: '<b>' is no number; write numbers such as 0.5 -1.2 with spaces between them",
        ),
    ):
        (only,) = panel._draw(key, *settings(lab, source, numbers=numbers))
        assert only == {panel.status: told}
    with pytest.raises(gr.Error, match="unknown layer"):
        list(panel._take(*settings(lab, "weight", layer="9.cow"), ANN))


def test_the_fields_follow_what_is_rounded(lab):
    panel = lab.rounding
    own, weight = (panel._sourced(source, lab.state.model) for source in (OWN, "weight"))
    assert (own[panel.numbers].visible, own[panel.layer].visible, weight[panel.layer].visible) == (True, False, True)
    assert weight[panel.layer].value == "1.down_proj" and len(weight[panel.layer].choices) == 14
    assert not weight[panel.prompt].visible and panel._sourced("input", lab.state.model)[panel.prompt].visible
    assert panel._layers("no-such-model").value is None


def test_a_saved_answer_opens_without_its_tensor(lab, tmp_path):
    panel = lab.rounding
    *_, whole = panel._draw(None, *settings(lab, OWN))
    save_answer(lab.state.kept(whole[panel.keeping.key]), tmp_path / "a.json")
    again = panel._open(str(tmp_path / "a.json"))
    assert again[panel.finding] == whole[panel.finding] and again[panel.table].value == whole[panel.table].value
    (tmp_path / "b.json").write_text("{}")
    assert panel._open(str(tmp_path / "b.json"))[panel.status].startswith("Not opened: b.json")


def test_the_race_begins_with_a_recording_and_keeps_what_was_measured(lab, tmp_path):
    part = lab.parts["Race"]
    section = part.panel.section(Race)
    assert part.recorded(Race, []) == {section.status: gr.skip()}
    result = {"kind": "race", "model": "demo", "device": "cpu", "text": "x", "tokens": 3, "stopped": False}
    save_answer(
        RowAnswer(Race, result | {"missing": {"nf4": "it is too narrow"}, "results": [ROW]}), tmp_path / "r.json"
    )
    lab.state.recorded_answers = {"race": tmp_path / "r.json"}
    shown = part.recorded(Race, [])
    told = "A recording, SmolLM2-135M (demo). Measured on 3 tokens of x. nf4: not measured: it is too narrow."
    assert shown[section.status] == told and shown[section.figure]["data"]
    assert shown[section.table].value["data"][0][0] == METHODS["absmax"].label
    assert part.recorded(Race, [ROW]) == {section.status: gr.skip()}


def test_every_lab_with_a_part_is_asked_with_its_own_model_and_prompt(lab):
    prompts = {name: part.prompt for name, part in lab.parts.items()}
    assert [(name, prompt.placeholder) for name, prompt in prompts.items() if prompt.visible] == [
        ("Decoding", Decoding.example),
        ("Race", Race.example),
        ("Server", ServerLab.example),
    ]
    section = lab.parts["Decoding"].panel.section(Decoding)
    defaults = [component.value for _, component in section.controls]
    ask = lab.parts["Decoding"].panel.handler(section)
    *_, shown, last = ask(lab.state.model, "Hi", [], ANN, *defaults[:1], 2, *defaults[2:])
    assert len(shown[section.rows]) == 10 and last[section.status] == "Measured on 20 tokens of what follows “Hi”."
    assert shown[section.texts].visible and shown[section.texts].value.count("<i>") == 10
    assert shown[section.figure]["data"] and not shown[section.takeaway].visible


def test_methods_are_explained_by_what_was_chosen():
    shown = explained_methods(["bnb-int8@0", "none", None, "gptq@bits=3"])
    assert shown.count("**What.**") == 2 and "`bnb-int8`" in shown and "OBS" in shown
