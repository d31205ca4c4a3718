"""llmq from Python: what each call returns, how it shows itself, what stays loaded, and what is refused."""

from __future__ import annotations

import html
import inspect
import json
import re
import sys
import threading
from types import SimpleNamespace

import pytest
from tiny_runs import CONTESTANT_KEYS, PROMPT, RUN_KEYS, compare_options, light, run_cli
from torch import nn

import llmq
from llmq import face
from llmq.errors import BadChoice, ModelUnavailable, UserError
from llmq.events import Progress
from llmq.fields import fields_of
from llmq.figures.blocks import Table
from llmq.labs import lab_classes
from llmq.methods import METHODS
from llmq.models.opening import Model
from llmq.models.presets import PRESETS

EXAMPLE = re.compile(r"^ {4,8}(llmq\..*)$", re.MULTILINE)


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture
def here(tiny_folder):
    """What every call is asked on."""
    return {"model": str(tiny_folder), "device": "cpu"}


@pytest.fixture
def calls(here):
    """One short call for each question that has a function, and one for a lab that has none."""
    return {
        "compare": lambda: llmq.compare(PROMPT, "fp16,fp32", max_new_tokens=4, **here),
        "outliers": lambda: llmq.outliers(PROMPT, method="llm-int8@2.5", new_tokens=2, **here),
        "agreement": lambda: llmq.agreement(PROMPT, method=METHODS["vectorwise"], new_tokens=4, **here),
        "quality": lambda: llmq.quality(["llm-int8", METHODS["int8-weight-only"]], tokens=1024, **here),
        "amplifying": lambda: llmq.ask("amplifying", factors=(1, 16), **here),
    }


def rows_of(text: str) -> list[str]:
    return text.splitlines()


def test_every_public_name_is_there_and_no_other():
    assert set(llmq.__all__) <= set(dir(llmq)) and {"telemetry", "nonsense"}.isdisjoint(llmq.__all__)
    assert all(getattr(llmq, name) is not None for name in llmq.__all__)
    assert llmq.METHODS is METHODS and llmq.Run.__module__ == "llmq.events"
    with pytest.raises(AttributeError, match="'llmq' has no attribute 'nonsense'"):
        llmq.nonsense  # noqa: B018


def test_compare_is_what_the_command_prints(here, tiny_folder, capsys):
    answer = llmq.compare(PROMPT, ["fp16", "llm-int8@0.5"], max_new_tokens=4, **here)
    found = answer.to_json()
    assert found.keys() >= RUN_KEYS and all(row.keys() >= CONTESTANT_KEYS for row in found["contestants"])
    _, out, _ = run_cli(capsys, *compare_options(tiny_folder, "--methods", "fp16,llm-int8@0.5", "--json"))
    printed = json.loads(out[-1])
    for name in ("method", "text", "token_ids", "weight_bytes", "kv_bytes", "peak_bytes", "engine", "error"):
        assert [row[name] for row in found["contestants"]] == [row[name] for row in printed["contestants"]]
    assert (found["settings"], found["agreement"]) == (printed["settings"], printed["agreement"])
    assert found["environment"].keys() == printed["environment"].keys()


def test_an_answer_shows_itself_as_a_plain_table(calls):
    shown = rows_of(repr(calls["compare"]()))
    assert shown[0].endswith("fp16 and fp32") and {"--- fp16", "--- fp32"} <= set(shown)
    assert next(row for row in shown if row.startswith("Method")).split()[-1] == "Peak"
    assert [row.split()[0] for row in shown if "tok/s" in row] == ["fp16", "fp32"]
    assert shown[-1].startswith(("the texts agree", "the first different token is number "))
    shown = repr(calls["outliers"]())
    assert "layer calls agree" in shown and "figures: figures() draws them" in rows_of(shown)[-1]


def test_a_long_text_and_a_long_table_are_cut_where_they_are_printed_only(calls, monkeypatch):
    monkeypatch.setattr(face, "ROWS", 2)
    outliers, compared = calls["outliers"](), calls["compare"]()
    tables = [block for block in outliers.answer.blocks() if isinstance(block, Table)]
    shown = rows_of(repr(outliers))
    assert len(tables) == 3 and all(len(table.rows) > 3 for table in tables)
    assert [row for row in shown if row.startswith("…")] == [f"… {len(table.rows) - 2} more" for table in tables]
    assert "… " not in outliers._repr_html_() and outliers._repr_html_().count("<tr>") == sum(
        len(table.rows) + 1 for table in tables
    )
    next(iter(compared.answer.summary.outcomes.values())).pieces.append("y" * 1000)
    assert "y" * 1000 in compared._repr_html_() and "y" * 1000 in compared.to_json()["contestants"][0]["text"]
    assert "y" * (face.CHARACTERS + 1) not in repr(compared) and "y …\n--- fp32" in repr(compared)


