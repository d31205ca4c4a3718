"""Should I quantize? The recommendation from figures made for it, the forecast's own bytes, and nothing made up."""

from __future__ import annotations

import json
from types import SimpleNamespace

import gradio as gr
import pytest
from tiny_runs import light

from llmq.cards import HERE
from llmq.contestant import Contestant
from llmq.face import Finding, load
from llmq.figures.blocks import Table
from llmq.labs.advice import METHODS, NOT_MEASURED, Advice, Place, advise, stored_results
from llmq.memory import forecast
from llmq.models.opening import describe_model
from llmq.ui.parts.advice_card import advice_card
from llmq.ui.shell.access import ANYBODY
from llmq.ui.shell.link import fit_wishes_of
from llmq.ui.tabs.fit_tab import FitTab, answers

DEMO, LLAMA = "demo", "llama-3.1-8b-instruct"
H100, EPYC = "NVIDIA H100 80GB HBM3", "AMD EPYC, 2 cores"
SMALL = Place("a small card", 320e6, "H100")  # int8 fits, FP16 does not
LARGE = Place("a large card", 80e9, "H100")
NAMES = ("fp16", "llm-int8", "int8-weight-only")


def decode(speeds: dict, *, device: str = H100, model: str = DEMO, batch: int = 1, date: str = "2026-11-01") -> dict:
    conditions = {"device_name": device, "date": date, "prompt_tokens": 64, "batch": batch, "random_weights": False}
    rows = [{"method": name, "engine": "lean", "tokens_per_second": speed} for name, speed in speeds.items()]
    return {"kind": "decode", "model": model, "conditions": conditions, "results": rows}


def quality(changes: dict, *, model: str = DEMO, windows: int = 64) -> dict:
    """Methods with (change of perplexity, KL); the interval reaches 0.1 % to each side."""
    conditions = {"device_name": H100, "date": "2026-11-02", "windows": windows}
    rows = [
        {"method": name, "perplexity_change": change, "kl_to_fp16": kl,
         "perplexity_change_interval": [change - 0.001, change + 0.001]}
        for name, (change, kl) in changes.items()
    ]  # fmt: skip
    return {"kind": "quality", "model": model, "text": "prose", "conditions": conditions, "results": rows}


FAST = decode({"fp16": 100.0, "llm-int8": 150.0, "int8-weight-only": 148.0})
NEAR = quality({"fp16": (0.0, 0.0), "llm-int8": (0.014, 0.018), "int8-weight-only": (0.0, 0.003)})


def advised(place: Place, *results: dict, model: str = DEMO, **asked) -> Advice:
    methods = Contestant.parse_all(METHODS)
    return advise(describe_model(model), methods, place, results, **{"tokens": 2048} | asked)


def said(advice: Advice) -> str:
    return advice.result["recommendation"]["sentence"].replace("**", "")


def table_of(advice: Advice) -> Table:
    return next(block for block in advice.blocks() if isinstance(block, Table))


def rows_of(advice: Advice) -> dict[str, dict]:
    return {row["method"]: row for row in advice.result["results"]}


def test_bytes_are_the_forecasts_and_what_is_saved_is_their_difference():
    model = describe_model(DEMO)
    wanted = forecast(model, Contestant.parse_all(METHODS), tokens=2048, batch=2, device_bytes=SMALL.bytes)
    rows = rows_of(advised(SMALL, batch=2))
    for row in wanted["results"]:
        assert {name: rows[row["method"]][name] for name in row} == row
    assert rows["llm-int8"]["saved"] == rows["fp16"]["total"] - rows["llm-int8"]["total"] > 0
    assert rows["fp16"]["saved"] is None


def test_at_batch_1_weights_only_is_as_fast_as_llm_int8_and_several_times_nearer():
    advice = advised(SMALL, FAST, NEAR)
    assert advice.result["recommendation"]["method"] == "int8-weight-only"
    assert said(advice) == (
        "Yes, with int8 weights only: FP16 needs 367 MB and 304 MB may be used on a small card; it needs 261 MB, "
        f"writes 1.48 times as fast as FP16 ({H100}), and its perplexity changes by +0.0 % (-0.1 to +0.1); at batch 1 "
        "it is as fast and 6 times nearer to FP16 than int8 · ours (KL 0.003 against 0.018 nats)."
    )


def test_where_fp16_fits_too_a_method_must_be_faster_there_and_sure_to_cost_little():
    assert said(advised(LARGE, FAST, NEAR)).startswith(
        "Yes, with int8 weights only: FP16 fits a large card too, but it needs 106 MB less, writes 1.48 times as fast"
    )
    costly = quality({"llm-int8": (0.014, 0.018), "int8-weight-only": (0.0095, 0.003)})  # to 1.05 % at most
    told = said(advised(LARGE, FAST, costly))
    assert told.startswith("No need: FP16 fits a large card with 75.6 GB to spare; int8 weights only is 1.48 times as ")
    assert told.endswith("fast there, and its perplexity changes by +0.9 % (+0.9 to +1.0).")
    slow = decode({"fp16": 100.0, "llm-int8": 104.0, "int8-weight-only": 90.0})
    told = said(advised(LARGE, slow, NEAR))
    assert "and no method that was measured there is faster; int8 weights only would save 106 MB" in told


