"""The benchmark of transformers' own `generate`: its keys on the tiny LLaMA, its ratios from known times."""

from __future__ import annotations

import json
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama

from llmq.bench import generate
from llmq.bench.generate import GenerateBench, ModeSide
from llmq.cli import main
from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.machine.door import Machine


def test_everybody_decodes_in_every_mode_it_has(tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr(generate, "CPU_COMPILER", {"backend": "eager", "mode": "default", "fullgraph": True})
    torch.compiler.reset()
    arguments = ["--model", str(tiny_folder), "--methods", "fp16,llm-int8@1,bnb-int8", "--device", "cpu"]
    arguments += ["--prompt-tokens", "5", "--new-tokens", "6", "--repeats", "2", "--json"]
    assert main(["bench", "transformers", *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["method"], row["mode"]): row for row in result["results"]}
    both = [(name, mode) for name in ("fp16", "llm-int8@1") for mode in ("eager", "compiled")]
    assert list(rows) == [*both, ("bnb-int8", "eager")]  # transformers compiles no bitsandbytes model
    assert all(not row["error"] and row["tokens_per_second"] > 0 for row in rows.values())
    assert all(row["graph_breaks"] == 0 and row["tokens_as_eager"] == 6 for row in rows.values())
    assert rows["fp16", "compiled"]["over_fp16"] == rows["bnb-int8", "eager"]["over_bnb"] == 1.0
    assert rows["llm-int8@1", "eager"]["weight_bytes"] < rows["fp16", "eager"]["weight_bytes"]
    assert result["kind"] == "transformers" and result["conditions"]["new_tokens"] == 6


def side(label: str, mode: str, speeds: list[float], **facts) -> ModeSide:
    turns = [{"speed": speed, "prefill": 1.0} for speed in speeds]
    return ModeSide(Contestant.parse(label), None, turns=turns, mode=mode, **facts)


def test_ratios_are_within_a_round():
    sides = [
        side("fp16", "compiled", [1.0, 10.0, 4.0], tokens=[1, 2, 3]),
        side("llm-int8", "compiled", [2.0, 30.0, 4.0], tokens=[1, 2, 4]),
        side("llm-int8", "eager", [2.0, 5.0, 1.0], tokens=[1, 7, 4]),
        side("bnb-int8", "eager", [0.5, 1.0, 2.0]),
        side("bf16", "compiled", [], error="out of memory"),
    ]
    bench = bench_of(5)
    rows = [bench.row(one) | bench.beside(one, sides, SimpleNamespace(apart="")) for one in sides]
    assert [row["over_fp16"] for row in rows] == [1.0, 2.0, None, None, None]
    assert [row["over_bnb"] for row in rows] == [2.0, 4.0, 4.0, 1.0, None]
    assert rows[1]["over_fp16_min"] == 1.0 and rows[1]["over_fp16_max"] == 3.0
    assert [row["tokens_as_eager"] for row in rows] == [None, 1, 3, 0, None]
    assert [row["tokens_per_second"] for row in rows] == [4.0, 4.0, 2.0, 1.0, None]


def bench_of(new_tokens: int) -> GenerateBench:
    return GenerateBench(contestants=(Contestant.parse("fp16"),), new_tokens=new_tokens)


def turn_of(generate, new_tokens: int, number: int, clock=lambda: 0.0) -> tuple[ModeSide, dict]:
    """One turn of a model with this `generate`: the side afterwards, and the figures."""
    one = side("fp16", "compiled", [])
    one.home.model, one.known = SimpleNamespace(device=torch.device("cpu"), generate=generate), {"weight_bytes": 10}
    setup = SimpleNamespace(prompt_ids=[1, 2])
    return one, bench_of(new_tokens).turn(SimpleNamespace(clock=clock), one, setup, number)


def test_a_failure_is_one_contestants_own():
    def fail(*_, **__):
        raise RuntimeError("the compiler\ngave up")

    one, figures = turn_of(fail, 4, 0)
    assert one.error == "the compiler" and figures == {}
    row = bench_of(4).row(one)
    assert row["tokens_per_second"] is None and row["peak_bytes"] is None and row["error"] == "the compiler"


def test_tokens_are_timed_as_they_arrive():
    seconds = iter([1.0, 3.0, 4.0, 5.0])

    def generate(prompt, streamer, **_):
        for _ in range(4):
            streamer.put(None)
        return torch.arange(5)[None]

    one, figures = turn_of(generate, 3, 1, lambda: next(seconds))
    assert (figures, one.tokens) == ({"prefill": 2.0, "speed": 2 / 2.0}, [2, 3, 4])


def test_models_that_do_not_fit_together_are_loaded_one_after_the_other(tiny_folder, monkeypatch):
    alive = []

    def load(key, method):
        alive.append(weakref.ref(model := tiny_llama()))
        assert sum(one() is not None for one in alive) == 1, "the one before is gone"
        return model

    monkeypatch.setattr(generate, "_loaded", load)
    monkeypatch.setattr(GenerateBench, "_apart", lambda self, keys: "no rounds: too large")
    contestants = tuple(Contestant.parse(name) for name in ("fp16", "bf16"))
    asked = GenerateBench(model=str(tiny_folder), contestants=contestants, modes="eager", prompt_tokens=5, new_tokens=3)
    *_, result = Machine().run(asked)
    assert len(alive) == 2 and "no rounds: too large" in result["notes"] and not result["conditions"]["rounds"]
    assert "over_fp16_min" not in result["results"][1] and result["results"][1]["over_fp16"] > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modes": "eager,fast"}, "unknown mode 'fast'; choose from eager, compiled"),
        ({"engine": "lean"}, "engine 'lean' is not transformers' generate"),
        ({"new_tokens": 1}, "new_tokens is 1"),
        ({"contestants": "llm-int8@outliers=row"}, "row is not measured: here llm-int8 is the drop-in"),
        ({"contestants": "fp16,llm-int8@4:keep=0"}, "keep=0 is not measured: .* only the threshold can be set"),
    ],
)
def test_a_wrong_setting_is_one_sentence(settings, words):
    contestants = Contestant.parse_all(settings.get("contestants", "fp16"))
    with pytest.raises(BadChoice, match=words):
        GenerateBench(**settings | {"contestants": contestants})
