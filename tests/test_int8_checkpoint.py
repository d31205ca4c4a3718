"""Int8 checkpoints: transformers opens ours, we open transformers', and nobody calls rounded weights FP16."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from safetensors import safe_open
from tiny_runs import key_of

from llmq.cli import main
from llmq.errors import BadChoice
from llmq.machine.door import Machine
from llmq.models import int8_checkpoint
from llmq.models.int8_checkpoint import save_int8
from llmq.models.loading import resolve

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


@pytest.fixture(scope="module")
def theirs(origin, tmp_path_factory):
    """What transformers itself saves of the model it quantized with bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("theirs")
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        origin, quantization_config=config, dtype=torch.float16, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


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
    monkeypatch.setattr(int8_checkpoint, "SHARD_BYTES", 5000)
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

    (tmp_path / ".llmq-int8-0123").mkdir()  # of a process that was killed

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(int8_checkpoint, "_write_settings", full)
    assert main(["models", "--save-int8", str(origin), str(tmp_path / "half")]) == 2
    assert "No space left" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_the_folder_has_the_permissions_of_any_new_folder(ours, tmp_path):
    (tmp_path / "any").mkdir()
    assert ours.stat().st_mode == (tmp_path / "any").stat().st_mode
