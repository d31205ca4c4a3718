"""The drop-in for transformers: the same tokens as our own loop, bitsandbytes' files, and one graph for a compiler."""

from __future__ import annotations

import copy
import json
import re
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file
from tiny_runs import key_of, light
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmq.engine.base import generate
from llmq.engine.sampling import SamplingSettings
from llmq.errors import BadChoice, ModelUnavailable
from llmq.hooks import Watched
from llmq.kernels import reference, registered
from llmq.kernels.primitives import Int8Weight, int8_linear, quantize_rows
from llmq.machine.door import Machine
from llmq.methods import METHODS, parse_method
from llmq.methods.layers.linear_8bit import Linear8bit, layers_of
from llmq.methods.swap import stored_bytes
from llmq.models.loading import folder_of
from llmq.models.opening import open_model
from llmq.transformers import Int8Config

PROMPT = torch.tensor([list(b"Hello LLaMA")])
GREEDY = dict(do_sample=False, eos_token_id=-1, pad_token_id=0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with light():
        yield


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin")
    tiny_llama(torch.float16, intermediate_size=48, attention_bias=True).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(origin):
    return opened(origin, Int8Config(threshold=1.0))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(origin, tmp_path_factory):
    """What transformers saves of a model that bitsandbytes quantized."""
    folder = tmp_path_factory.mktemp("theirs")
    opened(origin, BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=1.0)).save_pretrained(folder)
    return folder


def opened(folder, config=None, **settings):
    given = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **given, **settings)


def written(model, tokens: int = 12, prompt=PROMPT, **settings) -> list[int]:
    """Token ids that `generate` chooses greedily."""
    return model.generate(prompt, max_new_tokens=tokens, **GREEDY, **settings)[0, prompt.shape[1] :].tolist()


def files_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logits(model, ids=PROMPT) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits.float()


def test_generate_writes_what_our_own_loops_write(demo):
    ids = open_model("demo").encode("Plan a 3-day itinerary in Paris.")
    made = written(opened(folder_of(demo), Int8Config(), dtype=torch.float16), 12, torch.tensor([ids]))
    for loop in ("hf", "lean"):
        engine, _ = Machine().pool.get(key_of(demo, "llm-int8", loop=loop))
        assert [token.token_id for token in generate(engine, ids, SamplingSettings(max_new_tokens=12))] == made


def test_the_two_lines_that_are_told_run(origin):
    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```diff\n(.*?)```", text, re.DOTALL)
    lines = [line[1:] for line in block.splitlines() if line.startswith("+")]
    scope = {"AutoModelForCausalLM": AutoModelForCausalLM, "name": origin}
    exec("\n".join(lines), scope)
    assert len(lines) == 2 and len(list(layers_of(scope["model"]))) == 14


def test_every_linear_layer_but_the_head_is_int8(model):
    assert {name.rpartition(".")[2] for name, _ in layers_of(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert len(list(layers_of(model))) == 14 and type(model.lm_head) is torch.nn.Linear
    layer = model.model.layers[1].mlp.down_proj
    assert layer.weight.dtype == torch.int8 and layer.SCB.dtype == torch.float32


def test_the_layers_compute_the_definition(origin, model):
    dense = files_of(origin)["model.layers.1.mlp.down_proj.weight"]
    layer, weight = model.model.layers[1].mlp.down_proj, quantize_rows(dense)
    assert torch.equal(layer.weight, weight.codes) and torch.equal(layer.SCB, weight.absmax)
    for rows in (1, 3):
        x = torch.randn(rows, 48).half()
        expected = int8_linear(x, weight, layer.threshold)
        assert (layer(x).float() - expected).norm() < 1e-3 * expected.norm()
        assert torch.equal(layer(x.view(rows, 1, 48))[:, 0], layer(x))


def test_outlier_columns_are_bitsandbytes(origin, model, monkeypatch):
    other = opened(origin, BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=1.0))
    seen, split = {}, reference.split
    monkeypatch.setattr(reference, "split", lambda x, *rest: (split(x, *rest), seen.update({x: rest[1]})))
    with Watched(dict(layers_of(model)), on_input=lambda name, layer, x: seen.update({name: x})):
        logits(model, PROMPT[:, :1])
    found = {tuple(x.tolist()): made for x, made in seen.items() if isinstance(x, torch.Tensor)}
    assert sum(int(made.count) for made in found.values())
    for name, _ in layers_of(model):
        with torch.inference_mode():
            other.get_submodule(name)(seen[name])
        made = found[tuple(seen[name].view(-1).tolist())]
        theirs = METHODS["bnb-int8"].outlier_columns(other.get_submodule(name))
        assert sorted(made.index[: made.count].tolist()) == theirs.tolist()


def test_bitsandbytes_opens_what_is_saved(model, saved, theirs):
    made, expected = files_of(saved), files_of(theirs)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) and made[name].dtype == expected[name].dtype for name in made)
    other = opened(saved, BitsAndBytesConfig(load_in_8bit=True))
    layer = other.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear8bitLt" and layer.state.threshold == 1.0
    assert (logits(other) - logits(model)).norm() < 1e-2 * logits(model).norm()