def test_a_notebook_gets_every_text_and_figure_escaped(calls):
    answer = calls["compare"]()
    outcome = next(iter(answer.answer.summary.outcomes.values()))
    outcome.pieces.append("<script>alert(1)</script>")
    shown = answer._repr_html_()
    for row in answer.to_json()["contestants"]:
        assert html.escape(row["text"]) in shown and f"<td>{row['method']}</td>" in shown
    assert "<script" not in shown and "tok/s" in shown and " kB" in shown


def test_every_question_has_json_a_page_and_figures_that_a_notebook_can_show(calls, tmp_path):
    drawn = {}
    for name, call in calls.items():
        answer = call()
        assert json.loads(json.dumps(answer.to_json(), allow_nan=False)) == answer.to_json()
        answer.html(tmp_path / name / "page.html")
        page = (tmp_path / name / "page.html").read_text(encoding="utf-8")
        assert page.startswith("<!doctype html>") and html.escape(answer.answer.title) in page
        assert not any("var(" in figure.to_json() for figure in answer.figures())
        drawn[name] = len(answer.figures())
        assert page.count('class="figure"') == drawn[name]
    assert drawn["outliers"] > 4 and drawn["amplifying"] == 1 and drawn["compare"] == 0


def test_what_is_saved_is_loaded_again_and_replayed(calls, tmp_path, capsys):
    for name, call in calls.items():
        answer = call()
        answer.save(tmp_path / name)
        again = llmq.load(str(tmp_path / name))
        assert again.to_json() == answer.to_json() and repr(again) == repr(answer)
        status, out, _ = run_cli(capsys, "replay", tmp_path / name, "--json")
        assert status == 0 and json.loads(out[-1]) == answer.to_json()


def test_a_file_that_holds_no_answer_is_named(tmp_path, calls):
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        with pytest.raises(UserError, match=name):
            llmq.load(tmp_path / name)
    (tmp_path / "file").write_text("")
    for write in ("save", "html"):
        with pytest.raises(UserError, match="cannot write"):
            getattr(calls["compare"](), write)(tmp_path / "file" / "below")


def loaded() -> list:
    return list(face.machine().pool)


def test_models_stay_loaded_until_they_are_freed(calls):
    first, second = calls["compare"](), calls["compare"]()
    assert all(row["load_seconds"] > 0 for row in first.to_json()["contestants"])
    assert all(row["load_seconds"] == 0 for row in second.to_json()["contestants"]) and len(loaded()) == 2
    llmq.free()
    assert loaded() == []
    assert all(row["load_seconds"] > 0 for row in calls["compare"]().to_json()["contestants"])


