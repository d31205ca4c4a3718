"""Odd checkpoints: each is one and the same model in both loops and in transformers, or refused by both loops alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import torch
import transformers
from conftest import byte_tokenizer
from safetensors.torch import load_file, save_file
from tiny_runs import key_of, light, source_of
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, modeling_utils

from llmq.engine.choice import choose_engines
from llmq.errors import ModelUnavailable
from llmq.kernels.cpu.build import why_not_native
from llmq.machine.pool import load_engine
from llmq.methods import parse_method
from llmq.models.config import ignored_settings
from llmq.models.loading import ids_within, load_config, load_tokenizer

IDS = list(b"Hello LLaMA, how are you?")
END = 257  # in every configuration and in the tokenizer
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


def made(folder: Path, family: str = "Llama", *, dtype=torch.float32, parts: bool = False, part=None, **shape) -> Path:
    """A random model of a family in `folder`, no two numbers of it alike. `part` picks what of it is saved."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "vocab_size": 272, "max_position_embeddings": 128, "initializer_range": 0.2}
    config = getattr(transformers, f"{family}Config")(**(small | {"eos_token_id": END, "bos_token_id": 256} | shape))
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data = ("norm" in name) + 0.3 * torch.randn_like(parameter)
    saved = part(model) if part else model
    saved.save_pretrained(folder, **({"max_shard_size": "40kB"} if parts else {}))
    byte_tokenizer().save_pretrained(folder)
    return folder


def in_config(folder: Path, without: tuple[str, ...] = (), file: str = "config.json", **changes) -> None:
    path = folder / file
    values = {name: value for name, value in json.loads(path.read_text()).items() if name not in without}
    path.write_text(json.dumps(values | changes))


def in_weights(folder: Path, change, file: str = WHOLE) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def model(*args, edit=lambda folder: None, **kinds):
    """A recipe: make the model, then edit what was saved."""

    def build(folder: Path) -> None:
        made(folder, *args, **kinds)
        edit(folder)

    return build


def noise(folder: Path, name: str) -> None:
    """Another model's weights beside the model's own."""
    other = {key: torch.randn_like(value) for key, value in load_file(next(folder.glob("model*.safetensors"))).items()}
    (folder / name).parent.mkdir(exist_ok=True)
    save_file(other, folder / name, metadata={"format": "pt"})


def stale_index(folder: Path) -> None:
    noise(folder, "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(folder / WHOLE), "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def in_two_parts(folder: Path) -> None:
    """One tensor in two files, with other numbers: whatever the index says of it, transformers keeps the last."""
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    name = next(iter(load_file(last)))
    in_weights(folder, lambda tensors: tensors.update({name: 2 * load_file(last)[name]}), first.name)


def own_head(folder: Path, scale: float) -> None:
    in_weights(folder, lambda t: t.update({"lm_head.weight": scale * t["model.embed_tokens.weight"].clone()}))


def head_alone(folder: Path) -> None:
    in_weights(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))


def old_rope(folder: Path) -> None:
    settings = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    in_config(folder, ("rope_parameters",), rope_scaling=settings, rope_theta=5e5)


def no_words(folder: Path) -> None:
    (folder / "generation_config.json").unlink()


