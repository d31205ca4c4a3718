"""The memory ledger: formulas as they are told against their bytes and a loaded model's; the benchmark of both."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from tiny_runs import key_of, light, run_cli

from llmq import levels
from llmq.bench import tables
from llmq.bench.ledger import BOUNDS, LINES, LedgerBench, finding, unused_file_bytes
from llmq.bench.ledger_tables import ledger_table
from llmq.bench.setup import Side
from llmq.contestant import Contestant
from llmq.engine.loading import Key, load_engine
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice
from llmq.formulas import SYMBOLS, Use, moments, weight_formulas
from llmq.levels import Level, process_of
from llmq.memory import forecast, predict
from llmq.methods import METHODS, parse_method
from llmq.models.config import PlainConfig
from llmq.models.loading import resolve
from llmq.models.opening import Model, describe_model
from llmq.models.presets import PRESETS, Preset, Shape
from llmq.models.skeleton import meta_model

WINDOW, PROMPT = 16, list(range(40))


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


def value(formula) -> float:
    """Of a formula's text, by its symbols alone."""
    return eval(formula.text.replace("·", "*"), {"min": min}, formula.symbols)


@pytest.fixture
def windowed(monkeypatch) -> Model:
    """A tiny shape with random weights whose layers see a window."""
    shape = Shape(32, 64, 2, 4, 2, 259, 128)
    monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", "Tiny", "nobody/tiny", "", "", shape))
    return Model(replace(resolve("tiny", random_weights=True), window=WINDOW))


@pytest.mark.parametrize("method", METHODS)
def test_the_formula_of_weights_is_what_is_predicted(method):
    found = weight_formulas(meta_model(tiny_config()), METHODS[method])
    assert [value(formula) for formula in found] == pytest.approx([formula.bytes for formula in found])
    assert (found[0].bytes, found[1].bytes) == vars_of(METHODS[method])


def vars_of(method) -> tuple[int, int]:
    found = predict(meta_model(tiny_config()), method, tokens=1)
    return found.weights, found.scales


@pytest.mark.parametrize("use", [Use(40), Use(40, 25), Use(40, 25, 3), Use(40, 25, loop="lean", device="cpu")])
@pytest.mark.parametrize("windows", [False, True])
def test_formulas_of_cache_and_activations_give_their_bytes(use, windows, windowed):
    config = windowed.config if windows else tiny_config()
    if windows and use.loop == "lean":
        config = PlainConfig(**tiny_config().to_dict())
    for moment in moments(config, use):
        for formula in moment:
            assert value(formula) == formula.bytes and formula.symbols.keys() <= SYMBOLS.keys()


def test_a_window_keeps_the_whole_prompt_until_the_next_token(windowed):
    """transformers' cache of a window is a view of what was read: as much memory as without one."""
    read, written = (cache.bytes for cache, _ in moments(windowed.config, Use(len(PROMPT) + 3, 3)))
    engine = load_engine(Key.of(windowed, parse_method("fp16"), "cpu"))
    generation = engine.start(PROMPT, SamplingSettings(max_new_tokens=3))
    generation.prefill()
    assert generation.kv_bytes == read == 2 * 2 * 2 * 8 * 2 * len(PROMPT)
    generation.step()
    assert generation.kv_bytes == written == read * WINDOW / len(PROMPT)


def test_an_answer_counts_its_cache_and_not_its_activations():
    shape, method = meta_model(tiny_config()), METHODS["fp16"]
    read, written = (predict(shape, method, tokens=100, answer=answer) for answer in (0, 90))
    assert written.kv == read.kv and written.workspace < read.workspace / 5
    longest, batch = (
        [row[key] for answer in (0, 90) for row in forecast_of(answer)] for key in ("largest_context", "largest_batch")
    )
    assert longest[0] < longest[1] and batch[0] < batch[1]


def forecast_of(answer: int) -> list[dict]:
    fp16 = [Contestant.parse("fp16")]
    return forecast(describe_model("llama-3.1-8b-instruct"), fp16, tokens=100, answer=answer, device_bytes=20e9)[
        "results"
    ]


