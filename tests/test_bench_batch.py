"""The benchmark of batches: what is decoded together, what is predicted to fit, and what its sentences say."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from tiny_runs import light

from llmq import formulas, memory, telemetry
from llmq.bench import generate
from llmq.bench.batch import BatchBench, BatchSide, findings, stretches
from llmq.cli import main
from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.machine.door import Machine
from llmq.models.opening import open_model

METHODS = tuple(Contestant.parse(name) for name in ("fp16", "llm-int8"))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with light():
        yield


def asked(folder, **more) -> BatchBench:
    sizes = {"prompt_tokens": 5, "new_tokens": 3, "repeats": 2, "batches": "1,3"}
    return BatchBench(**{"model": str(folder), "contestants": METHODS} | sizes | more)


def answer(bench: BatchBench) -> dict:
    *_, result = Machine().run(bench)
    return result


def test_every_batch_is_decoded_by_everybody(tiny_folder, capsys):
    arguments = ["--model", str(tiny_folder), "--methods", "fp16,bnb-int8,llm-int8", "--device", "cpu", "--json"]
    arguments += ["--batches", "1,3", "--prompt-tokens", "5", "--new-tokens", "4", "--repeats", "2"]
    assert main(["bench", "batch", *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = result["results"]
    methods = ["fp16", "bnb-int8", "llm-int8"]
    assert [(row["batch"], row["method"]) for row in rows] == [(batch, name) for batch in (1, 3) for name in methods]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * row["row_tokens_per_second"])
        assert not row["error"] and row["peak_bytes"] is None and row["memory_freed"]
        assert all(note.startswith(f"batch {row['batch']}: ") for note in row["notes"])
    assert [row["over_fp16"] for row in rows if row["method"] == "fp16"] == [1.0, 1.0]
    assert rows[3]["predicted_bytes"] - rows[0]["predicted_bytes"] > 2 * formulas.kv_bytes(
        tiny_llama().config, tokens=9
    )
    assert result["conditions"]["batch"] == [1, 3] and len(result["findings"]) == 5


def test_a_turn_decodes_all_prompts_at_once_and_counts_all_their_tokens():
    seconds, seen = iter([1.0, 3.0, 4.0, 5.0]), []

    def decode(prompt, streamer, **_):
        seen.append(prompt.tolist())
        for _ in range(4):
            streamer.put(None)
        return torch.arange(10).view(2, 5)

    side = BatchSide(METHODS[0], None, prompts=[[1, 2], [3, 4]])
    side.home.model = SimpleNamespace(device=torch.device("cpu"), generate=decode)
    bench = asked("demo")
    side.turns = [bench.turn(SimpleNamespace(clock=lambda: next(seconds)), side, SimpleNamespace(prompt_ids=[9]), 1)]
    row = bench.row(side)
    assert seen == [[[1, 2], [3, 4]]]
    assert (row["tokens_per_second"], row["row_tokens_per_second"], row["prefill_seconds"]) == (2.0, 1.0, 2.0)


def test_what_is_measured_has_the_threshold_it_is_named_by(tiny_folder):
    from llmq.bench.batch import LeanHome
    from llmq.engine.loading import Key

    named = Contestant.parse("llm-int8@3").method
    key = Key.of(open_model(str(tiny_folder)), named, "cpu")
    assert key.method.threshold != 3.0
    home = generate.Home()
    home.load(key, named)
    assert {layer.threshold for layer in home.model.modules() if hasattr(layer, "threshold")} == {3.0}
    lean = LeanHome()
    lean.load(Key.of(key.model, named, "cpu", "lean"), named)
    assert lean.engine.threshold == 3.0


def test_prompts_are_different_stretches_and_begin_again_where_the_text_ends():
    model = SimpleNamespace(tokenize=lambda text: list(range(7)))
    assert stretches(model, 3, 4) == [[0, 1, 2], [3, 4, 5], [6, 0, 1], [2, 3, 4]]


def test_the_largest_batch_fits_and_one_more_does_not(tiny_folder):
    model, method, room = open_model(str(tiny_folder)), METHODS[1].method, 1e6
    largest = memory.largest_batch(model, method, room, tokens=20)
    fits = [memory.predict(model.shape, method, tokens=20, batch=n).total <= room for n in (largest, largest + 1)]
    assert largest > 1 and fits == [True, False]
    assert memory.largest_batch(model, method, 1e3, tokens=20) == 0


def test_what_will_not_fit_is_not_tried_on_a_cpu(tiny_folder, monkeypatch):
    model = open_model(str(tiny_folder))
    free = memory.predict(model.shape, METHODS[1].method, tokens=8, answer=3, batch=3).total * 1.01 / memory.HEADROOM
    monkeypatch.setattr(telemetry, "free_bytes", lambda device: free)
    result = answer(asked(tiny_folder))
    errors = [row["error"] for row in result["results"]]
    assert errors[2].startswith("not tried: it needs about 0.00 GB") and errors[:2] + errors[3:] == ["", "", ""]
    assert result["results"][2]["tokens_per_second"] is None and result["results"][3]["over_fp16"] is None
    assert [row["largest_batch"] for row in result["results"]] == [1, 3, 1, 3]
    assert any(note.startswith("no rounds") for note in result["notes"])
    assert (
        "fp16 (eager): the largest batch that fits alone is 1 by prediction; decoded 1, failed at 3."
        in result["findings"]
    )


def test_whoever_is_alone_is_loaded_once_for_a_batch(tiny_folder, monkeypatch):
    loaded = []
    monkeypatch.setattr(generate, "_loaded", lambda key, method: loaded.append(method.name) or tiny_llama())
    monkeypatch.setattr(BatchBench, "_apart", lambda self, keys: "no rounds: too large")
    result = answer(asked(tiny_folder))
    assert loaded == ["fp16", "llm-int8"] * 2 and not result["conditions"]["rounds"]
    assert result["results"][3]["over_fp16"] > 0 and "over_fp16_min" not in result["results"][3]


def test_a_batch_that_memory_refuses_is_that_batch_s_own(tiny_folder, monkeypatch):
    model = tiny_llama()
    decode = model.generate

    def refuse(prompt, **settings):
        if len(prompt) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
        return decode(prompt, **settings)

    monkeypatch.setattr(model, "generate", refuse)
    monkeypatch.setattr(generate, "_loaded", lambda key, method: model)
    rows = answer(asked(tiny_folder, contestants=METHODS[:1]))["results"]
    assert [row["error"] for row in rows] == ["", "CUDA out of memory."] and rows[0]["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([0.5, 0.9, 1.1], "faster at 4; slower at 1, 2. It overtakes fp16 between batch 2 and 4."),
        ([1.5, 1.1, 0.9], "faster at 1, 2; slower at 4. fp16 overtakes it between batch 2 and 4."),
        ([0.5, 0.6, 1.02], "slower at 1, 2; neither at 4, where the rounds disagree. There is no crossover."),
        ([1.5, None, 1.2], "faster at 1, 4. There is no crossover."),
        ([1.5, 0.9, 1.2], "faster at 1, 4; slower at 2. There is no crossover."),
    ],
)
def test_a_crossover_or_its_absence_is_said(ratios, words):
    rows = [row(name, batch, over) for name in ("fp16", "a") for batch, over in zip((1, 2, 4), ratios, strict=True)]
    assert f"a (eager) against fp16, by batch: {words}" in list(findings(rows))


def test_methods_that_share_no_batch_are_not_compared():
    assert "a (eager) and fp16 decoded no batch both." in list(findings([row("fp16", 1, 1.0), row("a", 2, None)]))


def row(method: str, batch: int, over: float | None) -> dict:
    """Its rounds lie 5 % around their median."""
    ends = {} if over is None else {"over_fp16_min": 0.95 * over, "over_fp16_max": 1.05 * over}
    told = {"method": method, "mode": "eager", "batch": batch, "error": "", "largest_batch": 9}
    return told | {"over_fp16": over} | ends


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batches": "1,0"}, "batches is '1,0'; choose whole numbers"),
        ({"modes": "fast"}, "unknown mode 'fast'"),
        ({"engine": "lean"}, "engine 'lean' decodes several sequences together on a GPU only"),
        ({"engine": "lean", "device": "cuda:0", "modes": "compiled"}, "engine 'lean' has none"),
        ({"engine": ""}, "engine '' is not transformers'"),
    ],
)
def test_a_wrong_setting_is_one_sentence(settings, words):
    with pytest.raises(BadChoice, match=words):
        asked("demo", **settings)