def test_calls_of_several_threads_take_turns(calls):
    found = []
    threads = [threading.Thread(target=lambda: found.append(calls["compare"]())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [[row["text"] for row in answer.to_json()["contestants"]] for answer in found]
    assert len(texts) == 3 and texts[0] == texts[1] == texts[2] and len(loaded()) == 2


def test_an_interrupted_call_leaves_the_machine_to_the_next(calls, monkeypatch):
    def interrupted(items):
        for number, item in enumerate(items):
            if number == 4:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(face, "_telling", lambda verbose: interrupted)
    with pytest.raises(KeyboardInterrupt):
        calls["compare"]()
    monkeypatch.undo()
    assert calls["compare"]().to_json()["contestants"][0]["error"] is None


@pytest.mark.parametrize(("verbose", "terminal", "told"), [
    (None, False, False), (None, True, True), (True, False, True), (False, True, False),
])  # fmt: skip
def test_progress_is_told_where_it_is_wanted(verbose, terminal, told, here, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    llmq.compare(PROMPT, ["fp16"], max_new_tokens=2, verbose=verbose, **here)
    llmq.outliers(PROMPT, method="fp16", new_tokens=0, verbose=verbose, **here)
    printed = capsys.readouterr()
    assert printed.out == "" and ("fp16: finished (length)" in printed.err) == told == bool(printed.err)


REFUSED = {
    "a method": (lambda k: llmq.compare(PROMPT, ["fp16", "int3"], **k), ["'int3'", *METHODS]),
    "no method": (lambda k: llmq.compare(PROMPT, [], **k), ["method ''", *METHODS]),
    "a model": (lambda k: llmq.compare(PROMPT, **k | {"model": "nope"}), ["'nope'", *PRESETS]),
    "a device": (lambda k: llmq.compare(PROMPT, **k | {"device": "tpu"}), ["'tpu'", "cpu"]),
    "a prompt": (lambda k: llmq.compare("", **k), ["prompt is empty"]),
    "a number of tokens": (lambda k: llmq.compare(PROMPT, max_new_tokens=0, **k), ["max_new_tokens", "1 to 4096"]),
    "a lab": (lambda k: llmq.ask("nope", **k), ["lab 'nope'", "ablation", "explain-token", "quality"]),
    "a setting": (lambda k: llmq.outliers(PROMPT, tokens=3, **k), ["'tokens'", "method", "new_tokens", "sweep"]),
    "a setting's value": (lambda k: llmq.outliers(PROMPT, new_tokens=2.5, **k), ["new tokens", "2.5", "0 to 64"]),
    "a number that is none": (lambda k: llmq.quality(tokens=True, **k), ["tokens", "True"]),
    "a text that is none": (lambda k: llmq.quality(text=3, **k), ["text cannot be 3", "int"]),
    "a switch that is none": (
        lambda k: llmq.ask("explain-token", prompt=PROMPT, patch="no", **k),
        ["patch cannot be 'no'", "str"],
    ),
    "nothing for a method": (lambda k: llmq.outliers(PROMPT, method=None, **k), ["'None'", *METHODS]),
    "a model's name": (lambda k: llmq.open_model("nope"), ["'nope'", *PRESETS]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_value_that_cannot_be_used_is_named_with_its_choices(what, here):
    call, words = REFUSED[what]
    with pytest.raises(BadChoice) as refusal:
        call(here)
    assert isinstance(refusal.value, ValueError) and [w for w in words if w not in str(refusal.value)] == []


def test_a_method_that_fails_is_shown_and_the_others_go_on(here, monkeypatch):
    def fails(self, linear, statistics=None):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(type(METHODS["vectorwise"]), "quantize", fails)
    answer = llmq.compare(PROMPT, ["fp32", "vectorwise"], max_new_tokens=2, **here)
    errors = [row["error"] for row in answer.to_json()["contestants"]]
    assert errors[0] is None and "out of luck" in errors[1] and "out of luck" in repr(answer)


def test_open_model_hands_out_a_model_that_is_ready(here, tmp_path, monkeypatch):
    model = llmq.open_model(here["model"])
    assert isinstance(model, Model) and model.config.hidden_size == 32 and len(model.encode(PROMPT)) == 11
    assert isinstance(model.shape, nn.Module)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelUnavailable, match="TinyLlama/TinyLlama"):
        llmq.open_model("tinyllama-1.1b-chat").config  # noqa: B018


def test_open_model_fetches_what_is_missing_and_says_so_where_it_is_wanted(monkeypatch, capsys):
    made = []

    class Missing:
        def prepare(self):
            made.append(self)
            yield Progress("fetching", 0.5)

    monkeypatch.setattr(face.opening, "open_model", lambda name, random_weights: Missing())
    for verbose in (False, True):
        llmq.open_model("demo", verbose=verbose)
        assert ("fetching" in capsys.readouterr().err) == verbose and len(made) == 1 + verbose


def test_every_function_says_what_each_setting_is_and_its_usual_value():
    for name in ("outliers", "agreement", "quality"):
        said = getattr(llmq, name).__doc__
        (cls,) = (cls for cls in lab_classes().values() if cls.command == (name,))
        for field in fields_of(cls):
            option = field.flag.lstrip("-").replace("-", "_")
            explicit = inspect.signature(getattr(llmq, name)).parameters
            usual = field.kind.spell(field.default)
            assert option in explicit or f"`{option}`" in said, (name, option)
            assert option in explicit or not usual or usual in said, (name, option, usual)
    assert all(getattr(llmq, name).__doc__ for name in llmq.__all__ if name not in ("METHODS", "Run"))


@pytest.mark.parametrize("name", ["compare", "outliers", "agreement", "quality", "ask"])
def test_the_examples_of_the_functions_run(name, here):
    (example,) = EXAMPLE.findall(getattr(llmq, name).__doc__)
    small = SimpleNamespace(**{name: lambda *a, **k: getattr(llmq, name)(*a, **k | here)})
    assert eval(example, {"llmq": small}) is not None
