"""Which layer hurts: KL and SQNR once more in float64, the model afterwards, the bytes, and the recipe as measured."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, tiny_config, tiny_llama
from planted import hooks_left, seen_ones
from tiny_runs import light, run_cli
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from llmq.contestant import Contestant
from llmq.errors import BadChoice
from llmq.events import Progress
from llmq.figures.sensitivity import WHOLE, sensitivity_figure
from llmq.inspect.sensitivity import PartByPart, divergence
from llmq.labs import load_answer, save_answer
from llmq.labs.rows import RowAnswer
from llmq.labs.sensitivity import WORST, Sensitivity, greedy
from llmq.machine.door import Machine
from llmq.methods import METHODS, parse_method
from llmq.methods.llm_int8 import LlmInt8
from llmq.methods.swap import linear_layers
from llmq.models.loading import load_model, resolve
from llmq.models.opening import open_model
from llmq.models.reference_text import windows
from llmq.models.skeleton import meta_model

IDS = [list(range(40, 90)), list(range(150, 200))]


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaMA of four layers that matter."""
    folder = tmp_path_factory.mktemp("four-layers")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(initializer_range=0.2, num_hidden_layers=4)).half().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def loud_llama(**changes) -> LlamaForCausalLM:
    return tiny_llama(initializer_range=0.2, num_hidden_layers=4, **changes)


def taken_apart(method: str, model=None, statistics=lambda name: None) -> PartByPart:
    apart = PartByPart(model or loud_llama(), parse_method(method), statistics, "cpu")
    for ids in IDS:
        apart.read(ids)
    return apart


def measured(apart: PartByPart, name: str) -> dict:
    [part] = (part for part in [*apart.modules, *apart.layers] if part.name == name)
    *_, last = apart.measure(part)
    return last


