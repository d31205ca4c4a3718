"""A wrong value on the command line: exit status 2 and one line that names it and the choices, never a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import PROMPT, compare_options, light

from llmq import actions
from llmq.methods import METHODS
from llmq.models.presets import PRESETS


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


WRONG_SETTINGS = {
    "--temperature 9": ["temperature", "9", "0 to 2"],
    "--temperature 11": ["temperature", "11", "0 to 2"],
    "--temperature -1": ["temperature", "-1", "0 to 2"],
    "--temperature nan": ["temperature", "nan", "0 to 2"],
    "--top-k -1": ["top_k", "-1"],
    "--top-p 0": ["top_p", "0", "(0, 1]"],
    "--top-p 1.5": ["top_p", "1.5", "0 to 1"],
    "--seed -1": ["seed", "-1"],
    f"--seed {10**400}": ["seed"],
    "--max-new-tokens 0": ["max_new_tokens", "0", "1 to 4096"],
    "--max-new-tokens 9999": ["max_new_tokens", "9999", "1 to 4096"],
    "--schedule sideways": ["'sideways'", "interleave", "in-turn"],
    "--methods int3": ["'int3'", *METHODS],
    "--methods fp16,": ["''", *METHODS],
    "--methods fp16,fp16": ["fp16, fp16"],
    "--methods fp16,fp32,bf16,bnb-int8": ["4 methods", *METHODS],
    "--methods fp16@3": ["fp16", "'3'", "no settings"],
    "--methods bnb-int8@hot": ["'hot'", "0 (off) to 65504"],
    "--threshold -2": ["-2", "0 (off) to 65504"],
    "--threshold nan": ["nan", "0 (off) to 65504"],
    "--methods fp16 --threshold nan": ["nan", "0 (off) to 65504"],
    "--methods fp16 --threshold -1": ["-1", "0 (off) to 65504"],
    "--device cuda:99": ["'cuda:99'", "cpu"],
    "--device tpu": ["'tpu'", "cpu"],
    "--device cuda:0,cuda:1": ["'cuda:0' is not here", "cpu"],
    "--device http://host:8000": ["'http://host:8000'", "server"],
    "--model nope": ["'nope'", *PRESETS],
    "--model nope --random-weights": ["'nope'", *PRESETS],
}
UNREADABLE = {
    "--temperature hot": ["temperature", "'hot'"],
    "--max-new-tokens many": ["max-new-tokens", "'many'"],
    "--threshold hot": ["threshold", "'hot'"],
    "--seed 1.5": ["seed", "'1.5'"],
    "--colour blue": ["--colour"],
}


def assert_one_line(status: int, out: list[str], err: list[str], words: list[str]):
    assert (status, out, len(err)) == (2, [], 1), err
    assert [word for word in words if word not in err[0]] == []


@pytest.mark.parametrize(("options", "words"), WRONG_SETTINGS.items(), ids=[name[:40] for name in WRONG_SETTINGS])
def test_a_wrong_setting_is_one_line_with_the_value_and_the_choices(options, words, run, tiny_folder):
    assert_one_line(*run(*compare_options(tiny_folder), *options.split(" ")), words)


@pytest.mark.parametrize(("options", "words"), UNREADABLE.items(), ids=UNREADABLE)
def test_what_cannot_be_read_is_one_line_too(options, words, run, tiny_folder):
    assert_one_line(*run(*compare_options(tiny_folder), *options.split(" ")), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND", "compare", "replay", "models"]),
        (["frobnicate"], ["'frobnicate'", "compare", "replay", "models"]),
        (["bench", "everything"], ["'everything'", "decode"]),
        (["compare"], ["prompt"]),
        (["bench", "decode", "--repeats", "0"], ["repeats", "0", "at least 1"]),
        (["bench", "decode", "--new-tokens", "1"], ["new_tokens", "1", "at least 2"]),
        (["bench", "decode", "--methods", "int3"], ["'int3'", *METHODS]),
        (["bench", "prefill", "--new-tokens", "3"], ["bench prefill has no --new-tokens", "--prompt-tokens"]),
        (["bench", "stages", "--random-weights"], ["bench stages has no --random-weights", "--shapes"]),
        (["quality", "--text", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["quality", "--methods", "int3"], ["'int3'", *METHODS]),
        (["outliers", "Hi", "--method", "int3"], ["'int3'", *METHODS]),
        (["outliers", "Hi", "--new-tokens", "65"], ["65", "0 to 64"]),
        (["outliers", "Hi", "--model", "nope"], ["'nope'", *PRESETS]),
        (["memory", "--model", "nope"], ["'nope'", *PRESETS]),
        (["memory", "--methods", "int3"], ["'int3'", *METHODS]),
        (["memory", "--methods", "fp16", "--threshold", "nan"], ["nan", "0 (off) to 65504"]),
        (["bench", "decode", "--methods", "fp16", "--threshold", "-1"], ["-1", "0 (off) to 65504"]),
        (["quality", "--methods", "fp16", "--threshold", "nan"], ["nan", "0 (off) to 65504"]),
        (["outliers", "--sweep", "demo", "--threshold", "nan"], ["nan", "0 (off) to 65504"]),
        (["experiment", "ablation", "--threshold", "1e9"], ["1000000000", "0 (off) to 65504"]),
        (["memory", "--context", "0"], ["context", "0", "at least 1"]),
        (["memory", "--device-memory", "nan"], ["nan"]),
        (["memory", "--device-memory", "inf"], ["inf"]),
        (["models", "--fetch", "nope"], ["'nope'", *PRESETS]),
        (["replay", "/nowhere/run.jsonl"], ["/nowhere/run.jsonl"]),
    ],
    ids=lambda value: "_".join(value)[:40],
)
def test_every_command_refuses_in_one_line(arguments, words, run):
    assert_one_line(*run(*arguments), words)


@pytest.mark.parametrize(
    ("prompt", "words"), [("", "prompt is empty"), (" \n", "prompt is empty"), ("x" * 500, "500 tokens long")]
)
@pytest.mark.parametrize("command", ["compare", "outliers"])
def test_a_prompt_that_cannot_be_used_is_refused(command, prompt, words, run, tiny_folder):
    status, out, err = run(command, prompt, "--model", tiny_folder)
    assert (status, out) == (2, []) and words in err[-1]
    assert not any("Traceback" in line for line in err)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", b'{"model_type": "nonesuch"}'),
        ("config.json", b'{"model_type": "t5"}'),
        ("tokenizer.json", b"{"),
    ],
)
def test_a_model_that_cannot_be_opened_is_one_line_too(name, data, run, tiny_folder, tmp_path):
    """The libraries' explanations have many lines, and lists of hundreds of architectures."""
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_bytes(data)
    status, out, err = run(*compare_options(tmp_path))
    assert_one_line(status, out, err, [str(tmp_path)])


