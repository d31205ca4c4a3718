"""A method with layers kept in 16 bit: its grammar, what it leaves alone in both loops, its bytes and its skip list."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config, tiny_llama
from test_llama_cpu import built
from test_llama_cuda import PROMPT, ModelTensors, generate
from tiny_runs import light, run_cli
from torch import nn

from llmq.contestant import Contestant
from llmq.engine.choice import choose_engines, why_not_lean
from llmq.engine.hf import HFEngine
from llmq.engine.llama_cuda import CudaLlama
from llmq.engine.llama_weights import load_weights
from llmq.errors import BadChoice
from llmq.hooks import is_quantized, linear_modules
from llmq.kernels import reference
from llmq.kernels.primitives import Int8Weight
from llmq.methods import METHODS, mixed, parse_method
from llmq.methods.coverage import coverage, predicted_coverage
from llmq.methods.mixed import is_at, places, skip_modules
from llmq.methods.swap import linear_layers
from llmq.models.architecture import architecture_of, matrices
from llmq.models.skeleton import meta_model

NAMES = [name for i in range(12) for names in matrices(f"model.layers.{i}.") for name in names]
QUANTIZING = [name for name, method in METHODS.items() if not method.dense and not method.calibrated]


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


def loaded(spelled: str, **changes) -> tuple[HFEngine, nn.Module]:
    """A tiny model under a method, and its shape."""
    model, method = tiny_llama(**changes), parse_method(spelled)
    shape = meta_model(tiny_config(**changes))
    return HFEngine(method.quantize_(model, "cpu"), method, "cpu"), shape


def left(model) -> set[str]:
    return {name for name, module in linear_modules(model).items() if not is_quantized(module)}


@pytest.mark.parametrize(
    ("place", "there"),
    [
        ("3", lambda layer, module: layer == 3),
        ("3-5", lambda layer, module: 3 <= layer <= 5),
        ("down_proj", lambda layer, module: module == "mlp.down_proj"),
        ("1.mlp.down_proj", lambda layer, module: (layer, module) == (1, "mlp.down_proj")),
        ("2-3.qkv_proj", lambda layer, module: layer in (2, 3) and module[-6:] in ("q_proj", "k_proj", "v_proj")),
        ("gate_up_proj", lambda layer, module: module in ("mlp.gate_proj", "mlp.up_proj")),
        ("model.layers.11.self_attn.o_proj", lambda layer, module: (layer, module) == (11, "self_attn.o_proj")),
    ],
)
def test_a_place_is_a_layer_a_module_or_both(place, there):
    found = {name for name in NAMES if is_at(name, place)}
    assert found == {name for name in NAMES if there(int(name.split(".")[2]), name.split(".", 3)[3])} != set()


@pytest.mark.parametrize(
    "spelled", ["llm-int8@keep=5", "llm-int8@4.5:keep=0-3.down_proj+5", "gptq@keep=o_proj", "int8-weight-only@keep=1"]
)
def test_a_name_with_places_is_read_as_it_is_spelled(spelled):
    contestant = Contestant.parse(spelled)
    assert contestant.label == spelled and Contestant.parse(contestant.label) == contestant
    plain = Contestant.parse(spelled.partition("keep=")[0].rstrip(":@"))
    assert contestant != plain and contestant.method.base == plain.method
    assert (contestant.threshold, contestant.method.name) == (plain.threshold, plain.method.name)
    assert mixed(plain.method, spelled.partition("keep=")[2]) == contestant.method


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        ("llm-int8@keep=", "keep holds '', which names no layer; write layers and modules such as 5, 3-5, down_proj"),
        ("llm-int8@keep=5-3", "keep holds '5-3', and layers are counted upwards"),
        ("llm-int8@keep=3..x", "keep holds '3..x', which names no layer"),
        ("llm-int8@keep=2+", "keep holds '', which names no layer"),
        ("fp16@keep=3", "fp16 quantizes no layer, so there is none to keep"),
        ("llm-int8@keep", "llm-int8 cannot be set to 'keep'|threshold is 'keep'"),
    ],
)
def test_places_that_are_none_are_refused(spelled, said):
    with pytest.raises(BadChoice, match=said):
        parse_method(spelled)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ("7", "keep names '7', and llm-int8 quantizes nothing there; this model has layers 0 to 1 and q_proj, k_proj"),
        ("lm_head", "keep names 'lm_head', and llm-int8 quantizes nothing there"),
        ("0+1.banana", "keep names '1.banana'"),
        ("0-1", "keep=0-1 leaves llm-int8 nothing to quantize; choose fp16"),
    ],
)
def test_places_that_the_model_has_not_are_refused_by_every_loop(keep, said, tiny_folder, capsys):
    method, model = parse_method(f"llm-int8@keep={keep}"), tiny_llama()
    architecture = architecture_of(model.config.to_dict())
    for ask in (
        lambda: method.quantize_(model, "cpu"),
        lambda: method.predict(meta_model(tiny_config())),
        lambda: built(ModelTensors(model), architecture, method.spelled, packed=True),
        lambda: choose_engines("auto", [method], model.config.to_dict(), "cpu"),
    ):
        with pytest.raises(BadChoice, match=said):
            ask()
    status, out, err = run_cli(capsys, "memory", "--model", tiny_folder, "--methods", method.spelled)
    assert (status, out, len(err)) == (2, [], 1) and err[0].startswith("llmq: keep")


def test_a_model_without_linear_layers_is_refused_as_ever():
    class Bare(nn.Module):
        get_output_embeddings = get_input_embeddings = lambda self: None

    with pytest.raises(BadChoice, match="no linear layer to replace"):
        parse_method("llm-int8@keep=3").quantize_(Bare(), "cpu")


@pytest.mark.parametrize("name", QUANTIZING)
def test_every_method_leaves_alone_what_is_kept_and_nothing_else(name):
    wide = {"hidden_size": 64, "intermediate_size": 128}  # as bitsandbytes' NF4 wants it
    engine, shape = loaded(f"{name}@keep=0.qkv_proj+1.down_proj", **wide)
    kept = {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"} | {"model.layers.1.mlp.down_proj"}
    original = tiny_llama(**wide).to(getattr(torch, engine.method.dtype))
    for module in kept:
        assert torch.equal(engine.model.get_submodule(module).weight, original.get_submodule(module).weight)
    method, plain = engine.method, METHODS[name]
    if method.bits <= 8:
        assert left(engine.model) - {"lm_head"} == kept
    predicted = method.predict(shape)
    assert (predicted.weights, predicted.scales) == (engine.weight_bytes, engine.scale_bytes)
    assert predicted_coverage(shape, method) == coverage(engine.model)
    itemsize, all_of_it = getattr(torch, method.dtype).itemsize, plain.predict(shape)
    sizes = [layer.weight.shape for layer_name, layer in linear_layers(shape) if layer_name in kept]
    more = sum(rows * columns * itemsize - sum(vars(plain.bytes((rows, columns))).values()) for rows, columns in sizes)
    assert predicted.weights + predicted.scales == all_of_it.weights + all_of_it.scales + more
    assert engine.logits(PROMPT).isfinite().all()


@pytest.mark.parametrize("base", ["llm-int8@0.01", "llm-int8@2", "int8-weight-only", "llm-int8-head"])
@pytest.mark.parametrize("keep", ["0", "qkv_proj", "0.o_proj+1.gate_up_proj", "1.down_proj", "0.qkv_proj+1"])
def test_our_own_loops_compute_it(base, keep):
    """Packed for the CPU, and as on a GPU with the reference operations: the same tokens, the same bytes."""
    method = mixed(parse_method(base), keep)
    model = tiny_llama()
    source, architecture = ModelTensors(model), architecture_of(model.config.to_dict())
    native = built(source, architecture, method.spelled, packed=True)
    expected = built(source, architecture, method.spelled, packed=False)
    assert (native.logits(PROMPT) - expected.logits(PROMPT)).norm() < 0.02 * expected.logits(PROMPT).norm()
    assert generate(native, 8) == generate(expected, 8)
    through, shape = loaded(method.spelled)
    plain = built(source, architecture, base, packed=True)
    one, other = method.predict(shape), parse_method(base).predict(shape)
    assert native.weight_bytes - plain.weight_bytes == one.weights - other.weights > 0
    assert native.scale_bytes - plain.scale_bytes == one.scales - other.scales < 0
    assert coverage(native.model).shares == pytest.approx(coverage(through.model).shares)
    if base != "int8-weight-only":
        assert native.outlier_share(PROMPT) == pytest.approx(expected.outlier_share(PROMPT), abs=0.02)


@pytest.mark.parametrize("keep", ["qkv_proj", "gate_up_proj", "0.o_proj+1.down_proj", "1"])
def test_a_list_of_outliers_is_empty_before_it_is_filled_and_dense_rows_have_none(keep):
    """What the kernels of a GPU rely on: theirs append, and note while they write."""

    def split(x, threshold, out):
        assert int(out.count) == 0
        reference.split(x, threshold, out)

    def linear_rows(rows, weight, **more):
        assert isinstance(weight, Int8Weight) or rows.threshold is None
        return reference.linear_rows(rows, weight, **more)

    method, model = parse_method(f"llm-int8@0.01:keep={keep}"), tiny_llama()
    architecture = architecture_of(model.config.to_dict())
    weights = load_weights(ModelTensors(model), architecture, method, "cpu", kernels=reference)
    watched = SimpleNamespace(**{**vars(reference), "split": split, "linear_rows": linear_rows})
    lean = CudaLlama(weights, method, "cpu", kernels=watched)
    assert generate(lean, 4) == generate(CudaLlama(weights, method, "cpu", kernels=reference), 4)
    assert 0 in lean.outlier_counts(PROMPT)


def test_a_part_of_a_joined_matrix_goes_through_transformers_and_says_why():
    config = tiny_config().to_dict()
    assert choose_engines("auto", [parse_method("llm-int8@keep=0.qkv_proj+1")], config, "cpu") == ["lean"]
    part = parse_method("llm-int8@keep=0.q_proj")
    assert choose_engines("auto", [part], config, "cpu") == ["hf"]
    reason = "keeps a part of q, k and v or of gate and up, which the lean loop multiplies as one"
    assert reason in why_not_lean(part, config)
    with pytest.raises(BadChoice, match=reason):
        choose_engines("lean", [part], config, "cpu")


def test_places_are_few_and_say_the_same():
    drawn = random.Random(0)
    for count in (1, 2, 7, 20, 60, 83, 84):
        for _ in range(20):
            kept = set(drawn.sample(NAMES, count))
            found = places(kept, NAMES)
            assert {name for name in NAMES if any(is_at(name, place) for place in found)} == kept
            assert parse_method("llm-int8@keep=" + "+".join(found)).keep == found
    whole = {name for name in NAMES if name.split(".")[2] in ("2", "3", "4")}
    attention = {f"model.layers.{i}.self_attn.{part}_proj" for i in (7, 8) for part in "qkv"}
    assert places(whole | attention | {NAMES[0]}, NAMES) == ("0.q_proj", "2-4", "7-8.qkv_proj")


def test_a_name_that_two_modules_of_a_layer_end_in_is_written_longer():
    names = [f"transformer.h.{i}.{part}.c_proj" for i in range(3) for part in ("attn", "mlp")]
    assert places({names[1], names[3]}, names) == ("0-1.mlp.c_proj",)


def test_the_skip_list_leaves_these_modules_to_bitsandbytes(tiny_folder):
    """As transformers takes it: exactly what is kept, and the head, stay linear layers of torch."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    method = parse_method("llm-int8@keep=0.qkv_proj+1.down_proj")
    skipped = skip_modules(meta_model(tiny_config()), method)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=config, device_map={"": "cpu"})
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    dense = {name for name, module in linear.items() if not isinstance(module, bnb.nn.Linear8bitLt)}
    kept = {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"} | {"model.layers.1.mlp.down_proj"}
    assert dense == set(skipped) == kept | {"lm_head"} and len(linear) == 15


def test_a_checkpoint_of_int8_weights_has_nothing_to_keep(tiny_folder, tmp_path, capsys):
    folder = tmp_path / "int8"
    assert run_cli(capsys, "models", "--save-int8", tiny_folder, folder)[0] == 0
    asked = ("--model", folder, "--methods", "llm-int8@keep=0,fp16", "--device", "cpu", "--tokens", 1024)
    status, out, err = run_cli(capsys, "quality", *asked)
    assert (status, out) == (2, []) and "holds int8 weights" in err[-1]


def test_it_takes_part_in_a_comparison_in_quality_and_in_a_forecast(tiny_folder, capsys):
    names, where = "fp16,llm-int8@keep=0,llm-int8@keep=1.q_proj", ("--model", tiny_folder, "--device", "cpu")
    wanted = ("--methods", names, "--json")
    found = json.loads(
        run_cli(capsys, "compare", "Hi", "--engine", "hf", "--max-new-tokens", 3, *where, *wanted)[1][-1]
    )
    rows = json.loads(run_cli(capsys, "memory", "--model", tiny_folder, *wanted)[1][-1])["results"]
    scored = json.loads(run_cli(capsys, "quality", "--tokens", 1024, "--no-floor", *where, *wanted)[1][-1])["results"]
    for entry, row in zip(found["contestants"], rows, strict=True):
        assert entry["weight_bytes"] == row["weights"] and len(entry["token_ids"]) == 3
        assert entry["coverage"] == pytest.approx(row["coverage"])
    assert [row["engine"] for row in scored] == ["lean", "lean", "hf"]
    assert [row["method"] for row in scored] == names.split(",") and scored[1]["kl_to_fp16"] > 0