def test_the_lean_loop_s_bytes_are_those_of_its_generation(tiny_folder):
    """Its cache has the positions that it allocates; another 20 tokens to read need as much more as the formula says,
    which leaves out what does not grow with them: the scratch of the threads."""
    engine = load_engine(key := key_of(tiny_folder, "llm-int8", loop="lean"))
    held, told = [], []
    for prompt in (PROMPT, PROMPT[20:]):
        generation = engine.start(prompt, SamplingSettings(max_new_tokens=8))
        generation.prefill()
        held.append(generation.workspace_bytes)
        asked = {"tokens": len(prompt) + 8, "answer": 8, "loop": "lean", "device": "cpu"}
        told.append(predict(key.model.shape, key.method, **asked))
        assert told[-1].kv == generation.kv_bytes
        generation.close()
    assert told[0].workspace - told[1].workspace == pytest.approx(held[0] - held[1], rel=0.02)


def asked(folder, methods: str = "fp16,llm-int8", **more) -> LedgerBench:
    sizes = {"prompt_tokens": 20, "new_tokens": 4, "device": "cpu"}
    contestants = tuple(Contestant.parse(name) for name in methods.split(","))
    return LedgerBench(**{"model": str(folder), "contestants": contestants} | sizes | more)


@pytest.mark.parametrize(("engine", "methods"), [("hf", ["fp16", "llm-int8"]), ("lean", ["llm-int8"])])
def test_the_lines_are_what_the_process_took(engine, methods, tiny_folder, capsys, tmp_path):
    options = ["--model", tiny_folder, "--methods", ",".join(methods), "--device", "cpu", "--engine", engine]
    options += ["--prompt-tokens", 20, "--new-tokens", 4, "--save", tmp_path / "one.json"]
    status, out, _ = run_cli(capsys, "bench", "memory", *options)
    assert status == 0 and sum("15% is the bound" in line for line in out) == len(methods)
    result = json.loads((tmp_path / "one.json").read_text())
    assert [row["method"] for row in result["results"]] == methods
    for row in result["results"]:
        assert sum(row[key] or 0 for key in LINES) == row["process_bytes"] and row["memory_freed"]
        assert row["weight_bytes"] == pytest.approx(row["predicted_weight_bytes"], rel=0.02)
        assert abs(row["weights_kv_error"]) < BOUNDS["weights_kv_error"] and row["engine"] == engine
        assert 0 < row["activation_bytes"]
    told = result["conditions"]
    assert (result["kind"], told["counted"], told["repeats"], told["window"]) == ("memory", levels.RESIDENT, 1, 0)


def test_figures_of_a_gpu_are_split_into_lines():
    bench, side = asked("demo", "fp16", device="cuda:0"), Side(Contestant.parse("fp16"), None)
    side.known = {"predicted_weight_bytes": 1000, "predicted_kv_bytes": 100, "predicted_bytes": 1150}
    turn = {"process_bytes": 1400, "weight_bytes": 1010, "kv_bytes": 90, "activation_bytes": 40, "library_bytes": 32}
    side.turns = [turn | {"reserved_bytes": 1300, "memory_freed": True}]
    row = bench.row(side)
    assert (row["slack_bytes"], row["unexplained_bytes"]) == (128, 100)
    assert row["weights_kv_error"] == 0 and row["error"] == pytest.approx(1150 / 1400 - 1)
    told = finding(row | side.known | {"method": "fp16", "engine": "hf"})
    assert "1.01 kB weights and scales" in told and "in all -17.9 % (15% is the bound)" in told


@pytest.mark.parametrize(
    ("figures", "found"),
    [
        ({"device_process_bytes": 7, "device_bytes": 9}, (7, levels.NVML_PROCESS)),
        ({"device_process_bytes": None, "device_bytes": 9}, (9, levels.NVML_DEVICE)),
        ({}, (5, levels.RESERVED)),
    ],
)
def test_a_gpu_is_counted_by_the_best_that_tells(figures, found):
    assert process_of({"process_bytes": 1} | figures, "cuda:0", reserved=5) == found
    assert process_of({"process_bytes": 1} | figures, "cpu") == (1, levels.RESIDENT)


def test_pages_of_a_file_that_no_weight_lies_in_are_told_apart(tiny_folder, monkeypatch):
    engine = load_engine(key_of(tiny_folder, "fp16"))
    inside = engine.model.lm_head.weight
    place = range(inside.data_ptr(), inside.data_ptr() + 1)
    monkeypatch.setattr("llmq.bench.ledger.mapped_files", lambda ending: [(place, inside.nbytes + 500)])
    assert unused_file_bytes(engine) == 500