def chat(folder: Path) -> None:
    """As a chat model's: its turns end with a token that only the tokenizer knows of."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)


TIED = {"tie_word_embeddings": True}
DENSE = {
    "LLaMA": model(),
    "FP16": model(dtype=torch.float16),
    "BF16": model(dtype=torch.bfloat16),
    "tied": model(**TIED),
    "in parts": model(parts=True),
    "tied, in parts": model(parts=True, **TIED),
    "one key/value head": model(num_key_value_heads=1),
    "biases": model(attention_bias=True),
    "wide heads": model(head_dim=16),
    "llama3 rope": model(rope_parameters=LLAMA3),
    "linear rope": model(rope_parameters=LINEAR),
    "old rope": model(edit=old_rope),
    "two ropes": model(rope_parameters=LLAMA3, edit=lambda f: in_config(f, rope_scaling=LINEAR)),
    "Mistral": model("Mistral", sliding_window=None),
    "Mistral, a window over all": model("Mistral", sliding_window=128),
    "Mistral that says it has biases": model("Mistral", sliding_window=None, attention_bias=True),
    "Qwen2": model("Qwen2"),
    "Qwen2, tied, in parts": model("Qwen2", parts=True, **TIED),
    "consolidated beside": model(edit=lambda f: noise(f, "consolidated.safetensors")),
    "consolidated beside parts": model(parts=True, edit=lambda f: noise(f, "consolidated.00.safetensors")),
    "copies beside": model(edit=lambda f: [noise(f, "model.fp16.safetensors"), noise(f, f"original/{WHOLE}")]),
    "a part too many": model(parts=True, edit=lambda f: noise(f, "model-00009-of-00009.safetensors")),
    "an index of old parts": model(edit=stale_index),
    "a tensor in two parts": model(parts=True, edit=in_two_parts),
    "a tensor too many": model(edit=lambda f: in_weights(f, lambda t: t.update({"x.inv_freq": torch.ones(3)}))),
    "tied, its head there too": model(**TIED, edit=lambda f: own_head(f, 1.0)),
    "tied in name only": model(**TIED, edit=lambda f: own_head(f, 0.5)),
    "tied, under the head's name": model(**TIED, edit=head_alone),
    "a decoder by itself": model(part=lambda model: model.model, **TIED),
    "torch_dtype": model(dtype=torch.bfloat16, edit=lambda f: in_config(f, ("dtype",), torch_dtype="bfloat16")),
    "no type": model(dtype=torch.float16, edit=lambda f: in_config(f, ("dtype",))),
    "says little": model(edit=lambda f: in_config(f, ("tie_word_embeddings", "rms_norm_eps", "attention_bias"))),
}
HANDED_OVER = {
    "yarn rope": model(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}),
    "odd widths": model(intermediate_size=77),
    "biases in the MLP": model(mlp_bias=True),
    "Mistral, a window": model("Mistral", sliding_window=16),
    "Qwen2, a window": model("Qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "a file of another name": model(
        edit=lambda f: [noise(f, "other.safetensors"), in_config(f, transformers_weights="other.safetensors")]
    ),
}


def of(folder: Path, dtype) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0]


def engine(folder: Path, method: str, loop: str):
    return load_engine(key_of(folder, method, loop=loop))


def require_close(found: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Within a share of the logits' standard deviation, every one."""
    assert (found.float() - expected.float()).abs().max() <= share * expected.float().std()


@pytest.fixture
def opened(monkeypatch):
    """The names of the weight files that anybody opens, in order."""
    names, original = [], safetensors.safe_open

    def recorded(path, *args, **kwargs):
        names.append(Path(path).name)
        return original(path, *args, **kwargs)

    monkeypatch.setattr(safetensors, "safe_open", recorded)
    monkeypatch.setattr(modeling_utils, "safe_open", recorded)
    return names


def files_of(opened: list[str], action) -> list[str]:
    opened.clear()
    action()
    return sorted(set(opened))


@pytest.mark.parametrize("kind", [*DENSE, *HANDED_OVER])
def test_a_checkpoint_is_one_model(kind, tmp_path, opened):
    (DENSE | HANDED_OVER)[kind](tmp_path)
    exact = of(tmp_path, torch.float32)
    files = files_of(opened, lambda: of(tmp_path, torch.float16))
    found = {loop: None for loop in ("hf", "lean")}
    assert torch.equal(engine(tmp_path, "fp32", "hf").logits(IDS), logits(exact))
    assert files_of(opened, lambda: found.update(hf=engine(tmp_path, "fp16", "hf"))) == files
    assert torch.equal(found["hf"].logits(IDS), logits(of(tmp_path, torch.float16)))
    loops = choose_engines("auto", [parse_method("fp16")], load_config(source_of(tmp_path)).to_dict(), "cpu")
    if why_not_native():
        pytest.skip(why_not_native())
    assert loops == ["lean" if kind in DENSE else "hf"]
    if kind in DENSE:
        assert files_of(opened, lambda: found.update(lean=engine(tmp_path, "fp16", "lean"))) == files
        require_close(found["lean"].logits(IDS), logits(of(tmp_path, torch.float16).float()), 0.005)
        assert found["lean"].eos_ids == found["hf"].eos_ids == {END}


