"""Int8 checkpoints: transformers opens ours, we open transformers', and nobody calls rounded weights FP16."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_runs import key_of

from llmq.cli import main
from llmq.engine.choice import choose_engines
from llmq.errors import BadChoice, ModelUnavailable
from llmq.machine.door import Machine
from llmq.methods import METHODS
from llmq.models import int8_checkpoint, writing
from llmq.models.int8_checkpoint import save_int8
from llmq.models.loading import load_config, resolve

IDS = list(b"Hello LLaMA")


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin")
    tiny_llama(torch.float16, intermediate_size=48).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(origin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "int8"
    *_, last = save_int8(resolve(str(origin)), folder)
    assert last.fraction == 1.0
    return folder


def opened(folder, **quantization):
    """transformers' own model of a folder, quantized with bitsandbytes where settings are given."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    given = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, **quantization)} if quantization else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map={"": "cpu"}, **given)


def saved_by_transformers(origin, folder, **quantization):
    opened(origin, **({"llm_int8_threshold": 6.0} | quantization)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(origin, tmp_path_factory):
    """What transformers itself saves of the model it quantized with bitsandbytes."""
    return saved_by_transformers(origin, tmp_path_factory.mktemp("theirs"))


def engine(folder, method: str, loop: str = "hf"):
    return Machine().pool.get(key_of(folder, method, loop=loop))[0]


def contents(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


def test_the_files_are_those_of_transformers(ours, theirs):
    made, expected = contents(ours), contents(theirs)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name].view(-1), expected[name].view(-1)) for name in made)
    assert all(made[name].dtype == expected[name].dtype for name in made)


@pytest.mark.parametrize("method", ["bnb-int8", "llm-int8", "int8-weight-only"])
@pytest.mark.parametrize("written_by", ["ours", "theirs"])
def test_a_model_from_int8_is_the_model_quantized_when_opened(written_by, method, origin, request):
    folder = request.getfixturevalue(written_by)
    assert torch.equal(engine(folder, method).logits(IDS), engine(origin, method).logits(IDS))
    if method != "bnb-int8":
        assert torch.equal(engine(folder, method, "lean").logits(IDS), engine(origin, method, "lean").logits(IDS))
        assert engine(folder, method, "lean").weight_bytes == engine(origin, method, "lean").weight_bytes


@pytest.mark.parametrize("loop", ["hf", "lean"])
def test_rounded_weights_are_not_called_fp16(ours, loop):
    with pytest.raises(BadChoice, match="holds int8 weights: choose bnb-int8"):
        engine(ours, "fp16", loop)


def test_large_models_are_written_in_parts(origin, tmp_path, monkeypatch, ours):
    monkeypatch.setattr(writing, "SHARD_BYTES", 5000)
    assert main(["models", "--save-int8", str(origin), str(tmp_path / "parts")]) == 0
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    assert torch.equal(engine(tmp_path / "parts", "llm-int8").logits(IDS), engine(ours, "llm-int8").logits(IDS))
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == contents(ours).keys()


