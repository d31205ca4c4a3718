"""The command line as scripts meet it: one JSON object as the last line, with the stable keys."""

from __future__ import annotations

import json
import re

import pytest
from tiny_runs import CONTESTANT_KEYS, PROMPT, RUN_KEYS, compare_options, light

from llmq import telemetry
from llmq.methods import METHODS
from llmq.models.presets import PRESETS

OUTLIER_KEYS = {"model", "method", "threshold", "prompt_tokens", "modules"}
MODULE_KEYS = {"name", "in_features", "absmax", "prefill_columns", "decode_columns"}


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


def test_compare_prints_one_json_object_with_the_stable_keys(run, tiny_folder):
    status, out, err = run(*compare_options(tiny_folder, "--methods", "fp16,bnb-int8@0.5", "--json"))
    assert (status, len(out)) == (0, 1) and all(line.startswith("llmq: ") for line in err)
    result = json.loads(out[-1])
    assert result.keys() >= RUN_KEYS and result["agreement"].keys() == {"first_divergence", "matching_prefix_tokens"}
    assert [contestant["method"] for contestant in result["contestants"]] == ["fp16", "bnb-int8@0.5"]
    for contestant in result["contestants"]:
        assert contestant.keys() >= CONTESTANT_KEYS
        assert (contestant["prompt_tokens"], len(contestant["token_ids"]), contestant["error"]) == (11, 4, None)
    assert (result["device"], result["schedule"], result["model"]) == ("cpu", "interleave", str(tiny_folder))


def test_compare_prints_the_texts_for_people(run, tiny_folder):
    status, out, _ = run(*compare_options(tiny_folder, "--methods", "fp16,fp32"))
    assert status == 0 and {"--- fp16", "--- fp32"} <= set(out)
    assert not any("different token" in line for line in out) and "the texts agree throughout" in out
    assert any(line.startswith("fp32") and "tok/s" in line and " kB" in line for line in out)


def test_compare_tells_both_choices_at_the_first_difference(run, tiny_folder):
    options = compare_options(tiny_folder, "--methods", "fp16,rtn@2:group=16", "--json")
    _, out, _ = run(*options)
    found = json.loads(out[-1])["first_difference"]
    assert found["first"]["rank"] == 0 and found["second"]["contestant"] == "rtn@2:group=16"
    assert found["first"]["token_id"] != found["second"]["token_id"]
    _, out, _ = run(*options[:-1])
    assert re.search(r"first different token is number 1: FP16 took .+ at \S+%, .+, FP16.s second", "\n".join(out))


def test_a_saved_run_replays_to_the_same_result(run, tiny_folder, tmp_path):
    path = tmp_path / "runs" / "run.jsonl"
    _, compared, _ = run(*compare_options(tiny_folder, "--methods", "fp32,bf16", "--save", path, "--json"))
    status, replayed, _ = run("replay", path, "--json")
    assert status == 0 and json.loads(replayed[-1]) == json.loads(compared[-1])


def test_outliers_prints_one_json_object_with_the_stable_keys(run, tiny_folder, tmp_path):
    html = tmp_path / "out.html"
    options = ["--threshold", 2.5, "--new-tokens", 2, "--html", html, "--json"]
    status, out, _ = run("outliers", PROMPT, "--model", tiny_folder, *options)
    result = json.loads(out[-1])
    assert (status, len(out)) == (0, 1) and result.keys() >= OUTLIER_KEYS
    assert (result["prompt_tokens"], result["threshold"], result["method"]) == (11, 2.5, "bnb-int8@2.5")
    assert len(result["modules"]) >= 14 and all(module.keys() >= MODULE_KEYS for module in result["modules"])
    for module in result["modules"]:
        assert module["prefill_columns"] == sorted(module["prefill_columns"])
        assert [columns == sorted(columns) for columns in module["decode_columns"]] == [True, True]
    assert "<html" in html.read_text().lower()


def test_outliers_take_any_threshold_they_accept(run, tiny_folder):
    """As low as the page's slider goes; a threshold that cannot be used is refused before a model is loaded."""
    status, out, _ = run("outliers", PROMPT, "--model", tiny_folder, "--threshold", 0.5, "--new-tokens", 1, "--json")
    assert status == 0 and json.loads(out[-1])["threshold"] == 0.5


def test_the_heads_columns_are_said_to_be_of_one_position(run, tiny_folder):
    _, out, _ = run("outliers", PROMPT, "--model", tiny_folder, "--threshold", 0.5, "--new-tokens", 1)
    noted = [line.split()[0] for line in out if "last position alone" in line]
    assert noted == ["lm_head"]


def test_models_prints_one_json_object_with_every_name(run):
    status, out, err = run("models", "--json")
    result = json.loads(out[-1])
    assert (status, len(out), err) == (0, 1, [])
    assert [model["name"] for model in result["models"]] == list(PRESETS)
    assert [method["name"] for method in result["methods"]] == list(METHODS)
    assert all(model.keys() == {"name", "hub_id", "about", "licence", "gated"} for model in result["models"])


def test_memory_prints_one_json_object(run, tiny_folder):
    options = ["--methods", "fp16,bnb-int8", "--context", 100, "--device-memory", 1, "--json"]
    status, out, _ = run("memory", "--model", tiny_folder, *options)
    result = json.loads(out[-1])
    assert status == 0 and [row["method"] for row in result["results"]] == ["fp16", "bnb-int8"]
    assert [row["kv"] for row in result["results"]] == [12_800, 12_800]
    assert [row["fits"] for row in result["results"]] == [True, True]


def test_a_contestant_that_fails_is_exit_status_one(run, tiny_folder, monkeypatch):
    monkeypatch.setattr(telemetry, "free_bytes", lambda device: 10)
    status, out, _ = run(*compare_options(tiny_folder, "--json"))
    errors = [contestant["error"] for contestant in json.loads(out[-1])["contestants"]]
    assert status == 1 and all("bytes predicted" in error for error in errors)