def test_the_speed_of_another_device_is_shown_and_proves_nothing_here():
    elsewhere = Place("a large card", 80e9, "RTX 4090")
    advice = advised(elsewhere, FAST, NEAR)
    assert "and whether a method is faster there is not measured" in said(advice)
    table = table_of(advice)
    assert table.rows[1][5:7] == ["150 tok/s, 1.50× FP16", H100]
    own = decode({"fp16": 10.0, "llm-int8": 20.0}, device="NVIDIA GeForce RTX 4090", date="2026-10-01")
    speeds = {name: row["speed"] for name, row in rows_of(advised(elsewhere, FAST, own)).items()}
    assert speeds["llm-int8"]["over_fp16"] == 2 and speeds["llm-int8"]["here"]
    assert speeds["int8-weight-only"]["device_name"] == H100 and speeds["nf4"] is None


@pytest.mark.parametrize(
    ("named", "device", "same"),
    [
        ("L4", "NVIDIA L40S", False), ("L4", "NVIDIA L4", True), ("RTX 4090", "NVIDIA GeForce RTX 4090", True),
        ("RTX 4090", "NVIDIA GeForce RTX 3090", False), ("", H100, False), (EPYC, EPYC, True),
    ],
)  # fmt: skip
def test_a_device_is_known_by_whole_words(named, device, same):
    assert Place("x", 1e9, named).measured(decode({}, device=device)) == same


def test_nothing_is_made_up():
    """No figure without a result of the same model and batch; what is known of another one is said to be of it."""
    for results in ((), (decode({"llm-int8": 9.0}, model=LLAMA), decode({"llm-int8": 9.0}, batch=8))):
        advice = advised(SMALL, *results)
        assert all(row["speed"] is None and row["quality"] is None for row in advice.result["results"])
        table = table_of(advice)
        assert all(row[5:] == [NOT_MEASURED, "–", NOT_MEASURED] for row in table.rows[1:])
        assert "what it costs in perplexity is not measured for this model." in said(advice)
    advice = advised(Place.named("t4"), NEAR, model=LLAMA)
    assert said(advice).startswith("Yes, with int8 weights only: FP16 needs 16.8 GB and 15.3 GB may be used on a T4")
    assert "not measured for this model; on SmolLM2-135M (demo) it costs +0.0 % (-0.1 to +0.1)" in said(advice)
    assert rows_of(advice)["int8-weight-only"]["quality"] is None
    assert json.loads(json.dumps(advice.to_json()))["kind"] == "advice"


def test_what_fits_nowhere_is_said():
    assert said(advised(Place.named("4"), model=LLAMA)) == (
        "No method here fits 4 GB of memory: NF4 · bitsandbytes comes nearest, and needs 6.73 GB of the 3.80 GB that "
        "may be used."
    )
    assert "with at most 340 tokens it does" in said(advised(Place.named("0.14GB")))


def test_of_several_results_the_one_with_most_methods_and_windows_counts():
    alone = decode({"fp16": 30.0}, date="2026-12-01")
    rough = quality({"llm-int8": (0.5, 0.5)}, windows=8)
    rows = rows_of(advised(SMALL, FAST, alone, NEAR, rough))
    assert rows["fp16"]["speed"]["tokens_per_second"] == 100 and rows["llm-int8"]["quality"]["kl_to_fp16"] == 0.018
    now = decode({"fp16": 50.0, "llm-int8": 60.0}, device="whatever")
    rows = rows_of(advised(SMALL, FAST, measured=now))
    assert rows["llm-int8"]["speed"]["tokens_per_second"] == 60 and rows["llm-int8"]["speed"]["here"]
    assert rows["int8-weight-only"]["speed"]["tokens_per_second"] == 148


def test_what_ships_with_the_project_is_read():
    advice = advised(Place.named("h100"), *stored_results())
    rows = rows_of(advice)
    assert all(rows[name]["speed"]["device_name"] == H100 and rows[name]["quality"] for name in NAMES)
    assert rows["int8-weight-only"]["quality"]["kl_to_fp16"] * 3 < rows["llm-int8"]["quality"]["kl_to_fp16"]


def test_energy_is_a_line_where_it_was_measured_of_this_model_and_batch():
    def energy(device: str, date: str, *joules: float, batch: int = 1) -> dict:
        names = [f"{phase}_joules_{end}" for phase in ("prefill", "decode") for end in ("per_token", "over_fp16")]
        found = decode({"fp16": 1.0, "llm-int8": 1.0}, device=device, date=date, batch=batch)
        rows = [
            row | dict(zip(names, values, strict=True)) for row, values in zip(found["results"], joules, strict=True)
        ]
        return found | {"kind": "energy", "results": rows}

    own = energy(H100, "2026-11-03", (0.011, 1.0, 2.5, 1.0), (0.012, 1.1, 1.4, 0.56))
    newer = energy("NVIDIA L4", "2026-11-09", (9, 9, 9, 9), (9, 9, 9, 9))
    several = energy(H100, "2026-11-09", (8, 8, 8, 8), (8, 8, 8, 8), batch=8)
    told = "Energy of a token of the answer (of the prompt), batch 1: FP16 2.50 J (11.0 mJ); int8 · ours 1.40 J "
    assert f"{told}(12.0 mJ); {H100}, 2026-11-03." in advised(LARGE, own, newer, several).notes
    assert rows_of(advised(LARGE, newer, several, own))["llm-int8"]["energy"]["decode_joules_over_fp16"] == 0.56
    assert (
        "Energy" not in advised(LARGE, several, FAST, NEAR).notes and rows_of(advised(LARGE))["fp16"]["energy"] is None
    )