class AbsmaxInDouble(nn.Module):
    """Naive 8 bit by its definition: one scale a tensor, round to nearest, in float64. Keeps what it saw."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight, self.seen = nn.Parameter(weight.double(), requires_grad=False), []

    def forward(self, x):
        sx, sw = x.abs().max(), self.weight.abs().max()
        y = torch.round(127 * x / sx) @ torch.round(127 * self.weight / sw).T * sx * sw / 127**2
        self.seen.append((x @ self.weight.T, y))
        return y


def kl_in_double(model, other) -> float:
    """Mean KL(model || other) over all tokens but the first of each window."""
    found = []
    for ids in IDS:
        p, q = (m(torch.tensor([ids])).logits[0, :-1].double().numpy() for m in (model, other))
        p, q = (x - x.max(1, keepdims=True) for x in (p, q))
        p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
        found.append((np.exp(p) * (p - q)).sum(1))
    return float(np.concatenate(found).mean())


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"])
def test_one_module_alone_is_the_definition_in_float64(name):
    found = measured(taken_apart("absmax"), name)
    model, other = loud_llama().double(), loud_llama().double()
    parent, _, child = name.rpartition(".")
    alone = AbsmaxInDouble(other.get_submodule(name).weight.data)
    setattr(other.get_submodule(parent), child, alone)
    assert found["kl_to_fp16"] == pytest.approx(kl_in_double(model, other), rel=0.02)
    signal = sum(float(y.square().sum()) for y, _ in alone.seen)
    noise = sum(float((y - made).square().sum()) for y, made in alone.seen)
    assert found["sqnr_db"] == pytest.approx(10 * math.log10(signal / noise), abs=0.05)
    assert 15 < found["sqnr_db"] < 60 and found["kl_to_fp16"] > 1e-6


def test_one_layer_alone_is_its_modules_in_float64():
    apart = taken_apart("absmax")
    found = measured(apart, "model.layers.1")
    model, other = loud_llama().double(), loud_llama().double()
    for name, layer in list(linear_layers(other)):
        if name.startswith("model.layers.1."):
            parent, _, child = name.rpartition(".")
            setattr(other.get_submodule(parent), child, AbsmaxInDouble(layer.weight.data))
    assert found["kl_to_fp16"] == pytest.approx(kl_in_double(model, other), rel=0.02)
    ends = ([], [])
    for side, seen in zip((model, other), ends, strict=True):
        block = side.model.layers[1]
        handle = block.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y[0] if len(y) > 1 else y))
        [side(torch.tensor([ids])) for ids in IDS]
        handle.remove()
    truth, own = (torch.cat([y.reshape(-1, 32) for y in seen]) for seen in ends)
    sqnr = 10 * math.log10(float(truth.square().sum() / (own - truth).square().sum()))
    assert found["sqnr_db"] == pytest.approx(sqnr, abs=0.05)
    assert [part.name for part in apart.layers] == [f"model.layers.{i}" for i in range(4)]
    assert len(apart.modules) == 28 and len(apart.layers[1].modules) == 7


def state(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


@dataclass(frozen=True)
class Careless(LlmInt8):
    """Writes into what it is given."""

    def quantize(self, linear, statistics=None):
        linear.weight.data.zero_()
        return linear


@pytest.mark.parametrize("method", [parse_method("llm-int8"), parse_method("absmax"), Careless()])
@pytest.mark.parametrize("stop", [False, True])
def test_the_model_is_afterwards_what_it_was_bit_for_bit(method, stop):
    model = loud_llama()
    before, modules, truth = state(model), dict(model.named_modules()), model(torch.tensor([IDS[0]])).logits
    apart = PartByPart(model, method, lambda name: None, "cpu")
    for ids in IDS:
        apart.read(ids)
    for part in [*apart.layers[1:3], *apart.modules[:9]]:
        reading = apart.measure(part)
        first = next(reading)
        if stop:
            assert type(model.get_submodule(part.modules[0])).__name__ == "Probe"
            reading.close()
        else:
            list(reading)
        assert first["kl_to_fp16"] > 0
    after = dict(model.named_modules())
    assert after.keys() == modules.keys() and all(after[name] is modules[name] for name in modules)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(torch.tensor([IDS[0]])).logits, truth) and hooks_left(model) == 0


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.dense])
def test_the_bytes_of_the_parts_are_the_methods_own(name):
    model, method = loud_llama(), METHODS[name]
    statistics = {layer: seen_ones(method, module) for layer, module in linear_layers(model) if method.calibrated}
    apart = PartByPart(model, method, statistics.get, "cpu")
    shape = meta_model(model.config)
    dense = next(other for other in METHODS.values() if other.dense and other.dtype == method.dtype)
    saved = sum(map(apart.bytes_saved, apart.modules))
    assert saved == sum(map(apart.bytes_saved, apart.layers))
    plain = method if not method.int8_head else METHODS["llm-int8"]  # embedding and head are no part
    totals = [sum(vars(one.predict(shape)).values()) for one in (dense, plain)]
    assert saved == totals[0] - totals[1]


def test_a_model_of_another_family_is_read_whole():
    """GPT-2's layers are Conv1D, and its stack cannot be entered half-way."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=259, n_positions=128, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval()
    before = state(model)
    apart = taken_apart("absmax", model)
    assert {part.name.rpartition(".")[2] for part in apart.modules} == {"c_attn", "c_proj", "c_fc"}
    last = measured(apart, "transformer.h.2.mlp.c_proj")
    assert last["kl_to_fp16"] > 0 and last["sqnr_db"] > 10
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@dataclass(frozen=True)
class NotANumber(LlmInt8):
    def quantize(self, linear, statistics=None):
        linear.weight.data[0] = math.nan
        return linear


def test_what_is_no_number_is_infinitely_far_and_all_noise():
    apart = PartByPart(loud_llama(), NotANumber(), lambda name: None, "cpu")
    apart.read(IDS[0])
    assert measured(apart, "model.layers.2.mlp.up_proj") == {"kl_to_fp16": math.inf, "sqnr_db": -math.inf}
    logits = torch.randn(50, 259)
    assert divergence(logits, logits, IDS[0]) == 0
    assert divergence(logits.fill_(math.nan), torch.randn(50, 259), IDS[0]) == math.inf


def test_a_model_without_linear_layers_and_a_method_without_quantization_are_refused(folder, capsys):
    class Bare(nn.Module):
        get_output_embeddings = get_input_embeddings = lambda self: None

    with pytest.raises(BadChoice, match="no linear layer to replace"):
        PartByPart(Bare(), METHODS["llm-int8"], lambda name: None, "cpu")
    for words, said in {
        ("--method", "fp16"): "llmq: fp16 quantizes no layer; choose from awq, bnb-int8",
        ("--method", "int7"): "llmq: unknown method 'int7'; choose from fp16",
        ("--room", "0"): "llmq: room for the recipe is 0.0; choose a number from 0.1 to 100",
        ("--method", "llm-int8@keep=9"): "llmq: keep names '9', and llm-int8 quantizes nothing there",
    }.items():
        status, out, err = run_cli(capsys, "experiment", "sensitivity", "--model", folder, "--device", "cpu", *words)
        assert (status, out) == (2, []) and err[-1].startswith(said)


def answered(lab: Sensitivity, stop=None) -> list:
    return list(Machine().run(lab, stop or threading.Event()))


