"""Every command runs where llmq/ui does not exist and gradio cannot be imported, and writes its pages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llmq
from llmq.cli import Parser, build_parser

PROGRAM = """
import gc, json, sys
sys.modules["gradio"] = None
import llmq.bench.bandwidth, llmq.cli, llmq.transformers
llmq.bench.bandwidth.BANDWIDTH_BYTES["cpu"] = 1 << 20
gc.freeze()  # every run collects garbage, and what the libraries hold is none

def status(arguments):
    try:
        return llmq.cli.main(arguments)
    except SystemExit as stop:
        return stop.code

statuses = [status(arguments) for arguments in json.loads(sys.stdin.read())]
print(json.dumps({"package": llmq.__file__, "statuses": statuses}))
"""
REFUSED = {"tasks no-such-task": 2, "server --server": 2}
SHORT = ("--prompt-tokens", 4, "--repeats", 1)


def commands(model: Path, folder: Path) -> list[list[str]]:
    """One line for each command and each thing it can do; a page of each that writes one."""
    run, text = folder / "run.jsonl", "Hello"
    asked = [
        ("compare", text, "--max-new-tokens", 2, "--save", run),
        ("replay", run),
        ("outliers", text, "--new-tokens", 1),
        ("outliers", "--sweep", model),
        ("agreement", text, "--new-tokens", 2),
        ("explain-token", text, "--new-tokens", 2, "--token", 2),
        ("experiment", "ablation"),
        ("experiment", "silencing", "--counts", 1, "--draws", 1),
        ("experiment", "amplifying", "--factors", 2),
        ("experiment", "thresholds", "--thresholds", "0,6"),
        ("experiment", "causal", "--changes", 1),
        ("experiment", "attention", "--longest", 64),
        ("experiment", "decoding", "--tokens", 2),
        ("experiment", "kv-cache", "--longest", 64),
        ("experiment", "paged-cache", "--requests", 1, "--longest", 64),
        ("experiment", "rounded-cache"),
        ("experiment", "sensitivity", "--by", "layers"),
        ("quality", "--tokens", 1024),
        ("race", "--methods", "fp16,llm-int8", "--tokens", 1024),
        ("rounding", "--method", "absmax"),
        ("tasks", "no-such-task"),
        ("server", "--server", "openai@http://127.0.0.1:9/v1"),
        ("sweep", "quality", "--models", "no-such-model", "--out", folder / "swept"),
        ("quantize", model, "--method", "rtn@group=32", "--save", folder / "quantized"),
        ("memory", "--context", 64),
        ("advise", "--context", 64),
        ("models",),
        ("lesson", "--static", folder / "lesson"),
        *(("bench", what, *SHORT, "--new-tokens", 2) for what in ("decode", "hooks")),
        *(("bench", what, *SHORT) for what in ("prefill", "load")),
    ]
    lines = []
    for number, words in enumerate(asked):
        model_and_device = () if words[0] in ("replay", "models", "quantize", "lesson") else ("--model", model)
        model_and_device += () if words[0] in ("replay", "models", "memory", "lesson") else ("--device", "cpu")
        page = ("--html", folder / f"{number}.html") if writes_pages(words) else ()
        lines.append([str(word) for word in (*words, *model_and_device, *page)])
    return lines


def choices(parser) -> dict:
    return next((action.choices for action in parser._actions if isinstance(action.choices, dict)), {})


def parser_of(words: tuple) -> Parser:
    """The parser that reads the options after these words."""
    parser = build_parser()
    for word in words:
        if word not in (below := choices(parser)):
            break
        parser = below[word]
    parser.fill()
    return parser


def writes_pages(words: tuple) -> bool:
    return "--html" in parser_of(words)._option_string_actions


def paths(parser, before: tuple = ()) -> set[tuple]:
    """The words of every command."""
    below = choices(parser)
    return {before} if not below else set().union(*(paths(p, (*before, name)) for name, p in below.items()))


@pytest.fixture
def bare(tmp_path):
    """A copy of the package without the page."""
    package = Path(llmq.__file__).parent
    shutil.copytree(package, tmp_path / "llmq", ignore=shutil.ignore_patterns("ui", "__pycache__"))
    return tmp_path


def test_every_command_runs_without_the_page(bare, tiny_folder):
    asked = commands(tiny_folder, bare)
    tried = {words for words in paths(build_parser()) for line in asked if tuple(line[: len(words)]) == words}
    assert tried == paths(build_parser()), "a command is not tried"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(asked), cwd=bare, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(bare)}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["package"]).parent == bare / "llmq" and not (bare / "llmq" / "ui").exists()
    assert {
        " ".join(line[:2]): status for line, status in zip(asked, found["statuses"], strict=True) if status
    } == REFUSED
    pages = [Path(line[-1]) for line in asked if "--html" in line and " ".join(line[:2]) not in REFUSED]
    assert len(pages) == 22 and all(page.read_text().startswith("<!doctype html>") for page in pages)