def test_an_answer_that_was_saved_is_shown_again_with_what_it_was_made_with(run, tmp_path):
    words = ("advise", "--model", LLAMA, "--device-memory", "t4", "--context", 4096, "--device", "cpu")
    status, told, _ = run(*words, "--save", tmp_path / "a.json")
    assert status == 0 and run("replay", tmp_path / "a.json")[1] == told
    again = load(tmp_path / "a.json")
    conditions = again.to_json()["conditions"]
    assert conditions["command"].endswith("--context 4096 --batch 1 --device-memory t4")
    assert conditions["versions"]["llmq"] and conditions["date"] and "commit" in conditions
    status, out, _ = run(*conditions["command"].split()[3:], "--json", "--device", "cpu")
    repeated = json.loads(out[-1])
    assert repeated | {"conditions": {}} == again.to_json() | {"conditions": {}}
    (tmp_path / "a.json").write_text('{"kind": "advice", "results": []}')
    status, _, err = run("replay", tmp_path / "a.json")
    assert status == 2 and "is no whole answer of the kind 'advice'" in err[0]


def test_the_figure_has_every_method_with_what_is_known_of_it():
    advice = advised(SMALL, FAST, NEAR)
    (figure,) = Finding(advice).figures()
    words = [note.text for note in figure.layout.annotations]
    assert words[0].startswith("<b>FP16</b> ✕ does not fit, 367 MB") and len(words) == 6
    assert words[2] == "<b>int8 weights only</b> ✓ 261 MB, 1.48× FP16's speed, perplexity +0.0 % (-0.1 to +0.1)"
    assert words[-1] == "304 MB may be used on a small card"
    for number, row in enumerate(advice.result["results"]):
        assert sum(bar.x[number] for bar in figure.data) * 1e9 == pytest.approx(row["total"])
    assert figure.layout.shapes[0].x0 == pytest.approx(0.304)
    alone = advice.picture()
    assert "Yes, with int8 weights only" in alone.layout.title.text and alone.layout.height > figure.layout.height
    assert "Decode: batch 1 after 64 tokens" in alone.layout.annotations[-1].text


def test_at_the_command_line_speed_is_measured_where_that_is_asked(run, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("llmq.bench.speed.read_bandwidth", lambda device: 1e12)
    where = ("advise", "--model", tiny_folder, "--device", "cpu", "--context", 96, "--methods", "llm-int8")
    with light():
        status, out, _ = run(*where, "--measure", "--json", "--html", tmp_path / "a.html")
    found = json.loads(out[-1])
    assert status == 0 and [row["method"] for row in found["results"]] == ["fp16", "llm-int8"]
    assert all(row["fits"] and row["speed"]["here"] and row["speed"]["over_fp16"] > 0 for row in found["results"])
    assert "Should I quantize" in (tmp_path / "a.html").read_text()
    for wrong, told in (
        (("--device-memory", "cow"), "device memory is 'cow'"),
        (("--device-memory", "0.01MB", "--measure"), "no method fits, so nothing can be measured; leave out --measure"),
        (("--batch", 2, "--measure"), "speed is measured at batch 1; leave out --measure"),
        (("--batch", 0), "context is 96 and batch is 0"),
    ):
        status, out, err = run(*where, *wrong)
        assert (status, out) == (2, []) and told in err[-1]


def test_the_page_has_the_card_of_the_same_form():
    view, found = answers(LLAMA, "t4", "", 2048, 1, ANYBODY)
    card = advice_card(found)
    advice = advised(Place.named("t4"), *stored_results(), model=LLAMA)
    assert view["headline"].startswith("Llama") and "<h2>Should I quantize?</h2>" in card
    assert f"<b>Yes, with int8 weights only</b>{said(advice).removeprefix('Yes, with int8 weights only')}" in card
    wrong, nothing = answers(LLAMA, "other", "cow", 2048, 1, ANYBODY)
    assert wrong["failed"] and nothing is None and advice_card(nothing) == ""
    tab = FitTab(SimpleNamespace(access=ANYBODY, device="cpu"))
    for save in (tab._written, tab._drawn):
        with pytest.raises(gr.Error, match="Not counted: device memory is .*cow"):
            save(LLAMA, "other", "cow", 2048, 1)
    view, found = answers(DEMO, HERE, "", 64, 1, ANYBODY)
    assert "fits this machine" in view["headline"] and "fits this machine" in advice_card(found)
    assert fit_wishes_of({"view": "fit", "card": HERE})["card"] == HERE