@pytest.fixture(scope="module")
def answer(folder) -> RowAnswer:
    events = answered(Sensitivity(model=folder, windows=2, room=15.0))
    shares = [event.fraction for event in events if isinstance(event, Progress)]
    assert shares == sorted(shares) and 0 <= shares[0] and shares[-1] < 1
    assert sum("alone: window" in event.message for event in events if isinstance(event, Progress)) == 2 * (4 + 28)
    return events[-1]


def test_layers_come_first_then_modules_then_what_they_are_together(answer):
    rows = answer.rows
    assert [row["part"] for row in rows] == ["layer"] * 4 + ["module"] * 28 + ["method", "recipe"]
    harm = {row["layer"]: row["kl_to_fp16"] for row in rows[:4]}
    worst_first = sorted(harm, key=lambda layer: -harm[layer])
    assert [row["layer"] for row in rows[4:32:7]] == worst_first
    table = answer.lab.shown(rows)
    assert [row["part"] for row in table] == ["method", "recipe"] + ["layer"] * 4 + ["module"] * WORST["module"]
    assert [row["layer"] for row in table[2:6]] == worst_first
    modules = sorted((row["kl_to_fp16"] for row in rows[4:32]), reverse=True)
    assert [row["kl_to_fp16"] for row in table[6:]] == modules[: WORST["module"]]


def test_the_recipe_is_what_the_named_method_measures(answer, folder):
    """Loaded under the recipe's own name by transformers, against the dense model in FP32."""
    whole, recipe = answer.rows[-2:]
    model, ids = open_model(folder), windows(open_model(folder), 2)
    dense = load_model(resolve(folder), METHODS["fp32"], "cpu")
    kls = []
    for row in (whole, recipe):
        method = parse_method(row["place"])
        other = load_model(resolve(folder), method, "cpu")
        pairs = [[m(torch.tensor([one])).logits[0].float() for m in (other, dense)] for one in ids]
        kls.append(sum(divergence(*logits, one) for logits, one in zip(pairs, ids, strict=True)) / 2)
        assert row["kl_to_fp16"] == pytest.approx(kls[-1], rel=0.2)  # our loop keeps activations in FP32
        assert row["memory_bytes"] == sum(vars(method.predict(model.shape)).values())
        assert row["engine"] == "lean"
    assert kls[1] < kls[0] and recipe["sum_of_parts"] < whole["sum_of_parts"]
    assert whole["memory_bytes"] < recipe["memory_bytes"] <= 1.15 * whole["memory_bytes"]
    assert recipe["memory_bytes"] - whole["memory_bytes"] == whole["bytes_saved"] - recipe["bytes_saved"]
    method = parse_method(recipe["place"])
    assert set(recipe["skip_modules"]) == method.kept(name for name, _ in linear_layers(dense)) | {"lm_head"}


def test_by_layers_alone_the_recipe_keeps_whole_layers(folder):
    last = answered(Sensitivity(model=folder, by="layers", room=40.0))[-1]
    *layers, whole, recipe = last.rows
    assert [row["part"] for row in layers] == ["layer"] * 4 and whole["bytes_saved"] == 4 * layers[0]["bytes_saved"]
    kept = {part.split(".")[2] for part in recipe["skip_modules"][:-1]}
    assert kept == {row["place"] for row in greedy(layers, 0.4 * whole["memory_bytes"])} and 0 < len(kept) < 4
    assert len(recipe["skip_modules"]) == 7 * len(kept) + 1 and recipe["engine"] == "lean"
    worst = max(layers, key=lambda row: row["kl_to_fp16"])
    assert last.lab.finding(last.rows).startswith(f"Of 4 layers, layer {worst['place']} hurts most")


def row(layer: int, module: str, kl: float, size: int) -> dict:
    return {"part": "module", "layer": layer, "module": module, "name": f"{layer}.{module}", "kl_to_fp16": kl,
            "place": f"{layer}.{module}", "bytes_saved": size}  # fmt: skip


def test_the_recipe_takes_what_costs_most_for_a_byte_and_joined_modules_together():
    down, q, k, v, o = (
        row(0, "down_proj", 6.0, 60), row(0, "q_proj", 8.0, 20), row(0, "k_proj", 1.0, 10), row(0, "v_proj", 1.0, 10),
        row(1, "o_proj", 0.9, 3),
    )  # fmt: skip
    rows = [down, q, k, v, o]
    assert greedy(rows, 43) == [o, q, k, v] and greedy(rows, 42) == [o]  # 40 bytes at 0.25 after 3 at 0.3
    assert greedy(rows, 43, joined=False) == [q, o, k, v] and greedy(rows, 27, joined=False) == [q, o]
    assert greedy(rows, 63) == [o, q, k, v] and greedy(rows, 2) == [] and greedy(rows, 1000) == []
    assert greedy([{**one, "bytes_saved": 0} for one in rows], 50) == []
    assert greedy([row(0, "o_proj", math.inf, 10), down], 60) == [row(0, "o_proj", math.inf, 10)]


