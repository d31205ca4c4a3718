"""A sweep: its cells and their files, what ends it, what it goes on with, and what it comes to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmq.errors import BadChoice, UserError
from llmq.events import Progress
from llmq.sweeps import places
from llmq.sweeps.grid import Cell, Grid, lists, models_in
from llmq.sweeps.places import Ended, Processes, Ray
from llmq.sweeps.run import sweep
from llmq.sweeps.table import SweepAnswer

ROOT = Path(__file__).parents[1]
MODELS, METHODS = ("demo", "llama-2-7b"), ("llm-int8", "nf4")


def quality(model: str, method: str) -> str:
    """What the quality lab would say."""
    rows = [
        {"method": name, "perplexity": 9.0, "perplexity_change": 0.01, "perplexity_change_interval": [0.0, 0.02],
         "kl_to_fp16": kl, "top1_agreement": 0.98}
        for name, kl in (("fp16", 0.0), (method, len(model) / 100))
    ]  # fmt: skip
    return json.dumps({"conditions": {"date": "2026-01-01"}, "results": rows})


@pytest.fixture
def stand_in(monkeypatch):
    """Cells that are answered at once; `refused` names models that are not here."""
    asked, refused = [], set()

    def answered(arguments: list[str], started=None) -> Ended:
        asked.append(arguments)
        model, methods = arguments[arguments.index("--model") + 1], arguments[arguments.index("--methods") + 1]
        return Ended(reason="no such model") if model in refused else Ended(quality(model, methods.split(",")[-1]))

    monkeypatch.setattr(places, "answer_of", answered)
    return asked, refused


def run_whole(folder: Path, grid: Grid, **more) -> tuple[list[str], SweepAnswer]:
    *told, answer = sweep(grid, folder, ["cpu"], **more)
    assert all(isinstance(item, Progress) for item in told)
    return [item.message for item in told], answer


def test_every_cell_is_asked_once_and_kept(tmp_path, stand_in):
    asked, _ = stand_in
    told, answer = run_whole(tmp_path, Grid("quality", MODELS, METHODS, 1024))
    assert len(asked) == 4 and len(told) == 5 and told[0] == "0 of 4 cells are there"
    assert asked[0] == "quality --model demo --methods fp16,llm-int8 --tokens 1024 --no-floor --device cpu".split()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "quality-demo-llm-int8.json", "quality-demo-nf4.json", "quality-llama-2-7b-llm-int8.json",
        "quality-llama-2-7b-nf4.json", "sweep.json",
    ]  # fmt: skip
    assert [(row["model"], row["method"]) for row in answer.rows] == [(m, n) for m in MODELS for n in METHODS]
    assert answer.rows[0]["parameters"] == 134_515_008
    told, again = run_whole(tmp_path, Grid("quality", MODELS, METHODS, 1024))
    assert len(asked) == 4 and told == ["4 of 4 cells are there"] and again == answer


def test_a_wider_sweep_asks_for_what_is_new(tmp_path, stand_in):
    asked, _ = stand_in
    run_whole(tmp_path, Grid("quality", MODELS[:1], METHODS, 1024))
    _, answer = run_whole(tmp_path, Grid("quality", MODELS, (*METHODS, "llm-int8@3"), 1024))
    assert len(asked) == 6 and len(answer.rows) == 6


def test_what_fails_is_kept_beside_the_results_and_tried_again_when_asked(tmp_path, stand_in):
    asked, refused = stand_in
    refused.add("llama-2-7b")
    grid = Grid("quality", MODELS, METHODS, 1024)
    told, answer = run_whole(tmp_path, grid)
    assert "llama-2-7b nf4: no such model" in told and len(answer.rows) == 2
    assert answer.result["missing"] == {"llama-2-7b llm-int8": "no such model", "llama-2-7b nf4": "no such model"}
    failure = json.loads((tmp_path / "quality-llama-2-7b-nf4.failed.json").read_text())
    assert failure["reason"] == "no such model" and failure["command"][0] == "quality"
    run_whole(tmp_path, grid)
    assert len(asked) == 4
    refused.clear()
    _, answer = run_whole(tmp_path, grid, again=True)
    assert len(asked) == 6 and len(answer.rows) == 4 and answer.result["missing"] == {}
    assert not list(tmp_path.glob("*.failed.json"))


def test_what_ends_a_sweep_loses_only_what_was_running(tmp_path, stand_in):
    asked, _ = stand_in
    grid = Grid("quality", MODELS, METHODS, 1024)
    items = sweep(grid, tmp_path, ["cpu"])
    for _ in range(3):
        next(items)
    items.close()
    there = len(list(tmp_path.glob("quality-*.json")))
    assert there == 2
    told, answer = run_whole(tmp_path, grid)
    assert told[0] == "2 of 4 cells are there" and len(answer.rows) == 4


def test_a_folder_has_one_sweep(tmp_path, stand_in):
    run_whole(tmp_path, Grid("quality", MODELS, METHODS, 1024))
    for other in (Grid("speed", MODELS, METHODS, 1024), Grid("quality", MODELS, METHODS, 2048)):
        with pytest.raises(UserError, match="holds a sweep of quality with --tokens 1024; ask for the same"):
            list(sweep(other, tmp_path, ["cpu"]))


def test_a_broken_file_is_named(tmp_path, stand_in):
    grid = Grid("quality", MODELS, METHODS, 1024)
    run_whole(tmp_path, grid)
    (tmp_path / "quality-demo-nf4.json").write_text("{")
    with pytest.raises(UserError, match="quality-demo-nf4.json is not JSON .*; delete it, and it is measured anew"):
        list(sweep(grid, tmp_path, ["cpu"]))


def test_cells_have_files_of_their_own():
    names = [Cell("quality", model, "nf4").name for model in ("a/b", "a_b", "a b", "a" * 300, "a" * 301)]
    assert len(set(names)) == 5 and all(len(name) < 140 and "/" not in name for name in names)


def test_what_is_no_sweep_is_refused():
    with pytest.raises(BadChoice, match="unknown sweep 'size'; choose from quality, outliers, speed"):
        Grid("size", MODELS, METHODS, 64)
    with pytest.raises(BadChoice, match="models to sweep: none"):
        Grid("quality", (), METHODS, 64)
    with pytest.raises(BadChoice, match="unknown method 'int9'"):
        Grid("quality", MODELS, ("int9",), 64)


def test_families_stand_for_their_models():
    assert models_in("demo, smollm2,demo") == ("demo", *lists()["smollm2"])
    assert all(len(models) > 2 and len(set(models)) == len(models) for models in lists().values())


def test_outliers_are_of_a_model_alone():
    cells = Grid("outliers", MODELS, METHODS, 64).cells
    assert [cell.title for cell in cells] == list(MODELS)
    assert cells[0].arguments("cuda:1", 64) == "outliers --sweep demo --device cuda:1".split()


def test_speed_is_shown_as_a_ratio_within_one_run(tmp_path, monkeypatch):
    rows = [{"method": name, "tokens_per_second": speed, "weight_bytes": 10**8} for name, speed in
            (("fp16", 50.0), ("llm-int8", 80.0))]  # fmt: skip
    monkeypatch.setattr(places, "answer_of", lambda *_: Ended(json.dumps({"conditions": {}, "results": rows})))
    _, answer = run_whole(tmp_path, Grid("speed", ("demo",), ("llm-int8",), 64))
    assert answer.rows[0]["over_fp16"] == 1.6
    table, figure = list(answer.blocks())[1:3]
    assert table.rows == [["demo", "135 M", "int8 · ours", "80.0 tok/s", "1.60", "100 MB"]]
    assert figure.make().data


def test_each_device_has_one_cell_at_a_time(monkeypatch):
    running, most = [], []

    def slow(arguments, started) -> Ended:
        running.append(arguments[0])
        most.append(len(running))
        time.sleep(0.05)
        running.remove(arguments[0])
        return Ended("{}")

    monkeypatch.setattr(places, "answer_of", slow)
    found = dict(Processes(["cuda:0", "cuda:1"]).run([lambda device: [device]] * 6))
    assert found == {number: Ended("{}") for number in range(6)} and max(most) == 2


def test_why_a_cell_has_no_answer_is_the_last_line_of_it():
    found = places.answer_of(["quality", "--model", "no-such-model", "--methods", "fp16"])
    assert found.answer == "" and found.reason.startswith("llmq: ") and "no-such-model" in found.reason
    killed = places.answer_of(["quality"], lambda process: process.kill())
    assert killed.reason == "ended by signal 9"


def test_a_sweep_that_is_killed_goes_on_where_it_was(tiny_folder, tmp_path):
    """Real cells, of two processes' life times."""
    command = [sys.executable, "-m", "llmq", "sweep", "speed", "--models", str(tiny_folder), "--methods", "bf16,fp32"]
    command += ["--tokens", "4", "--out", str(tmp_path), "--devices", "cpu", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    ends = time.monotonic() + 240
    while not (there := list(tmp_path.glob("speed-*.json"))) and first.poll() is None and time.monotonic() < ends:
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert there, "no cell was measured"
    kept = {path: path.read_text() for path in there}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["method"] for row in result["results"]] == ["bf16", "fp32"] and result["missing"] == {}
    assert all(path.read_text() == text for path, text in kept.items())


def test_without_ray_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="Ray is not installed; install it with"):
        list(Ray("cpu").run([lambda device: []]))