def test_nothing_is_overwritten_and_nothing_half_is_left(origin, ours, tmp_path, monkeypatch, capsys):
    assert main(["models", "--save-int8", str(origin), str(ours)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["models", "--save-int8", str(ours), str(tmp_path / "twice")]) == 2
    assert "quantized already" in capsys.readouterr().err

    (tmp_path / f"{writing.WORK}0123").mkdir()  # of a process that was killed

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(int8_checkpoint, "write_settings", full)
    assert main(["models", "--save-int8", str(origin), str(tmp_path / "half")]) == 2
    assert "No space left" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_the_folder_has_the_permissions_of_any_new_folder(ours, tmp_path):
    (tmp_path / "any").mkdir()
    assert ours.stat().st_mode == (tmp_path / "any").stat().st_mode


def test_layers_of_gpt2_are_turned_as_transformers_turns_them(tmp_path):
    """Its Conv1D has (in, out) weights; in an int8 checkpoint they are (out, in) with a scale a row."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 259, "n_positions": 64, "eos_token_id": 257}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=256)).half().save_pretrained(tmp_path / "gpt2")
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    list(save_int8(resolve(str(tmp_path / "gpt2")), tmp_path / "int8"))
    made, expected = (
        contents(tmp_path / "int8"),
        contents(saved_by_transformers(tmp_path / "gpt2", tmp_path / "theirs")),
    )
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name].view(-1), expected[name].view(-1)) for name in made)
    assert made["transformer.h.0.mlp.c_fc.weight"].shape == (128, 32)
    for method in ("bnb-int8", "llm-int8"):
        assert torch.equal(engine(tmp_path / "int8", method).logits(IDS), engine(tmp_path / "gpt2", method).logits(IDS))
        assert engine(tmp_path / "int8", method).model.transformer.h[0].attn.c_attn.weight.dtype == torch.int8


def test_tensors_by_other_names_are_not_written_half(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=259, n_positions=64))
    model.transformer.save_pretrained(tmp_path / "gpt2")  # 'h.0…' for what the whole model calls 'transformer.h.0…'
    byte_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(
        BadChoice, match="other names than its layers: there is no 'transformer.h.0.attn.c_attn.weight'"
    ):
        list(save_int8(resolve(str(tmp_path / "gpt2")), tmp_path / "int8"))


KEPT, HEAD = "model.layers.0.self_attn.q_proj", "lm_head"


@pytest.mark.parametrize("method", ["bnb-int8", "llm-int8", "int8-weight-only", "llm-int8-head"])
def test_layers_kept_in_16_bit_stay_so(method, origin, tmp_path):
    """Whoever wrote the checkpoint left a layer out; no method makes it int8 without a word."""
    folder = saved_by_transformers(origin, tmp_path / "kept", llm_int8_skip_modules=[HEAD, KEPT])
    found = engine(folder, method)
    layers = dict(found.model.named_modules())
    assert layers[KEPT].weight.dtype == torch.float16
    assert torch.equal(layers[KEPT].weight, opened(folder).get_submodule(KEPT).weight)
    assert layers[KEPT.replace("q_proj", "k_proj")].weight.dtype == torch.int8
    assert (layers[HEAD].weight.dtype == torch.int8) == (method == "llm-int8-head")
    if method == "bnb-int8":
        with torch.inference_mode():
            assert torch.equal(found.logits(IDS), opened(folder)(torch.tensor([IDS])).logits[0])


@pytest.mark.parametrize("method", ["bnb-int8", "llm-int8", "int8-weight-only", "llm-int8-head"])
def test_a_head_in_int8_keeps_its_own_scales(method, origin, tmp_path):
    folder = saved_by_transformers(origin, tmp_path / "head", llm_int8_skip_modules=[])
    found, stored = engine(folder, method), contents(folder)
    head = found.model.get_output_embeddings()
    assert torch.equal(head.weight, stored["lm_head.weight"])
    if method != "bnb-int8":
        assert torch.equal(head.absmax, stored["lm_head.SCB"])
    with torch.inference_mode():
        expected = opened(folder)(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(found.logits(IDS), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("skipped", [[], [HEAD, KEPT]])
def test_the_lean_loop_leaves_a_choice_of_layers_to_transformers(skipped, origin, tmp_path):
    config = load_config(resolve(str(saved_by_transformers(origin, tmp_path / "x", llm_int8_skip_modules=skipped))))
    assert choose_engines("auto", [METHODS["llm-int8"]], config.to_dict(), "cpu") == ["hf"]
    with pytest.raises(BadChoice, match="does not compute an int8 checkpoint with its own list of layers"):
        choose_engines("lean", [METHODS["llm-int8"]], config.to_dict(), "cpu")


def test_a_threshold_in_the_checkpoint_does_not_change_a_label(origin, theirs, tmp_path):
    folder = saved_by_transformers(origin, tmp_path / "threshold", llm_int8_threshold=0.5)
    assert not torch.equal(opened(folder)(torch.tensor([IDS])).logits, opened(theirs)(torch.tensor([IDS])).logits)
    for method in ("bnb-int8", "llm-int8"):
        assert torch.equal(engine(folder, method).logits(IDS), engine(theirs, method).logits(IDS))


def without_a_word(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def in_16_bit(*layers: str):
    """The layers' own weights in place of their codes and scales; all but the head where none is named."""

    def change(folder):
        tensors, whole = contents(folder), tiny_llama(torch.float16, intermediate_size=48).state_dict()
        for layer in layers or [name.removesuffix(".SCB") for name in tensors if name.endswith(".SCB")]:
            tensors[f"{layer}.weight"] = whole[f"{layer}.weight"]
            del tensors[f"{layer}.SCB"], tensors[f"{layer}.weight_format"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


@pytest.mark.parametrize("loop", ["hf", "lean"])
@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (without_a_word, r"model.layers.0.mlp.down_proj \(14 layers"),
        (in_16_bit(KEPT), rf"{KEPT} \(1 layers"),
        (in_16_bit(), r"model.layers.0.mlp.down_proj \(14 layers"),
    ],
    ids=["int8 without a word", "a layer in 16 bit", "int8 in name only"],
)
def test_int8_that_is_not_as_stated_is_refused_alike(change, layer, loop, theirs, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(theirs, folder)
    change(folder)
    with pytest.raises(ModelUnavailable, match=rf"not int8 where its config.json says so: {layer}"):
        engine(folder, "llm-int8", loop)