def test_the_answer_says_it_in_a_sentence_and_is_there_to_copy(answer, tmp_path):
    recipe = answer.rows[-1]
    said, *_, copied = answer.blocks()
    worst = max(answer.rows[4:32], key=lambda one: one["kl_to_fp16"])
    assert said.startswith(f"Of 28 modules, {worst['place']} hurts most: quantized alone it costs KL ")
    assert f"{recipe['kl_to_fp16']:.3g}" in said and f"{recipe['sum_of_parts']:.3g}" in said and said.count(". ") == 1
    spelled, listed = copied.split("\nllm_int8_skip_modules=")
    assert spelled == recipe["place"] and json.loads(listed.replace("'", '"')) == recipe["skip_modules"]
    save_answer(answer, tmp_path / "answer.json")
    again = load_answer(tmp_path / "answer.json")
    assert again.rows == answer.rows and list(again.blocks())[0] == said


@pytest.mark.parametrize("after", [1, 4, 11])
def test_a_stop_half_way_keeps_the_rows_and_promises_no_recipe(folder, after):
    """Two windows a part, and a stop after any of them."""
    machine, stop, read = Machine(), threading.Event(), 0
    for event in machine.run(Sensitivity(model=folder, windows=2), stop):
        read += isinstance(event, Progress) and "alone" in event.message
        if read == after:
            stop.set()
    assert event.done and event.result["stopped"] and len(event.rows) == after // 2
    assert {found["part"] for found in event.rows} <= {"layer", "module"}
    assert len(list(event.blocks())) >= 2 and event.lab.takeaway(event.rows) == ""
    assert not list(machine.pool), "the dense model was nobody's before, and is gone"


def test_the_figure_has_a_cell_for_every_part_and_marks_the_recipe(answer):
    [drawing] = answer.lab.figures(answer.rows)
    heatmap, marks = drawing.make().data
    assert list(heatmap.y)[0] == WHOLE and len(heatmap.y) == 8 and list(heatmap.x) == [0, 1, 2, 3]
    cells = {
        (layer, module): heatmap.z[i][j] for i, module in enumerate(heatmap.y) for j, layer in enumerate(heatmap.x)
    }
    for one in answer.rows[:32]:
        name = WHOLE if one["part"] == "layer" else one["module"]
        level = max(math.log10(one["kl_to_fp16"]), heatmap.zmin)
        assert cells[one["layer"], name] == pytest.approx(level)
    assert len(marks.x) == len(answer.rows[-1]["skip_modules"]) - 1
    odd = [row(0, "o_proj", math.inf, 3), row(1, "o_proj", 0.0, 3), row(1, "q_proj", 0.5, 3)]
    heatmap, marks = sensitivity_figure(odd).data
    assert [list(line) for line in heatmap.z] == [[heatmap.zmax, heatmap.zmin], [None, pytest.approx(math.log10(0.5))]]
    assert len(marks.x) == 0 and "beyond measure" in heatmap.text[0][0]


def test_rows_that_are_no_numbers_are_shown_all_the_same():
    rows = [row(0, "o_proj", math.inf, 3), row(1, "o_proj", 0.1, 3)]
    answer = RowAnswer(Sensitivity, {"kind": "sensitivity", "model": "x", "results": rows})
    said, *_, table = answer.blocks()
    assert "0.o_proj hurts most" in said and table.rows[0][0] == "0.o_proj"


@pytest.mark.parametrize("method", ["gptq@bits=4:group=16", "smoothquant", "absmax-w32a8"])
def test_calibrated_and_naive_methods_are_taken_apart_too(folder, method, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path))
    last = answered(Sensitivity(model=folder, contestant=Contestant.parse(method), room=30.0))[-1]
    parts = [found["part"] for found in last.rows]
    saves = last.rows[0]["bytes_saved"] > 0
    assert parts == ["layer"] * 4 + ["module"] * 28 + ["method"] + ["recipe"] * saves
    assert all(found["kl_to_fp16"] > 0 for found in last.rows)
    assert all(found["sqnr_db"] > 5 for found in last.rows[:32])
