"""The commands that look inside a model: outliers, agreement, explain-token, experiment; whole, and refused by name."""

from __future__ import annotations

import json

import pytest

PROMPT = "Hello LLaMA"


@pytest.fixture
def ask(run, tiny_folder):
    """Run a command on the tiny model; its exit status, its JSON (None without), and what it said."""

    def asked(command, *arguments):
        status, out, err = run(command, *arguments, "--model", tiny_folder, "--device", "cpu")
        found = json.loads(out[-1]) if "--json" in arguments and status == 0 else None
        return status, found, "\n".join(err if status else out)

    return asked


def test_outliers_say_what_the_layers_did(ask, tmp_path):
    status, found, _ = ask("outliers", PROMPT, "--new-tokens", 2, "--threshold", 2.5, "--json")
    assert status == 0 and found["kernel_agrees"] == [42, 42]
    for module in found["modules"]:
        if module["kernel_columns"] is not None:
            assert module["kernel_columns"] == [module["prefill_columns"], *module["decode_columns"]]
    page = tmp_path / "out.html"
    status, _, said = ask("outliers", PROMPT, "--new-tokens", 1, "--html", page)
    assert status == 0 and "All 28 layer calls agree" in said and page.read_text().startswith("<!doctype html>")


def test_agreement_and_drift(ask, tmp_path):
    page = tmp_path / "out.html"
    status, found, _ = ask("agreement", PROMPT, "--new-tokens", 6, "--json", "--html", page)
    assert status == 0 and found["continuation"] == len(PROMPT)
    assert len(found["tokens"]) == len(found["token_ids"]) - 1 and page.exists()
    assert found["mean_kl"] == pytest.approx(sum(t["kl"] for t in found["tokens"]) / len(found["tokens"]))
    assert len(found["drift"]["baseline_ids"]) <= 6


def test_a_file_can_be_read(ask, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Some text to read.")
    status, found, _ = ask("agreement", "--file", text, "--read", "text", "--json")
    assert status == 0 and found["continuation"] is None and found["drift"] is None
    assert "".join(found["texts"]) == "Some text to read."


def test_a_token_is_explained(ask):
    status, found, _ = ask(
        "explain-token", PROMPT, "--token", 5, "--new-tokens", 3, "--method", "absmax", "--baseline", "fp32", "--json"
    )
    assert status == 0 and found["position"] == 5 and len(found["layers"]) == 2
    diverges = found["baseline_token"] != found["other_token"]
    assert len(found["patches"]) == (14 if diverges else 0)
    status, found, _ = ask("explain-token", PROMPT, "--new-tokens", 3, "--no-patch", "--json")
    assert status == 0 and found["patches"] == [] and all(layer["sqnr_db"] > 0 for layer in found["layers"])


@pytest.mark.parametrize(("what", "rows"), [
    (["ablation"], 6),
    (["causal", "--methods", "fp16,llm-int8@2:outliers=row", "--changes", "1"], 4),
    (["silencing", "--counts", "1,3", "--draws", "2", "--prompt", "Hi"], 1 + 2 * 3),
    (["amplifying", "--factors", "1,64", "--channels", "3"], 8),
    (["thresholds", "--thresholds", "0,2.5,inf", "--method", "bnb-int8"], 3),
])  # fmt: skip
def test_experiments(ask, tmp_path, what, rows):
    saved, page = tmp_path / "result.json", tmp_path / "out.html"
    status, found, _ = ask("experiment", *what, "--json", "--save", saved, "--html", page)
    assert status == 0 and len(found["results"]) == rows and not found["stopped"]
    assert json.loads(saved.read_text()) == found and found["conditions"]["windows"] == 1
    assert "<table>" in page.read_text()
    status, _, said = ask("experiment", *what)
    assert status == 0 and len(said.splitlines()) >= rows


def test_a_sweep_notes_what_is_not_at_hand(run, tiny_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, out, _ = run("outliers", "--sweep", f"{tiny_folder},tinyllama-1.1b-chat", "--device", "cpu", "--json")
    found = json.loads(out[-1])
    assert status == 0 and [row["model"] for row in found["results"]] == [str(tiny_folder)]
    assert list(found["missing"]) == ["tinyllama-1.1b-chat"]
    assert found["results"][0]["perplexity"] > 1 and 0 <= found["results"][0]["layers_touched"] <= 1


@pytest.mark.parametrize(("arguments", "named"), [
    (["outliers"], "no prompt"),
    (["outliers", PROMPT, "--threshold", "-1"], "-1"),
    (["outliers", PROMPT, "--threshold", "nan"], "nan"),
    (["outliers", PROMPT, "--threshold", "six"], "six"),
    (["agreement"], "--file"),
    (["agreement", PROMPT, "--read", "aloud"], "'aloud'"),
    (["agreement", PROMPT, "--method", "fp16"], "both methods"),
    (["agreement", "H", "--read", "text"], "at least 2"),
    (["agreement", PROMPT, "--new-tokens", "0"], "new tokens is 0"),
    (["explain-token", PROMPT, "--token", "0", "--new-tokens", "2"], "token is 0"),
    (["explain-token", PROMPT, "--token", "999", "--new-tokens", "2"], "token is 999"),
    (["explain-token", PROMPT, "--baseline", "llm-int8", "--new-tokens", "2"], "no 16-bit modules"),
    (["experiment", "amplifying", "--factors", "65"], "factor is 65"),
    (["experiment", "amplifying", "--factors", "two"], "'two'"),
    (["experiment", "amplifying", "--channels", "99"], "channel is 99"),
    (["experiment", "amplifying", "--channels", "-1"], "channel is -1"),
    (["experiment", "silencing", "--counts", "0"], "is 0"),
    (["experiment", "attention", "--longest", "63"], "longest is 63"),
    (["experiment", "attention", "--dtype", "int8"], "'int8'; choose from bfloat16, float16, float32"),
    (["experiment", "kv-cache", "--longest", "129"], "longest is 129"),
    (["experiment", "causal", "--changes", "0"], "changes is 0"),
    (["experiment", "causal", "--methods", "llm-int8@outliers=column"], "'column'"),
    (["experiment", "thresholds", "--thresholds", "-1"], "-1"),
    (["experiment", "thresholds", "--thresholds", "nan"], "nan"),
    (["experiment", "thresholds", "--method", "fp16"], "unknown method with an outlier threshold 'fp16'"),
    (["experiment", "ablation", "--windows", "0"], "windows is 0"),
])  # fmt: skip
def test_a_bad_value_is_refused_in_one_line(ask, arguments, named):
    status, _, said = ask(*arguments)
    last = [line for line in said.splitlines() if line.startswith("llmq") and "MB of weights" not in line]
    assert status == 2 and named in last[-1] and "Traceback" not in said