def test_what_is_saved_opens_by_itself(model, saved):
    again = opened(saved)
    assert again.model.layers[0].mlp.up_proj.threshold == 1.0 and again.dtype == torch.float16
    assert torch.equal(logits(again), logits(model)) and written(again) == written(model)
    assert opened(saved, Int8Config(threshold=3)).model.layers[0].mlp.up_proj.threshold == 3.0


@pytest.mark.parametrize("method", ["llm-int8@1", "bnb-int8@1"])
def test_our_own_loops_open_it_as_well(model, saved, method):
    byte_tokenizer().save_pretrained(saved)
    engine, _ = Machine().pool.get(key_of(saved, method), parse_method(method))
    made = [token.token_id for token in generate(engine, PROMPT[0].tolist(), SamplingSettings(max_new_tokens=4))]
    assert made == written(model, 4)


def test_a_copy_is_a_model_of_its_own(model):
    twin = copy.deepcopy(model)
    assert twin.model.layers[0].mlp.up_proj.group.layers[0] is twin.model.layers[0].mlp.gate_proj
    assert torch.equal(logits(twin, PROMPT[:, :1]), logits(model, PROMPT[:, :1]))


def test_a_checkpoint_of_bitsandbytes_opens_on_request_only(model, theirs):
    ours = opened(theirs, Int8Config())
    assert ours.model.layers[0].mlp.up_proj.threshold == 1.0
    assert torch.equal(logits(ours), logits(model))
    assert type(opened(theirs).model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"


def test_memory_holds_one_weight_in_16_bit_while_loading(tmp_path):
    """Of what torch allocates; the checkpoint, in 32 bit so that every weight has to be cast, is mapped beside it."""
    tiny_llama(torch.float32, hidden_size=128, intermediate_size=512, num_hidden_layers=6).save_pretrained(tmp_path)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model = opened(tmp_path, Int8Config(), dtype=torch.float16)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    most, weight = max(held) - (tmp_path / "model.safetensors").stat().st_size, 2 * 128 * 512
    dense = sum(2 * layer.weight.numel() for _, layer in layers_of(model))
    assert stored_bytes(model) <= most <= stored_bytes(model) + weight + 4096
    assert dense > 20 * weight  # so a 16-bit copy of all would not pass


def test_skipped_modules_stay_and_are_skipped_again(origin, tmp_path):
    skip = ["lm_head", "model.layers.0.mlp", "v_proj"]
    model = opened(origin, Int8Config(llm_int8_skip_modules=skip))
    left = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert {name for name in left if "mlp" in name} == {f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")}
    assert {name for name in left if "attn" in name} == {f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    model.save_pretrained(tmp_path)
    for config in (None, Int8Config(), BitsAndBytesConfig(load_in_8bit=True)):
        again = opened(tmp_path, config)
        assert {name for name, module in again.named_modules() if type(module) is torch.nn.Linear} == left
    with pytest.raises(BadChoice, match="the int8 checkpoint has"):
        opened(tmp_path, Int8Config(llm_int8_skip_modules=["lm_head"]))


def test_a_tied_head_stays_whatever_is_skipped(tmp_path):
    tiny_llama(torch.float16, tie_word_embeddings=True).save_pretrained(tmp_path / "origin")
    model = opened(tmp_path / "origin", Int8Config(llm_int8_skip_modules=["q_proj"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    assert opened(tmp_path / "saved", BitsAndBytesConfig(load_in_8bit=True)) is not None
    assert written(opened(tmp_path / "saved")) == written(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_rest_of_the_model_has_the_type_asked_for(origin, model, dtype):
    other = opened(origin, Int8Config(threshold=1.0), dtype=dtype)
    assert other.dtype == other.lm_head.weight.dtype == other(PROMPT).logits.dtype == dtype
    assert other.model.layers[0].mlp.up_proj.SCB.dtype == torch.float32
    assert (logits(other) - logits(model)).norm() < 5e-2 * logits(model).norm()
    with pytest.raises(ValueError, match="not supported"):
        other.half()


def test_scales_keep_their_type_when_layers_are_cast(model):
    layer = Linear8bit.over(torch.nn.Linear(8, 4), 6.0)
    assert layer.half().SCB.dtype == torch.float32 and layer.bias.dtype == torch.float16
    assert layer.to("meta").SCB.is_meta


def test_gpt2_keeps_its_weights_the_other_way_round(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=259, n_positions=64)
    dense = GPT2LMHeadModel(config).half().eval()
    dense.save_pretrained(tmp_path / "origin")
    model = opened(tmp_path / "origin", Int8Config())
    assert model.transformer.h[0].mlp.c_fc.weight.shape == (128, 32)
    assert (logits(model) - logits(dense)).norm() < 5e-2 * logits(dense).norm()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(opened(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": -1}, "threshold"),
        ({"threshold": "six"}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"llm_int8_skip_modules": "lm_head"}, "give a list of modules' names"),
        ({"llm_int8_skip_modules": [3]}, "give a list of modules' names"),
    ],
)
def test_a_wrong_value_is_one_sentence(settings, words):
    with pytest.raises(BadChoice, match=words) as refusal:
        Int8Config(**settings)
    assert "\n" not in str(refusal.value)


def test_what_cannot_be_opened_is_one_sentence(origin, saved, tmp_path):
    with pytest.raises(BadChoice, match="device_map names 2 devices"):
        AutoModelForCausalLM.from_pretrained(
            origin, quantization_config=Int8Config(), device_map={"model": "cpu", "lm_head": "disk"}
        )
    with pytest.raises(BadChoice, match="no linear layer"):
        opened(origin, Int8Config(llm_int8_skip_modules=["model", "lm_head"]))
    settings = json.loads((saved / "config.json").read_text())
    for name, change, words in (
        ("scales", {"SCB": None}, "no 32 scales for model.layers.0.mlp.down_proj"),
        ("rows", {"weight": torch.zeros(3, 48, dtype=torch.int8)}, "no int8 weight of 32 rows"),
        ("format", {"weight_format": torch.tensor(2, dtype=torch.uint8)}, "another format"),
    ):
        (folder := tmp_path / name).mkdir()
        (folder / "config.json").write_text(json.dumps(settings))
        tensors = files_of(saved)
        for key, value in change.items():
            tensors[f"model.layers.0.mlp.down_proj.{key}"] = value
        save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelUnavailable, match=words) as refusal:
            opened(folder)
        assert "\n" not in str(refusal.value)
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (saved_as := tmp_path / "gptq").mkdir()
    (saved_as / "config.json").write_text(json.dumps(settings))
    with pytest.raises(BadChoice, match="holds gptq weights"):
        opened(saved_as, Int8Config())


def test_early_files_name_no_format(saved, model, tmp_path):
    tensors = {name: value for name, value in files_of(saved).items() if not name.endswith("weight_format")}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    assert torch.equal(logits(opened(tmp_path)), logits(model))


def test_a_compiler_takes_the_model_whole(model):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for ids in (PROMPT, PROMPT[:, :1]):
        assert torch.equal(logits(compiled, ids), logits(model, ids))
    assert all(layer.group.made is None for _, layer in layers_of(model))


def test_a_static_cache_is_compiled_without_a_break(model):
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    torch.compiler.reset()
    counters.clear()
    config = CompileConfig(backend="eager", fullgraph=True, mode="default")
    config._compile_all_devices = True
    assert written(model, cache_implementation="static", compile_config=config) == written(model)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


def test_export_takes_it_too(model):
    exported = torch.export.export(model, (PROMPT,), {"use_cache": False}, strict=False)
    assert "llmq.linear_rows" in str(exported.graph)
    assert torch.equal(exported.module()(PROMPT, use_cache=False).logits, model(PROMPT, use_cache=False).logits)


@pytest.fixture(params=["reference", "triton"])
def kernels(request, monkeypatch):
    """The operations on both implementations."""
    if request.param == "triton":
        from types import SimpleNamespace

        triton = pytest.importorskip("test_kernels").fast  # which says where its interpreter does not run
        found = SimpleNamespace(**vars(reference) | {name: getattr(triton, name) for name in triton.__all__})
        monkeypatch.setattr(registered, "_kernels", lambda device: found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_operations_are_the_definition(kernels, dtype):
    weight, bias = quantize_rows(torch.randn(24, 40)), torch.randn(24).to(dtype)
    x = torch.randn(3, 40).to(dtype)
    x[:, 5] *= 20
    first, second = torch.ops.llmq.linear_token(
        x[:1], [weight.codes, weight.codes[:3]], [weight.absmax, weight.absmax[:3]], [bias, bias[:3]], 6.0
    )
    kept = first.clone()
    torch.ops.llmq.linear_token(x[1], [weight.codes], [weight.absmax], [], 6.0)
    assert torch.equal(first, kept)  # nothing of a call is written by the next
    assert torch.equal(second, first[:3])
    rows = torch.ops.llmq.linear_rows(x, weight.codes, weight.absmax, bias, 6.0)
    for made, expected in ((first[None], int8_linear(x[:1], weight, 6.0)), (rows, int8_linear(x, weight, 6.0))):
        expected = expected + bias.float()
        assert made.dtype == dtype and (made.float() - expected).norm() < 5e-3 * expected.norm()


def test_torch_finds_the_operations_sound():
    weight, x = quantize_rows(torch.randn(24, 40)), torch.randn(1, 40).half()
    token = x, [weight.codes, weight.codes], [weight.absmax, weight.absmax], [], 6.0
    torch.library.opcheck(torch.ops.llmq.linear_token.default, token)
    rows = torch.randn(3, 40).half(), weight.codes, weight.absmax, torch.randn(24).half(), 6.0
    torch.library.opcheck(torch.ops.llmq.linear_rows.default, rows)


def inputs_split(monkeypatch) -> list[torch.Tensor]:
    """Grows by the input of every decomposition of one token."""
    found, split = [], reference.split
    monkeypatch.setattr(reference, "split", lambda x, *rest: (found.append(x), split(x, *rest)))
    return found


def test_layers_side_by_side_decompose_once(model, monkeypatch):
    found = inputs_split(monkeypatch)
    logits(model, PROMPT[:, :1])
    assert len(found) == 2 * 4  # of two blocks: q/k/v, o, gate/up, down
    assert all(layer.group.made is None for _, layer in layers_of(model))


@pytest.mark.parametrize("how", ["another tensor", "another threshold", "another order"])
def test_layers_that_differ_part(origin, how):
    model = opened(origin, Int8Config(threshold=1.0))
    q, k, v = (getattr(model.model.layers[0].self_attn, f"{name}_proj") for name in "qkv")
    x, y = 2 * torch.randn(2, 1, 32).half()
    if how == "another threshold":
        k.threshold = 0.5
    layers = [k, q, v] if how == "another order" else [q, k, v]
    made = [layer(y if layer is k and how == "another tensor" else x) for layer in layers]
    for layer, output in zip(layers, made, strict=True):
        z = y if layer is k and how == "another tensor" else x
        weight = Int8Weight(layer.weight.data, layer.SCB)
        expected = int8_linear(z, weight, layer.threshold) + layer.bias
        assert (output - expected).norm() < 2e-3 * expected.norm()
    assert len({id(layer.group) for layer in (q, k, v)}) == 3