def test_memory_that_is_let_go_leaves_the_highest_level():
    def call() -> None:
        one = torch.empty(1000, dtype=torch.uint8)
        del one
        torch.empty(600, dtype=torch.uint8)

    assert levels.highest_level(call) == 1000
    assert Level.of("cpu").process > 1e6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 8}, "window is 8; give it with --random-weights"),
        ({"window": -1, "random_weights": True}, "window is -1; choose a whole number of at least 0"),
    ],
)
def test_a_wrong_window_is_one_sentence(settings, words):
    with pytest.raises(BadChoice, match=words):
        asked("demo", **settings)


@pytest.mark.parametrize("answer", [-1, 9])
def test_an_answer_longer_than_the_context_is_refused(answer, tiny_folder, capsys):
    status, _, errors = run_cli(capsys, "memory", "--model", tiny_folder, "--context", 9, "--new-tokens", answer)
    assert status == 2 and errors == [
        f"llmq: the answer is {answer} of 9 tokens; choose at least 0, and fewer than the context has"
    ]


def test_the_command_tells_each_formula_with_its_numbers(tiny_folder, capsys):
    asked = ["--model", tiny_folder, "--methods", "fp16,bnb-int8", "--context", 30, "--device-memory", "1MB"]
    status, out, _ = run_cli(capsys, "memory", *asked)
    assert status == 0 and any("tokens do, or a batch of " in line for line in out)
    assert "  KV cache = 2·B·L·n·G·d·p with B = 1, L = 2, n = 30, G = 2, d = 8, p = 2" in out
    assert any("(bnb-int8)" in line for line in out) and "B: sequences at once" in out[-1] and "w: " not in out[-1]
    assert " kB " in out[2] and "0.00" not in out[2], "what is small has a unit that shows it"


def test_the_table_has_predicted_beside_measured():
    sizes = {"predicted_weight_bytes": 1000, "weight_bytes": 1010, "predicted_kv_bytes": 100, "kv_bytes": 90}
    sizes |= {"predicted_activation_bytes": 50, "activation_bytes": 40, "predicted_bytes": 1150, "process_bytes": 1400}
    sizes |= {"library_bytes": None, "slack_bytes": 128, "unexplained_bytes": 132, "base_bytes": 5000, "file_bytes": 70}
    row = {"method": "fp16", "engine": "hf", "weights_kv_error": 0.0, "error": -0.179} | sizes
    conditions = {"device_name": "Abacus", "random_weights": True, "prompt_tokens": 64, "new_tokens": 8, "repeats": 1}
    conditions |= {"window": 32, "counted": levels.RESIDENT, "date": "2026-11-26T09:30", "commit": "0123456789ab"}
    conditions |= {"versions": {"torch": "2.1", "transformers": "5.1", "bitsandbytes": "0.5"}}
    _, _, line, _, caption = ledger_table({"model": "m", "conditions": conditions, "results": [row]}).splitlines()
    assert line == (
        "| m (random weights), a window of 32 tokens | `fp16` | hf | 1.00 kB / 1.01 kB | 100 B / 90 B | 50 B / 40 B "
        "| – | 128 B | 132 B | 1.15 kB / 1.40 kB | +0.0 % | -17.9 % |"
    )
    said = f"Abacus, 64 prompt tokens, 8 new tokens, 1 counted round; in all by {levels.RESIDENT};"
    assert f"{said} 5.00 kB of it was there before, less up to 70 B of a mapped file that no weight lies in" in caption


STORED = [path for path in sorted(tables.RESULTS.glob("*-memory*.json"))]


@pytest.mark.parametrize("file", STORED, ids=[path.stem for path in STORED])
def test_stored_predictions_are_within_the_bounds(file: Path):
    result = json.loads(file.read_text())
    for row in result["results"]:
        for key, bound in BOUNDS.items():
            assert abs(row[key]) < bound, (file.stem, row["method"], key)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_s_lines_are_what_its_driver_counts(demo, tmp_path):
    """In a process of its own: this one has memory that other tests made it take."""
    asked = "--device cuda:0 --methods fp16,llm-int8 --prompt-tokens 64 --new-tokens 16 --save".split()
    command = [sys.executable, "-m", "llmq", "bench", "memory", *asked, str(tmp_path / "found.json")]
    subprocess.run(command, check=True)
    for row in json.loads((tmp_path / "found.json").read_text())["results"]:
        assert abs(row["weights_kv_error"]) < BOUNDS["weights_kv_error"]
        assert sum(row[key] or 0 for key in LINES) == row["process_bytes"] > row["weight_bytes"]
        assert row["library_bytes"] >= 0 and row["slack_bytes"] >= 0
