"""Texts and paths with accents under a locale that has none, and output that an encoding has no sign for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llmq.cli import main
from llmq.errors import UserError
from llmq.events import Finished, Run, TimedEvent
from llmq.models.demo import demo_folder
from llmq.terminal import spelled, typed

ROOT = Path(__file__).parents[1]
POSIX = {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}


def llmq(*arguments, **variables) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llmq", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("plain", "plain"),
        ("Écris 日本", "Écris 日本"),
        ("Écris 日本".encode().decode("ascii", "surrogateescape"), "Écris 日本"),
        ("Ã".encode("latin-1").decode("utf-8", "surrogateescape"), "\udcc3"),
        ("half \ud83d", "half \ud83d"),
    ],
)
def test_what_was_typed_is_read_as_utf_8_whatever_the_locale(argument, text):
    assert typed(argument) == text


def test_a_path_that_the_locale_cannot_spell_is_named_with_the_way_out(capsys, monkeypatch):
    assert spelled("/tmp/modèle 日本") == "/tmp/modèle 日本"
    path = "/tmp/modèle".encode().decode("ascii", "surrogateescape")
    with pytest.raises(UserError, match="the locale '.*' cannot spell '/tmp/modèle'; set LC_ALL=C.UTF-8"):
        spelled(path)
    for arguments in (["compare", "Hi", "--model", path], ["models", "--fetch", path], ["outliers", "--sweep", path]):
        assert main(arguments) == 2
        assert "LC_ALL=C.UTF-8" in capsys.readouterr().err
    monkeypatch.setenv("LLMQ_CACHE", "/tmp/mod\udce8le")
    with pytest.raises(UserError, match="LC_ALL=C.UTF-8"):
        demo_folder()


def test_a_prompt_and_a_file_with_accents_work_without_a_locale(tiny_folder, tmp_path):
    saved = tmp_path / "écrit.jsonl"
    options = ["--model", tiny_folder, "--device", "cpu", "--methods", "fp32", "--max-new-tokens", 2, "--save", saved]
    done = llmq("compare", "Écris un poème", *options, **POSIX)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert Run.load(saved).settings["prompt"] == "Écris un poème"
    shown = llmq("replay", saved, "--json", **POSIX)
    assert json.loads(shown.stdout.splitlines()[-1])["settings"]["prompt"] == "Écris un poème"


def test_a_model_in_a_folder_with_accents_is_one_line_without_a_locale(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "modèle")
    done = llmq("compare", "Hi", "--model", tmp_path / "modèle", **POSIX)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "LC_ALL=C.UTF-8" in done.stderr


@pytest.mark.parametrize(
    "variables",
    [POSIX, {"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}],
    ids=["POSIX", "ascii", "latin-1"],
)
def test_what_the_output_has_no_sign_for_is_an_escape(variables, tmp_path):
    finished = Finished(contestant="fp16", reason="eos", text="日本 ok")
    path = Run({"contestants": ["fp16"]}, {}, [TimedEvent(0.0, finished)]).save(tmp_path / "run.jsonl")
    done = llmq("replay", path, **variables)
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0), done.stderr
    assert "\\u65e5\\u672c ok" in done.stdout


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_reader_who_has_seen_enough_is_no_traceback(form):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "llmq", "models", *form]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