def quantized(**settings):
    """What transformers saves of the model under bitsandbytes."""

    def build(folder: Path) -> None:
        made(folder / "origin", dtype=torch.float16)
        config = BitsAndBytesConfig(load_in_8bit=True, **settings)
        int8 = AutoModelForCausalLM.from_pretrained(
            folder / "origin", quantization_config=config, dtype=torch.float16, device_map={"": "cpu"}
        )
        int8.save_pretrained(folder, **({"max_shard_size": "20kB"} if settings.get("llm_int8_threshold") else {}))
        byte_tokenizer().save_pretrained(folder)

    return build


INT8 = {
    "int8": quantized(),
    "int8, in parts": quantized(llm_int8_threshold=6.0),
    "int8, a layer kept": quantized(llm_int8_skip_modules=["lm_head", "model.layers.1.mlp.down_proj"]),
    "int8, the head too": quantized(llm_int8_skip_modules=[]),
}


def dequantized(folder: Path) -> torch.nn.Module:
    """The model that an int8 checkpoint's codes and scales mean, in FP32."""
    whole, stored = of(folder / "origin", torch.float32), {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    for name in [name.removesuffix(".SCB") for name in stored if name.endswith(".SCB")]:
        weight = stored[f"{name}.weight"] * stored[f"{name}.SCB"].view(-1, 1) / 127
        whole.get_submodule(name).weight.data = weight
    return whole


@pytest.mark.parametrize("kind", INT8)
def test_an_int8_checkpoint_is_one_model(kind, tmp_path):
    INT8[kind](tmp_path)
    assert torch.equal(engine(tmp_path, "bnb-int8", "hf").logits(IDS), logits(of(tmp_path, torch.float16)))
    expected = logits(dequantized(tmp_path))
    (loop,) = choose_engines(
        "auto", [parse_method("int8-weight-only")], load_config(source_of(tmp_path)).to_dict(), "cpu"
    )
    for name, share in {"hf": 0.02, loop: 0.02 if loop == "hf" else 0.005}.items():
        require_close(engine(tmp_path, "int8-weight-only", name).logits(IDS), expected, share)


def without(*names: str):
    return lambda folder: in_weights(folder, lambda tensors: [tensors.pop(name) for name in names])


REFUSED = {
    "no head": (model(edit=without("lm_head.weight")), "no tensor 'lm_head.weight'"),
    "no head, and no word of one": (
        model(edit=lambda f: [without("lm_head.weight")(f), in_config(f, ("tie_word_embeddings",))]),
        "no tensor 'lm_head.weight'",
    ),
    "no embedding": (model(edit=without("model.embed_tokens.weight")), "no tensor 'model.embed_tokens.weight'"),
    "neither of a tied pair": (model(**TIED, edit=without("model.embed_tokens.weight")), "no tensor"),
    "a layer too few": (model(edit=lambda f: in_config(f, num_hidden_layers=3)), "no tensor 'model.layers.2."),
    "no biases": (model(edit=lambda f: in_config(f, attention_bias=True)), "no tensor 'model.layers.0.self_attn.k?"),
    "another width": (model(edit=lambda f: in_config(f, intermediate_size=48)), r"is \((64, 32|32, 64)\); the conf"),
    "another vocabulary": (
        model(edit=lambda f: in_config(f, vocab_size=288)),
        r"272(, 32\)| rows); the configuration says \(288, 32\)",
    ),
}


@pytest.mark.parametrize("loop", ["hf", "lean"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_whole_is_refused_alike(kind, loop, tmp_path):
    build, words = REFUSED[kind]
    build(tmp_path)
    with pytest.raises(ModelUnavailable, match=words) as caught:
        engine(tmp_path, "fp16", loop)
    assert "\n" not in str(caught.value)


GENERATION = {
    "all three say it": (lambda folder: None, {END}),
    "no generation settings": (no_words, {END}),
    "settings without an end": (lambda f: in_config(f, ("eos_token_id",), "generation_config.json"), {END}),
    "settings with two": (
        lambda f: in_config(f, file="generation_config.json", eos_token_id=[260, 261]),
        {END, 260, 261},
    ),
    "the configuration has none": (lambda f: in_config(f, eos_token_id=None), {END}),
    "another in the configuration": (lambda f: in_config(f, eos_token_id=262), {END, 262}),
    "a chat model": (chat, {END, 259}),
}


@pytest.mark.parametrize("loop", ["hf", "lean"])
@pytest.mark.parametrize("kind", GENERATION)
def test_a_text_ends_at_every_end_that_is_named(kind, loop, tmp_path):
    edit, ends = GENERATION[kind]
    edit(made(tmp_path))
    found = engine(tmp_path, "fp16", loop)
    assert found.eos_ids == ends
    if loop == "hf":  # what looks into the model asks the model itself
        assert set(found.model.generation_config.eos_token_id) == ends


def test_settings_that_nothing_here_follows_are_named(tmp_path):
    assert ignored_settings(made(tmp_path)) == ()
    asked = {"repetition_penalty": 1.05, "suppress_tokens": [3], "temperature": 0.7, "top_p": 0.8, "min_length": 0}
    in_config(tmp_path, file="generation_config.json", **asked, num_beams=1, no_repeat_ngram_size=3, bad_words_ids=None)
    assert ignored_settings(tmp_path) == ("repetition_penalty 1.05", "suppress_tokens [3]", "no_repeat_ngram_size 3")
    no_words(tmp_path)
    assert ignored_settings(tmp_path) == ()


def test_a_token_that_the_model_has_not_is_an_error(tmp_path):
    """A tokenizer with more tokens than the embedding has rows: no other token's row is taken for it."""
    config = load_config(source_of(made(tmp_path)))
    assert ids_within(config, [0, 271]) == [0, 271]
    for ids in ([5, 272], [-1]):
        with pytest.raises(ModelUnavailable, match=rf"token {ids[-1]} is beyond the model's 272"):
            ids_within(config, ids)


def test_only_a_borrowed_tokenizer_is_folded():
    from llmq.models.loading import load_config, resolve, revision_of

    source = resolve("llama-2-7b-chat", random_weights=True)
    assert ids_within(load_config(source), [31_999, 32_000, 49_151]) == [31_999, 0, 17_151]
    assert revision_of(source) == "random weights; a borrowed tokenizer"


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    """As byte-level tokenizers labelled LLaMA were opened by transformers before 5.22: without their spaces."""
    from tokenizers import decoders

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(" ", "")])
    tokenizer.save_pretrained(made(tmp_path))
    with pytest.raises(ModelUnavailable, match="loses text: 'hello world how are you today' becomes 'helloworldhow"):
        load_tokenizer(source_of(tmp_path))


@pytest.mark.parametrize("change", ["capitals", "spaces"])
def test_what_a_tokenizer_does_to_capitals_and_spaces_is_its_own(change, tmp_path):
    from tokenizers import normalizers

    tokenizer = byte_tokenizer()
    kinds = {"capitals": normalizers.Lowercase(), "spaces": normalizers.Replace(" ", "  ")}
    tokenizer.backend_tokenizer.normalizer = kinds[change]
    tokenizer.save_pretrained(made(tmp_path))
    assert load_tokenizer(source_of(tmp_path))("a")["input_ids"]


def test_the_recipes_are_many():
    assert len(DENSE | HANDED_OVER | INT8 | REFUSED) >= 40
