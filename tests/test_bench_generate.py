"""The benchmark of transformers' own `generate`: its keys on the tiny LLaMA, its ratios from known times."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from llmq.bench import generate
from llmq.bench.generate import GenerateBench, _Arrivals, _rows, _Side
from llmq.cli import main
from llmq.contestant import Contestant
from llmq.errors import BadChoice


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


def side(label: str, mode: str, speeds: list[float], **facts) -> _Side:
    return _Side(label, mode, None, 10, speeds=speeds, prefills=[1.0] * len(speeds), **facts)


def test_ratios_are_within_a_round():
    rows = list(_rows([
        side("fp16", "compiled", [1.0, 10.0, 4.0], tokens=[1, 2, 3]),
        side("llm-int8", "compiled", [2.0, 30.0, 4.0], tokens=[1, 2, 4]),
        side("llm-int8", "eager", [2.0, 5.0, 1.0], tokens=[1, 7, 4]),
        side("bnb-int8", "eager", [0.5, 1.0, 2.0]),
        side("bf16", "compiled", [], error="out of memory"),
    ]))  # fmt: skip
    assert [row["over_fp16"] for row in rows] == [1.0, 2.0, None, None, None]
    assert [row["over_bnb"] for row in rows] == [2.0, 4.0, 4.0, 1.0, None]
    assert [row["tokens_as_eager"] for row in rows] == [None, 1, 3, 0, None]
    assert [row["tokens_per_second"] for row in rows] == [4.0, 4.0, 2.0, 1.0, None]


def test_a_failure_is_one_contestants_own():
    def fail(*_, **__):
        raise RuntimeError("the compiler\ngave up")

    one = _Side("fp16", "compiled", SimpleNamespace(device=torch.device("cpu"), generate=fail), 10)
    one.run([1, 2], 4, first=True)
    assert one.error == "the compiler" and not one.speeds


def test_tokens_are_timed_as_they_arrive():
    seconds = iter([1.0, 3.0, 4.0, 5.0])
    arrivals = _Arrivals(lambda: next(seconds))
    made = torch.arange(5)[None]

    def generate(prompt, streamer, **_):
        for _ in range(4):
            streamer.put(None)
        return made

    one = _Side("fp16", "eager", SimpleNamespace(device=torch.device("cpu"), generate=generate), 10, arrivals.clock)
    one.run([1, 2], 3, first=False)
    assert (one.prefills, one.speeds, one.tokens) == ([2.0], [2 / 2.0], [2, 3, 4])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modes": "eager,fast"}, "unknown mode 'fast'; choose from eager, compiled"),
        ({"engine": "lean"}, "engine 'lean' is not transformers' generate"),
        ({"new_tokens": 1}, "new_tokens is 1"),
    ],
)
def test_a_wrong_setting_is_one_sentence(settings, words):
    with pytest.raises(BadChoice, match=words):
        GenerateBench(contestants=(Contestant.parse("fp16"),), **settings)