@pytest.mark.parametrize("option", ["--save", "--html"])
def test_a_file_that_cannot_be_written_is_named(option, run, tiny_folder, tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "out"
    command = {"--save": compare_options(tiny_folder), "--html": ["outliers", PROMPT, "--model", tiny_folder]}[option]
    status, _, err = run(*command, option, path)
    assert status == 2 and str(path) in err[-1]


def test_a_result_that_cannot_be_written_is_named(run, tmp_path, monkeypatch):
    from llmq.machine.door import Machine

    monkeypatch.setattr(Machine, "run", lambda self, bench: iter([{"results": []}]))
    (tmp_path / "file").write_text("")
    assert_one_line(*run("bench", "decode", "--save", tmp_path / "file" / "out.json"), [str(tmp_path / "file")])


def test_replay_of_a_broken_file_names_the_line(run, tmp_path):
    (tmp_path / "run.jsonl").write_text(
        '{"format": "llmq-run", "version": 1, "settings": {}, "environment": {}}\n{oops\n'
    )
    assert_one_line(*run("replay", tmp_path / "run.jsonl"), ["run.jsonl, line 2"])


def test_a_threshold_without_outliers_is_refused_before_anything_is_loaded(run, tiny_folder):
    """0 turns the decomposition off, so there is nothing to list."""
    assert_one_line(*run("outliers", PROMPT, "--model", tiny_folder, "--threshold", "0"), ["threshold", "0"])


def test_an_interrupt_from_the_keyboard_is_no_traceback(run, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(actions, "load", interrupted)
    assert run("replay", "run.jsonl") == (130, [], ["llmq: stopped"])


def test_the_module_is_the_command():
    """`python -m llmq`, with its exit status."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "llmq", "replay", "/nowhere"], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
