"""`llmq.quantize`: a loaded transformers model converted in place, by any method's spelling."""

from __future__ import annotations

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from tiny_runs import light
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import llmq
from llmq.errors import BadChoice
from llmq.methods import METHODS
from llmq.methods.layers.linear_8bit import layers_of
from llmq.transformers import Int8Config

IDS = torch.tensor([list(b"Hello LLaMA")])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with light():
        yield


@pytest.fixture
def folder(tmp_path):
    tiny_llama(torch.float16, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "origin")
    byte_tokenizer().save_pretrained(tmp_path / "origin")
    return tmp_path / "origin"


def opened(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, **settings)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits.float()


def test_llm_int8_is_what_the_configuration_loads(folder, tmp_path):
    model = opened(folder)
    assert llmq.quantize(model, "llm-int8@1") is model
    loaded = opened(folder, quantization_config=Int8Config(threshold=1))
    assert [name for name, _ in layers_of(model)] == [name for name, _ in layers_of(loaded)]
    assert torch.equal(logits(model), logits(loaded))
    model.save_pretrained(tmp_path / "saved")
    again = opened(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model)) and again.model.layers[0].mlp.up_proj.threshold == 1.0
    theirs = opened(tmp_path / "saved", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert (logits(theirs) - logits(model)).norm() < 2e-2 * logits(model).norm()


def test_llm_int8_takes_the_codes_of_bitsandbytes_and_the_type_of_the_model(folder):
    theirs = opened(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert torch.equal(logits(llmq.quantize(theirs)), logits(llmq.quantize(opened(folder))))
    brain = llmq.quantize(opened(folder, dtype=torch.bfloat16))
    assert brain.dtype == brain(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if name != "llm-int8"])
def test_every_method_converts_in_place(name, folder, tmp_path):
    method, dense = METHODS[name], logits(opened(folder))
    text = {"text": "Hello LLaMA, how are you today?" * 4} if method.calibrated else {}
    model = opened(folder)
    assert llmq.quantize(model, method, **text) is model and not model.training
    assert (logits(model) - dense).norm() < 0.5 * dense.norm()
    if method.dense:
        return model.save_pretrained(tmp_path / "saved")
    with pytest.raises(BadChoice, match=f"under {name} cannot be saved"):
        model.save_pretrained(tmp_path / "saved")


def test_a_text_may_be_token_ids_and_longer_than_the_context(folder):
    words = "Hello LLaMA, how are you today?" * 12
    by_text = llmq.quantize(opened(folder), "smoothquant", text=words)
    ids = llmq.quantize(opened(folder), "smoothquant", text=byte_tokenizer()(words)["input_ids"])
    assert torch.equal(logits(by_text), logits(ids))


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("int9", {}, "unknown method 'int9'; choose from"),
        ("llm-int8@-1", {}, "threshold"),
        ("smoothquant", {}, "smoothquant is calibrated: give it a text"),
        ("smoothquant", {"text": ""}, "smoothquant is calibrated: give it a text"),
        ("llm-int8", {"text": "Hello"}, "llm-int8 reads no text"),
    ],
)
def test_a_wrong_value_is_one_sentence(method, settings, words, folder):
    with pytest.raises(BadChoice, match=words) as refusal:
        llmq.quantize(opened(folder), method, **settings)
    assert "\n" not in str(refusal.value)


def test_what_cannot_be_converted_is_one_sentence(folder):
    model = llmq.quantize(opened(folder))
    for given, words in (
        (model, "quantized already"),
        (torch.nn.Linear(4, 4), "Linear is no model of transformers"),
        (opened(folder).to("meta"), "on meta; load it on one device"),
    ):
        with pytest.raises(BadChoice, match=words):
            llmq.quantize(given)
    nowhere = tiny_llama(torch.float16)
    with pytest.raises(BadChoice, match="give token ids as text"):
        llmq.quantize(nowhere, "smoothquant", text="Hello")
