"""From a name to a model: what each name means, what a damaged folder is told, and what random weights are."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from tiny_runs import key_of

from llmq import telemetry
from llmq.engine.loading import load_engine
from llmq.errors import BadChoice, ModelUnavailable, UserError
from llmq.methods import METHODS
from llmq.models import choice
from llmq.models.choice import choose_model
from llmq.models.demo import demo_folder
from llmq.models.hub import Download
from llmq.models.loading import (
    Source,
    folder_of,
    load_config,
    load_model,
    load_tokenizer,
    prepare,
    resolve,
    revision_of,
)
from llmq.models.presets import PRESETS
from llmq.models.skeleton import meta_model

HUB_PRESETS = [preset for preset in PRESETS.values() if preset.hub_id]


@pytest.mark.parametrize("preset", HUB_PRESETS, ids=lambda preset: preset.name)
def test_a_preset_is_its_hub_repository(preset):
    assert resolve(preset.name) == Source(preset.name, "hub", preset.hub_id)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_a_preset_with_random_weights_is_its_shape(preset):
    source = resolve(preset.name, random_weights=True)
    assert source == Source(preset.name, "random", preset.name)
    config, shape = load_config(source), preset.shape
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(shape, name)
    assert config.rope_parameters["rope_theta"] == shape.rope_theta


def test_every_kind_of_name_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve(" demo ") == Source("demo", "demo", str(demo_folder()))
    assert demo_folder().parent == tmp_path / "cache"
    assert resolve(str(tmp_path / "model")) == Source(str(tmp_path / "model"), "folder", str(tmp_path / "model"))
    assert resolve("~/model") == Source("~/model", "folder", str(tmp_path / "model"))
    assert resolve("owner/some.name-1") == Source("owner/some.name-1", "hub", "owner/some.name-1")


@pytest.mark.parametrize("name", ["", "  ", None, "nope", "a/b/c", "../up", "\0", "~no-such-user-here", "x" * 300])
def test_a_name_that_means_nothing_gets_the_choices(name):
    with pytest.raises(BadChoice) as caught:
        resolve(name)
    assert all(choice in str(caught.value) for choice in [*PRESETS, "owner/name", "a local folder"])


@pytest.mark.parametrize("name", ["", "nope", "owner/name"])
def test_random_weights_need_a_preset(name):
    with pytest.raises(BadChoice) as caught:
        resolve(name, random_weights=True)
    assert repr(name) in str(caught.value) and all(preset in str(caught.value) for preset in PRESETS)


@pytest.mark.parametrize("name", ["a/b--c", "a/..", "a/b.git", "owner/é", "x" * 97 + "/y"])
def test_a_name_no_hub_accepts_is_told_so(name):
    """It looks like a hub id, and the hub's own rules refuse it before asking anyone."""
    with pytest.raises(UserError, match="hub|model"):
        list(prepare(resolve(name)))


