"""Texts and paths with accents under a locale that has none, and output that an encoding has no sign for."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import pytest

from llmq.cli import main
from llmq.errors import UserError
from llmq.events import Finished, Progress, Run, TimedEvent
from llmq.models.demo import demo_folder
from llmq.models.loading import quiet_libraries
from llmq.terminal import as_typed, show_progress, spelled

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
        ("\udcc3 is no letter", "\udcc3 is no letter"),
        ("half \ud83d", "half \ud83d"),
    ],
)
def test_what_was_typed_is_read_as_utf_8_whatever_the_locale(argument, text):
    """Paths are left to the system, which gets the bytes back."""
    options = Namespace(prompt=argument, text=None, save=Path(argument), model="demo", tokens=3)
    assert as_typed(options) == Namespace(prompt=text, text=None, save=Path(argument), model="demo", tokens=3)


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


STEPS = [Progress(f"fetching ({i} of 200 MB)", i / 200) for i in range(101)] + [Progress("unpacking", 0.55)]
STEPS += [Progress("converting", 0.6 + i / 250) for i in range(96)] + [Progress("ready", 1.0)]


def test_progress_in_a_log_is_a_line_for_each_tenth(capsys):
    show_progress(iter(STEPS))
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], lines[1]) == ("llmq: fetching (0 of 200 MB) (0%)", "llmq: fetching (20 of 200 MB) (10%)")
    assert lines[-1] == "llmq: ready (100%)" and 8 <= len(lines) <= 12
    assert "\r" not in "".join(lines)


def test_progress_in_a_terminal_is_one_line_that_changes(capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True)
    show_progress(iter(STEPS))
    shown = capsys.readouterr().err
    assert (shown.count("\r"), shown.count("\n")) == (len(STEPS), 1) and shown.endswith("\n")
    bars = [line[: line.index("]") + 1] for line in shown.split("\r")[1:]]
    assert (bars[0], bars[-1]) == ("[" + 30 * "." + "]", "[" + 30 * "#" + "]")


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_to_do_is_nothing_to_show(terminal, capsys, monkeypatch):
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: terminal)
    show_progress(iter(()))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["compare", "agreement"])
def test_every_line_beside_the_result_is_our_own(command, tiny_folder):
    """Not transformers' of its next versions, nor bitsandbytes' of a package for 4 bit."""
    methods = ["--methods", "fp32,bnb-int8"] if command == "compare" else ["--method", "bnb-int8"]
    done = llmq(command, "Hi", "--model", tiny_folder, "--device", "cpu", "--json", *methods)
    assert done.returncode == 0 and "bnb-int8" in done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("llmq: ")] == []


def test_errors_of_the_libraries_still_show():
    quiet_libraries()
    for name in ("transformers", "transformers.modeling_utils", "bitsandbytes.backends.cpu.ops"):
        assert logging.getLogger(name).isEnabledFor(logging.ERROR), name
    assert logging.getLogger("bitsandbytes.cextension").isEnabledFor(logging.WARNING), "says that a GPU is not used"
    with warnings.catch_warnings(record=True) as seen:
        quiet_libraries()
        warnings.warn("what the next version changes", FutureWarning, stacklevel=1)
        warnings.warn("what is wrong now", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["what is wrong now"]
