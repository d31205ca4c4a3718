"""A method and a lab are one file each: put into a copy of the package, they are everywhere, nothing else changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llmq

METHOD = """
from dataclasses import dataclass
from typing import Annotated

from llmq.fields import Number
from llmq.methods.base import Method


@dataclass(frozen=True)
class Coarse(Method):
    codes: Annotated[int, Number(1, 127, whole=True, help="on each side of 0")] = 127
    name, label, about = "coarse", "Coarse", "Weights at a few levels a row. Emulated."
    source = "This test"
    bits, emulated = 16, True

    def arithmetic(self, device, loop="hf"):
        return "FP16 weights at a few levels"

    def quantize(self, linear, statistics=None):
        step = linear.weight.data.abs().amax(1, keepdim=True) / self.codes
        linear.weight.data = (linear.weight.data / step).round() * step
        return linear
"""
LAB = """
from dataclasses import dataclass
from typing import Annotated

from llmq.contestant import Contestant
from llmq.fields import Number
from llmq.labs.rows import BASELINE, RowLab, shown_perplexity


@dataclass(frozen=True, kw_only=True)
class Coarser(RowLab):
    kind, command, title = "coarser", ("experiment", "coarser"), "How few codes are enough?"
    about, panel = "Weights at fewer and fewer levels.", True
    most: Annotated[int, Number(2, 127, whole=True, help="codes to begin with", label="Codes")] = 8

    def measure(self, bench):
        yield bench.progress("FP16 reads the text", 0.0)
        with bench.engine(BASELINE) as engine:
            truth = bench.read(engine)
        for codes in (self.most, self.most // 2):
            with bench.engine(Contestant.parse(f"coarse@{codes}")) as engine:
                yield {"codes": codes} | bench.score(bench.read(engine), truth)

    @classmethod
    def headers(cls):
        return ["Codes", "Perplexity"]

    @classmethod
    def row(cls, row):
        return [str(row["codes"]), shown_perplexity(row)]

    @classmethod
    def finding(cls, rows):
        return f"Measured with **{len(rows)}** numbers of codes."
"""
SESSION = """
import json, sys
import llmq
model = sys.argv[1]
answer = llmq.ask("coarser", most=4, model=model, device="cpu")
answer.save("coarser.json")
print(json.dumps([llmq.METHODS["coarse"].codes, repr(llmq.load("coarser.json")) == repr(answer), repr(answer)]))
"""
PAGE = """
import json, sys
import app
from llmq.ui.layout import build
state = app.make_state(app.parse(["--model", sys.argv[1], "--methods", "fp16,coarse@5", "--device", "cpu"]))
page = build(state)
parts = {part.elem_id: part for part in page.blocks.values() if getattr(part, "elem_id", None)}
choices = [name for part in parts.values() for _, name in getattr(part, "choices", None) or ()]
print(json.dumps({"parts": list(parts), "coarse": choices.count("coarse"), "fp16": choices.count("fp16"),
                  "asked": {p["parameter_name"]: p["parameter_default"] for p in
                            page.get_api_info()["named_endpoints"]["/coarser"]["parameters"]}}))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with two more files."""
    folder = tmp_path_factory.mktemp("more")
    shutil.copytree(Path(llmq.__file__).parent, folder / "llmq", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(llmq.__file__).parents[1] / "app.py", folder)
    (folder / "llmq" / "methods" / "coarse.py").write_text(METHOD)
    (folder / "llmq" / "labs" / "coarser.py").write_text(LAB)
    return folder


@pytest.fixture
def started(copy):
    """Run Python in the copy: exit status, standard output by lines, and standard error."""

    def run(*words):
        done = subprocess.run(
            [sys.executable, *(str(word) for word in words)], cwd=copy, capture_output=True, text=True, timeout=300,
            env=os.environ | {"PYTHONPATH": str(copy)},
        )  # fmt: skip
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


def command(started, *words) -> dict:
    status, out, err = started("-m", "llmq", *words, "--json")
    assert status == 0, err
    return json.loads(out[-1])


def test_a_method_is_listed_forecast_measured_and_refused(started, tiny_folder):
    (row,) = (row for row in command(started, "models")["methods"] if row["name"] == "coarse")
    assert row == {"name": "coarse", "label": "Coarse", "about": "Weights at a few levels a row. Emulated."}
    (row,) = command(started, "memory", "--model", tiny_folder, "--methods", "coarse@3")["results"]
    assert row["method"] == "coarse@3" and row["weights"] > 0
    where = ("--model", tiny_folder, "--device", "cpu")
    found = command(started, "quality", "--methods", "coarse,coarse@codes=1", "--tokens", 1024, *where)
    fine, rough, _ = found["results"]
    assert (fine["method"], rough["method"]) == ("coarse", "coarse@1") and 0 < fine["kl_to_fp16"] < rough["kl_to_fp16"]
    status, out, err = started("-m", "llmq", "compare", "Hi", "--methods", "coarse@128", *where)
    assert (status, out) == (2, []) and err == "llmq: codes is 128; choose a whole number from 1 to 127\n"


def test_a_lab_has_its_command_its_page_and_its_flags(started, copy, tiny_folder):
    where = ("--model", tiny_folder, "--device", "cpu")
    found = command(started, "experiment", "coarser", "--most", 6, *where, "--html", "out.html")
    assert [row["codes"] for row in found["results"]] == [6, 3] and found["kind"] == "coarser"
    page = (copy / "out.html").read_text(encoding="utf-8")
    assert "Measured with <b>2</b> numbers of codes." in page and '<th scope="col">Codes</th>' in page
    status, out, err = started("-m", "llmq", "experiment", "coarser", "--most", 1, *where)
    assert (status, out) == (2, []) and err == "llmq: most is 1; choose a whole number from 2 to 127\n"
    status, out, _ = started("-m", "llmq", "experiment", "--help")
    assert status == 0 and "coarser" in "\n".join(out)


def test_both_are_on_the_page(started, tiny_folder):
    status, out, err = started("-c", PAGE, tiny_folder)
    assert status == 0, err
    found = json.loads(out[-1])
    assert {"coarser-run", "coarser-most", "coarser-table"} <= set(found["parts"])
    assert found["coarse"] == found["fp16"] > 0
    assert found["asked"] == {
        "windows": 1,
        "text": "english",
        "most": 8,
        "model": "demo",
        "device": None,
        "threshold": 6.0,
    }


def test_both_are_there_for_python(started, tiny_folder):
    status, out, err = started("-c", SESSION, tiny_folder)
    assert status == 0, err
    codes, same, shown = json.loads(out[-1])
    assert (codes, same) == (127, True) and "Measured with 2 numbers of codes." in shown
