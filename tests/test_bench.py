"""The speed benchmarks on the tiny LLaMA: their keys, their loops, and what they count."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import tiny_config

from llmq.bench.bandwidth import BANDWIDTH_BYTES
from llmq.bench.setup import Bench, fixed_prompt, require_whole
from llmq.bench.speed import PrefillBench
from llmq.cli import main
from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.kernels import backend, reference
from llmq.machine.door import Machine
from llmq.memory import kv_bytes

COMMON = {"method", "engine", "weight_bytes", "memory_freed", "notes"}
KEYS = {
    "decode": COMMON | {"tokens_per_second", "tokens_per_second_min", "tokens_per_second_max", "peak_bytes"}
    | {"wall_tokens_per_second", "bytes_per_token", "bandwidth_fraction", "ready_seconds", "prefill_seconds"},
    "prefill": COMMON | {"seconds", "seconds_min", "seconds_max", "tokens_per_second", "workspace_bytes"},
    "load": COMMON | {"load_seconds", "ready_seconds", "scale_bytes", "peak_load_bytes"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_read(monkeypatch):
    monkeypatch.setitem(BANDWIDTH_BYTES, "cpu", 1 << 20)


@pytest.mark.parametrize("engine", ["hf", "lean"])
@pytest.mark.parametrize("what", KEYS)
def test_a_benchmark_has_its_stable_keys(what, engine, tiny_folder, capsys):
    arguments = ["--model", tiny_folder, "--methods", "fp16,llm-int8", "--device", "cpu", "--engine", engine]
    arguments += ["--prompt-tokens", 5, "--repeats", 2, "--json", *(("--new-tokens", 4) if what == "decode" else ())]
    assert main(["bench", what, *map(str, arguments)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["kind"] == what and result["conditions"]["prompt_tokens"] == 5
    assert [(row["method"], row["engine"]) for row in result["results"]] == [("fp16", engine), ("llm-int8", engine)]
    assert all(row.keys() >= KEYS[what] for row in result["results"])
    if what == "decode":
        read = kv_bytes(tiny_config(), tokens=5 + 2)  # halfway through the new tokens, not the room that was made
        dense, int8 = result["results"]
        embedding = (259 if engine == "hf" else 264) * 32 * 2  # packed in whole eights of rows
        assert dense["bytes_per_token"] == dense["weight_bytes"] - embedding + read
        assert int8["bytes_per_token"] == int8["weight_bytes"] + int8["scale_bytes"] - embedding + read


def test_settings_are_whole_and_large_enough():
    for value in (0, 2.5, "3"):
        with pytest.raises(BadChoice, match="prompt_tokens"):
            Bench(contestants=(Contestant.parse("fp16"),), prompt_tokens=value)
    with pytest.raises(BadChoice, match="new_tokens is 1; .* at least 2"):
        require_whole("new_tokens", 1, 2)


def test_the_prompt_is_as_long_as_asked():
    class Bytes:
        def tokenize(self, text):
            return list(text.encode())

    assert len(fixed_prompt(Bytes(), 77)) == 77


@pytest.mark.parametrize(
    ("capability", "words", "fast"), [((7, 0), "older", None), ((7, 5), "", "decode"), ((9, 0), "", "all")]
)
def test_a_gpu_gets_the_kernels_it_can_run(capability, words, fast, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    kernels, slower = backend.kernels_for("cuda:0")
    assert words in slower and bool(slower) == (fast is None)
    assert (kernels.product is reference.product) == (fast is None)
    assert (kernels.linear_rows is reference.linear_rows) == (fast != "all")
    assert backend.kernels_for("cpu") == (reference, "")


def test_peers_need_llama_cpp_the_demo_model_and_a_cpu(monkeypatch, capsys, tiny_folder):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert main(["bench", "peers", "--device", "cpu"]) == 2
    assert "pip install llama-cpp-python" in capsys.readouterr().err
    assert main(["bench", "peers", "--device", "cpu", "--model", str(tiny_folder)]) == 2
    assert "--model demo" in capsys.readouterr().err


def test_what_speaks_against_figures_stands_below_the_table(monkeypatch, capsys):
    row = {"method": "fp16", "seconds": 1.0, "notes": ["seconds spreads 84%"]}
    result = {"notes": ["other processes on the GPU: 2"], "results": [row]}
    monkeypatch.setattr(PrefillBench, "columns", ("method", "seconds"))
    monkeypatch.setattr(Machine, "run", lambda self, bench: iter([result]))
    assert main(["bench", "prefill", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["other processes on the GPU: 2", "fp16: seconds spreads 84%"]