def changed_config(**changes):
    def change(folder: Path):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def content(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def half_the_weights(folder: Path):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def without_head(folder: Path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_tokenizer(folder: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.fixture
def damaged(tiny_folder, tmp_path):
    """A copy of the tiny model's folder after `damage(folder)`, as a source."""

    def make(damage) -> Source:
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder, folder)
        damage(folder)
        return Source("my-model", "folder", str(folder))

    return make


def renamed(name: str, without: str = ""):
    """The weights under another name, and perhaps without another file."""

    def change(folder: Path):
        (folder / "model.safetensors").rename(folder / name)
        if without:
            (folder / without).unlink()

    return change


def pointer(name: str):
    return content(name, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def in_parts(missing: bool = False, index: bytes = b""):
    """Three files and their index, the second missing or the index damaged."""

    def change(folder: Path):
        (folder / "model.safetensors").unlink()
        tiny_llama(torch.float16).save_pretrained(folder, max_shard_size="30kB")
        if missing:
            (folder / "model-00002-of-00003.safetensors").unlink()
        if index:
            (folder / "model.safetensors.index.json").write_bytes(index)

    return change


NOT_WHOLE = "my-model lacks 1 of 3 files: model-00002-of-00003.safetensors; fetch it again"
FOLDERS = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "my-model holds no model: it has no config"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "my-model has no safetensors weights"),
    "nothing": (lambda folder: [file.unlink() for file in folder.iterdir()], "my-model holds no model: it has no conf"),
    "pickled": (renamed("pytorch_model.bin"), "no safetensors weights, and files of other formats can run code"),
    "GGUF": (renamed("tiny.Q8_0.gguf"), "my-model holds GGUF files, whose weights are rounded already"),
    "GGUF alone": (renamed("tiny.Q8_0.gguf", without="config.json"), "my-model holds GGUF files"),
    "Mistral's own format": (renamed("consolidated.safetensors"), "in the format of the model's makers"),
    "a copy in FP16": (renamed("model.fp16.safetensors"), "my-model has no safetensors weights"),
    "an adapter": (content("adapter_config.json", b"{}"), "my-model is an adapter of another model"),
    "a pointer": (pointer("model.safetensors"), "model.safetensors of my-model is a Git LFS pointer.*run git lfs pull"),
    "a pointer to words": (pointer("tokenizer.json"), "tokenizer.json of my-model is a Git LFS pointer"),
    "a pointer to settings": (pointer("config.json"), "config.json of my-model is a Git LFS pointer"),
    "a part missing": (in_parts(missing=True), NOT_WHOLE),
    "half an index": (in_parts(index=b'{"weight_map"'), "index.json of my-model cannot be read"),
    "an index of nothing": (in_parts(index=b"[]"), "index.json of my-model cannot be read"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_no_whole_model_says_what_it_is(kind, damaged):
    damage, words = FOLDERS[kind]
    with pytest.raises(ModelUnavailable, match=words):
        folder_of(damaged(damage))


@pytest.mark.parametrize("engine", ["hf", "lean"])
def test_both_loops_say_it_alike(engine, damaged):
    with pytest.raises(ModelUnavailable, match=NOT_WHOLE):
        load_engine(key_of(damaged(in_parts(missing=True)), "fp16", loop=engine))


def test_the_demo_that_was_never_fetched_says_how_to_fetch_it(tmp_path):
    with pytest.raises(ModelUnavailable, match="python -m llmq models --fetch demo"):
        folder_of(Source("demo", "demo", str(tmp_path)))


def test_random_weights_without_the_tokenizer_they_borrow_say_whose_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path))
    with pytest.raises(ModelUnavailable, match="random weights borrow its tokenizer.*--fetch demo`$"):
        load_tokenizer(resolve("llama-2-7b-chat", random_weights=True))


@pytest.mark.parametrize(
    "damage",
    [
        content("config.json", b"{"),
        content("config.json", b"[]"),
        content("config.json", b"\xff\xfe\0"),
        changed_config(model_type="nonesuch"),
        changed_config(model_type="nonesuch", auto_map={"AutoConfig": "their.Code"}),
        changed_config(num_attention_heads=5),
        changed_config(hidden_size="big"),
    ],
    ids=[
        "cut off",
        "a list",
        "binary",
        "unknown architecture",
        "remote code",
        "impossible heads",
        "a text for a number",
    ],
)
def test_a_configuration_that_cannot_be_read_is_the_models_fault(damage, damaged):
    with pytest.raises(ModelUnavailable, match="my-model"):
        load_config(damaged(damage))


def test_a_model_that_writes_no_text_is_refused(damaged):
    """A known architecture, but no causal language model: found out when its shape is built."""
    with pytest.raises(ModelUnavailable, match="t5"):
        meta_model(load_config(damaged(changed_config(model_type="t5"))))


@pytest.mark.parametrize(
    ("damage", "method"),
    [
        (content("model.safetensors", bytes(50)), "fp32"),
        (half_the_weights, "fp32"),
        (half_the_weights, "bnb-int8"),
        (without_head, "fp32"),
        (without_head, "bnb-int8"),
        (changed_config(intermediate_size=48), "fp32"),  # bitsandbytes takes the file's own shape, which is no lie
    ],
    ids=["zeros", "cut off", "cut off, int8", "a tensor missing", "a tensor missing, int8", "another shape"],
)
def test_weights_that_are_not_whole_are_refused(damage, method, damaged):
    """Never a model with some of its tensors made up: every figure and every word would be a lie."""
    with pytest.raises(ModelUnavailable, match="my-model"):
        load_model(damaged(damage), METHODS[method], "cpu")


@pytest.mark.parametrize(
    "damage",
    [
        without_tokenizer,
        content("tokenizer.json", b"{"),
        content("tokenizer.json", b"[]"),
        content("tokenizer_config.json", b"[]"),
    ],
    ids=["missing", "cut off", "a list", "a list of settings"],
)
def test_a_tokenizer_that_cannot_be_opened_is_the_models_fault(damage, damaged):
    with pytest.raises(ModelUnavailable, match="my-model"):
        load_tokenizer(damaged(damage))


def test_a_loaded_model_only_answers(tiny_folder):
    model = load_model(resolve(str(tiny_folder)), METHODS["fp16"], "cpu")
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert revision_of(resolve(str(tiny_folder))) == "local folder"


CACHED, ELSEWHERE = Download(0, 10**12, True), Download(13_476_000_000, 200 * 10**9, False)


@pytest.fixture
def choose(monkeypatch):
    """The choice for a device with so many bytes free and a hub that says this, or nothing."""

    def choose(asked, device, free, hub, **options):
        def plan(repo):
            if hub is None:
                raise ModelUnavailable("nobody there")
            return hub

        monkeypatch.setattr(telemetry, "free_bytes", lambda device: free)
        monkeypatch.setattr(choice.hub, "plan", plan)
        return choose_model(asked, device, **options)

    return choose


@pytest.mark.parametrize(
    ("asked", "device", "free", "hub", "model", "words"),
    [
        ("anything", "cpu", 0, None, "anything", ""),
        (None, "cpu", 10**12, CACHED, "demo", "no GPU"),
        (None, "cuda:0", 14.9e9, CACHED, "demo", "15 GB of VRAM are free and 7 B needs 15"),
        (None, "cuda:0", 6e9, CACHED, "demo", "6 GB of VRAM are free"),
        (None, "cuda:0", 15e9, None, "demo", "hub cannot be reached"),
        (None, "cuda:0", 15e9, ELSEWHERE, "demo", "`python app.py --model llama-2-7b-chat` fetches its 13.5 GB; 200"),
        (None, "cuda:0", 15e9, CACHED, "llama-2-7b-chat", "GPU holds it"),
    ],
)
def test_the_first_model_is_chosen_for_a_reason(asked, device, free, hub, model, words, choose):
    chosen = choose(asked, device, free, hub)
    assert chosen.model == model and words in chosen.reason


@pytest.mark.parametrize(
    ("device", "free", "hub", "model"),
    [
        ("cpu", 10**12, CACHED, "demo"),
        ("cuda:0", 7.9e9, CACHED, "demo"),
        ("cuda:0", 15e9, None, "demo"),
        ("cuda:0", 15e9, ELSEWHERE, choice.HOSTED_DEFAULT),
        ("cuda:0", 70e9, CACHED, choice.HOSTED_DEFAULT),
    ],
)
def test_a_space_opens_with_a_small_model(device, free, hub, model, choose):
    assert choose(None, device, free, hub, hosted=True).model == model


def test_a_configuration_is_read_directly_only_where_it_says_everything(tmp_path):
    from llmq.models.config import plain_config

    stated = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    stated |= {"num_hidden_layers": 1, "vocab_size": 9, "max_position_embeddings": 32, "rms_norm_eps": 1e-5}
    stated |= {"num_key_value_heads": 4, "tie_word_embeddings": False, "eos_token_id": 2, "rope_theta": 1e4}

    def read(changes, without=()):
        kept = {key: value for key, value in (stated | changes).items() if key not in without}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        return plain_config(tmp_path)

    found = read({"torch_dtype": "bfloat16"})
    assert found.vocab_size == 9 and found.dtype == "bfloat16" and copy.deepcopy(found) == found
    assert not hasattr(found, "quantization_config")
    assert all(read({}, without=[key]) is None for key in stated if key != "model_type")
    assert read({"model_type": "mistral"}) is None and read({"model_type": "mistral", "sliding_window": None})
    assert read({"model_type": "t5"}) is None and read({"hidden_size": "many"}) is None
    (tmp_path / "config.json").write_text("{")
    assert plain_config(tmp_path) is None
