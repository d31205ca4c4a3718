"""Checkpoints of the field: what `quantize` writes is opened by us and by the libraries, and theirs by us."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file
from tiny_runs import engine_of, key_of, light

import llmq
from llmq.cli import main
from llmq.engine.loading import load_engine, needs_statistics
from llmq.errors import BadChoice, ModelUnavailable, UserError
from llmq.machine.door import Machine
from llmq.methods import METHODS, parse_method
from llmq.methods.layers.packed_linear import Grid, PackedLinear
from llmq.models import writing
from llmq.models.formats import format_for
from llmq.quantizing import Quantization

IDS = list(b"Hello LLaMA, how are you?")
UP = "model.layers.0.mlp.up_proj"
GPTQ_4 = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False}


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


def made(folder, dtype=torch.float16, **shape):
    """A model whose layers are as wide as every format needs them."""
    small = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1, "max_position_embeddings": 1024}
    tiny_llama(dtype, **small | shape).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "LICENSE.txt").write_text("ours")
    return folder


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return made(tmp_path_factory.mktemp("origin"))


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def saved(origin, folder, method: str, *options) -> dict:
    """Quantize at the command line; what `--json` prints. Raises UserError with what is printed where it is refused."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        given = ["quantize", origin, "--method", method, "--save", folder, "--device", "cpu", "--json", *options]
        status = main([str(argument) for argument in given])
    if status == 2:
        raise UserError(err.getvalue().splitlines()[-1])
    return json.loads(out.getvalue().splitlines()[-1])


def engine(folder, method: str):
    return load_engine(key_of(folder, method))


def contents(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def packed(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int) -> PackedLinear:
    return PackedLinear(codes, scale.half(), zero.to(torch.uint8), Grid(4, group), None)


def hex_words(tensor: torch.Tensor) -> list[list[str]]:
    return [[f"{word & 0xFFFFFFFF:08x}" for word in row] for row in tensor.tolist()]


# Packing, by hand


def eight_rows() -> PackedLinear:
    """Row r holds r, r+1, ... in one group of 8 inputs, with a zero-point of r + 1."""
    rows = torch.arange(8)
    return packed(rows[:, None] + torch.arange(8), rows[:, None] + 1.0, rows[:, None] + 1, group=8)


def test_gptq_packs_inputs_downwards_and_outputs_sideways():
    form = format_for(METHODS["gptq"])
    found = form.write(eight_rows(), {"checkpoint_format": "gptq"})
    columns = ["76543210", "87654321", "98765432", "a9876543", "ba987654", "cba98765", "dcba9876", "edcba987"]
    assert hex_words(found["qweight"]) == [columns]
    assert hex_words(found["qzeros"]) == [["76543210"]], "the first format stores the zero-point less one"
    assert found["scales"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] and found["g_idx"].tolist() == [0] * 8
    assert hex_words(form.write(eight_rows(), {"checkpoint_format": "gptq_v2"})["qzeros"]) == [["87654321"]]


def test_compressed_tensors_packs_inputs_sideways_and_zero_points_downwards():
    found = format_for(METHODS["rtn"]).write(eight_rows(), {})
    assert hex_words(found["weight_packed"])[:2] == [["76543210"], ["87654321"]]
    assert hex_words(found["weight_zero_point"]) == [["87654321"]]
    assert found["weight_scale"].shape == (8, 1) and found["weight_shape"].tolist() == [8, 8]


def test_three_bits_leave_none_over():
    """Eleven codes are 33 bits: two words, the last code's highest bit in the second."""
    layer = PackedLinear(torch.full((1, 11), 7), torch.ones(1, 1).half(), torch.zeros(1, 1).byte(), Grid(3, 0), None)
    assert hex_words(format_for(METHODS["rtn"]).write(layer, {})["weight_packed"]) == [["ffffffff", "00000001"]]


FORMS = {"rtn": {}, "gptq": {"checkpoint_format": "gptq"}}
SETTINGS = {
    "rtn": lambda bits, group: {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"weights": {"type": "int", "num_bits": bits, "group_size": group}}},
    },
    "gptq": lambda bits, group: GPTQ_4 | {"bits": bits, "group_size": group or -1},
}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("method", FORMS)
def test_a_layer_comes_back_code_for_code(method, group, bits):
    form, grid = format_for(METHODS[method]), Grid(bits, group)
    zero = torch.randint(1, 2**bits, (32, grid.groups(64)))
    layer = PackedLinear(
        torch.randint(0, 2**bits, (32, 64)), torch.rand(zero.shape).half(), zero.byte(), grid, bias=None
    )
    back = form.read(form.write(layer, FORMS[method]), SETTINGS[method](bits, group))
    for name in ("weight", "scale", "zero"):
        assert torch.equal(getattr(back, name), getattr(layer, name)), name
    assert back.grid == grid and back.owners is None and torch.equal(back.dense(), layer.dense())


def test_groups_that_are_no_neighbours_keep_their_inputs():
    """As GPTQ with `desc_act` stores them: g_idx says which group an input is of."""
    form, layer = format_for(METHODS["gptq"]), eight_rows()
    layer = packed(torch.arange(64).view(8, 8) % 16, torch.rand(8, 2) + 1, torch.full((8, 2), 3), group=4)
    parts = form.write(layer, FORMS["gptq"]) | {"g_idx": torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]).int()}
    back = form.read(parts, GPTQ_4 | {"group_size": 4})
    expected = (torch.arange(64).view(8, 8) % 16 - 3.0) * layer.scale.float()[:, [0, 1] * 4]
    assert torch.equal(back.dense(), expected)


def test_a_zero_point_of_0_takes_the_second_format():
    """In the first it would be stored as -1, which GPTQModel lets borrow from its neighbour."""
    form = format_for(METHODS["gptq"])
    for zero, version in ((1, "gptq"), (0, "gptq_v2")):
        layer = packed(torch.zeros(32, 32), torch.ones(32, 1), torch.full((32, 1), zero), group=32)
        assert form.settings(parse_method("gptq@group=32"), {"x": layer})["checkpoint_format"] == version


# What is written is opened again

WRITTEN = {
    "rtn@4:group=32": "compressed-tensors",
    "rtn@8:group=0": "compressed-tensors",
    "rtn@3:group=16": "compressed-tensors",
    "gptq@4:group=32": "gptq",
    "gptq@8:group=64:act_order=off": "gptq",
    "awq@4:group=32:folded=on": "compressed-tensors",
    "vectorwise": "compressed-tensors",
    "fp8": "compressed-tensors",
    "fp8@tensor": "compressed-tensors",
    "nf4": "bitsandbytes",
    "llm-int8": "bitsandbytes",
    "int8-weight-only": "bitsandbytes",
}


@pytest.mark.parametrize("method", WRITTEN)
def test_what_is_written_is_the_same_model_again(method, origin, tmp_path):
    told = saved(origin, folder := tmp_path / "saved", method)
    assert (told["format"], told["method"]) == (WRITTEN[method], parse_method(method).spelled)
    assert told["weight_bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    expected = engine_of(Machine(), origin, method)
    found = engine(folder, method)
    assert torch.equal(found.logits(IDS), expected.logits(IDS))
    assert found.weight_bytes + found.scale_bytes == expected.weight_bytes + expected.scale_bytes
    assert (folder / "LICENSE.txt").read_text() == "ours" and (folder / "generation_config.json").is_file()
    assert (folder / "tokenizer.json").read_bytes() == (origin / "tokenizer.json").read_bytes()


def test_folded_smoothing_is_written_but_for_the_rounding_of_its_norms(origin, tmp_path):
    """The emulation keeps the divided norms in FP32, a checkpoint in 16 bit."""
    saved(origin, tmp_path / "x", "smoothquant@folded=on")
    expected = engine_of(Machine(), origin, "smoothquant@folded=on").logits(IDS)
    found = engine(tmp_path / "x", "smoothquant@folded=on").logits(IDS)
    assert (found - expected).square().mean().sqrt() < 0.03 * expected.std()


@pytest.mark.parametrize("shape", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}], ids=str)
@pytest.mark.parametrize("method", ["rtn@4:group=32", "gptq@4:group=32", "fp8"])
def test_tied_heads_and_biases_travel(method, shape, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 20_000)
    origin = made(tmp_path / "origin", **shape)
    saved(origin, tmp_path / "saved", method)
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    assert torch.equal(engine(tmp_path / "saved", method).logits(IDS), engine_of(Machine(), origin, method).logits(IDS))


def test_python_writes_as_the_command_does(origin, tmp_path):
    told = llmq.save_quantized(str(origin), METHODS["nf4"], tmp_path / "nf4", device="cpu")
    assert told["folder"] == str(tmp_path / "nf4") and engine(tmp_path / "nf4", "nf4").logits(IDS).isfinite().all()


def test_a_calibration_travels_where_it_is_wanted(origin, tmp_path):
    told = saved(origin, tmp_path / "with", "gptq@4:group=32")
    found = load_file(tmp_path / "with" / "calibration" / "even-second-moments.safetensors")
    assert told["calibration"] == str(tmp_path / "with" / "calibration") and found[UP].shape == (65, 64)
    assert saved(origin, tmp_path / "without", "gptq@4:group=32", "--no-statistics")["calibration"] is None
    key = key_of(tmp_path / "without", "gptq@4:group=32")
    assert not needs_statistics(key), "what is quantized already is not calibrated"
    assert torch.equal(load_engine(key).logits(IDS), engine(tmp_path / "with", "gptq@4:group=32").logits(IDS))


# Labels


def test_a_folder_opens_under_the_method_that_wrote_it(origin, tmp_path):
    saved(origin, tmp_path / "saved", "gptq@4:group=32", "--format", "compressed-tensors")
    for method in ("fp16", "rtn@4:group=32", "gptq@4:group=64", "nf4", "llm-int8"):
        with pytest.raises(BadChoice, match="holds compressed-tensors weights: choose gptq@group=32"):
            engine(tmp_path / "saved", method)


def unsigned(folder):
    """Without our own word of who wrote it, as a library's folder is."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: v for name, v in config.items() if name != "llmq"}))
    return folder


def test_codes_of_a_library_open_under_any_method_of_such_codes(origin, tmp_path):
    saved(origin, tmp_path / "saved", "rtn@4:group=32")
    unsigned(tmp_path / "saved")
    logits = [
        engine(tmp_path / "saved", name).logits(IDS)
        for name in ("rtn@group=32", "gptq@group=32", "awq@group=32:folded=on")
    ]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    with pytest.raises(BadChoice, match="choose awq@group=32:folded=on or gptq@group=32 or rtn@group=32"):
        engine(tmp_path / "saved", "rtn@group=64")


# What cannot be done

REFUSED = {
    "fp16": ("fp16", (), "fp16 quantizes nothing"),
    "no such format": ("rtn", ("--format", "gguf"), "unknown format 'gguf'; choose from compressed-tensors, gptq"),
    "another format": ("nf4", ("--format", "gptq"), "gptq does not hold nf4; choose from bitsandbytes"),
    "factors of their own": ("awq@4:group=32", (), "no format has a place for them: choose it with folded=on"),
    "SmoothQuant's": ("smoothquant", (), "no format has a place for them: choose it with folded=on"),
    "no format": ("zeropoint", (), "no checkpoint format holds zeropoint"),
    "a group that does not divide": ("rtn@4:group=48", (), "groups of 48 do not divide the 64 inputs of model.layers"),
    "nor GPTQ's": ("gptq@4:group=48", (), "model.layers.0.self_attn.q_proj is 64 x 64 in groups of 48"),
    "bits": ("rtn@9", (), "9"),
    "outliers of each row": ("llm-int8@outliers=row", (), "no checkpoint format holds llm-int8@outliers=row"),
    "16-bit weights beside": ("llm-int8@outlier_weights=16", (), "no checkpoint format holds llm-int8@outlier_weights"),
    "five bits": ("gptq@5:group=32", ("--format", "gptq"), "gptq does not hold gptq@5:group=32"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_format_holds_is_refused_in_a_sentence(kind, origin, tmp_path, capsys):
    method, options, words = REFUSED[kind]
    with pytest.raises(UserError, match=words):
        saved(origin, tmp_path / "x", method, *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("typed", "threshold"), [("llm-int8", 6), ("bnb-int8@4", 4), ("llm-int8@inf", 0)])
def test_the_threshold_of_a_method_is_in_the_folder(typed, threshold, origin, tmp_path):
    saved(origin, tmp_path / "x", typed)
    said = json.loads((tmp_path / "x" / "config.json").read_text())["quantization_config"]
    assert said["load_in_8bit"] and said["llm_int8_threshold"] == threshold
    with pytest.raises(BadChoice, match="holds int8 weights: choose bnb-int8, llm-int8"):
        engine(tmp_path / "x", "llm-int8@outlier_weights=16")


def test_nothing_is_overwritten_nor_quantized_twice(origin, tmp_path):
    saved(origin, tmp_path / "once", "nf4")
    with pytest.raises(UserError, match="once exists; choose a folder that does not"):
        saved(origin, tmp_path / "once", "gptq")
    with pytest.raises(UserError, match="once is quantized already: choose a model in 16 or 32 bit"):
        saved(tmp_path / "once", tmp_path / "twice", "rtn@4:group=32")


def test_a_full_disk_leaves_nothing(origin, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
        with pytest.raises(UserError, match="under nf4 needs 0 MB"):
            saved(origin, tmp_path / "x", "nf4")
    monkeypatch.setattr(writing.shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left"):
        saved(origin, tmp_path / "x", "nf4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["calibrating gptq: window 2", "writing"])
def test_a_stop_halfway_leaves_nothing(when, origin, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMQ_CACHE", str(tmp_path / "cache"))
    question = Quantization(
        model=str(origin), method=parse_method("gptq@group=32"), folder=tmp_path / "x", device="cpu"
    )
    stop, told = threading.Event(), []
    for item in Machine().run(question, stop=stop):
        told.append(getattr(item, "message", ""))
        if told[-1].startswith(when):
            stop.set()
    assert told[-1].startswith(when), "nothing comes after the stop"
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]
    assert bool(list((tmp_path / "cache").rglob("*.safetensors"))) == (when == "writing"), "no half a calibration"


# What a folder may hold


def of_gptq(folder, origin, **settings):
    """A checkpoint in GPTQ's format, whose config.json is then changed."""
    saved(origin, folder, "gptq@4:group=32", "--no-statistics")
    config = json.loads((unsigned(folder) / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CHANGED = {
    "other bits": ({"bits": 5}, "GPTQ of 5 bits"),
    "another format": ({"checkpoint_format": "marlin"}, "in the format 'marlin' is not read here"),
    "layers of their own": ({"dynamic": {"x": {"bits": 8}}}, "not read here"),
    "another library": ({"quant_method": "hqq"}, "holds hqq weights: choose a model in 16 or 32 bit"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_settings_that_nothing_here_reads_are_refused(kind, origin, tmp_path):
    changes, words = CHANGED[kind]
    folder = of_gptq(tmp_path / "x", origin, **changes)
    with pytest.raises((BadChoice, ModelUnavailable), match=words) as caught:
        engine(folder, "gptq@4:group=32")
    assert "\n" not in str(caught.value)


DAMAGED = {
    "a part missing": (lambda t: t.pop(f"{UP}.scales"), f"cannot read {UP}"),
    "another width": (lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:4].clone()}), "up_proj.weight"),
    "no layer": (lambda t: [t.pop(name) for name in list(t) if ".q" in name and "weight" in name], "is not quantized"),
    "a layer missing": (lambda t: [t.pop(name) for name in list(t) if name.startswith(UP)], "no tensor"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_checkpoint_is_refused(kind, origin, tmp_path):
    change, words = DAMAGED[kind]
    folder = of_gptq(tmp_path / "x", origin)
    tensors = contents(folder)
    change(tensors)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match=words) as caught:
        engine(folder, "gptq@4:group=32")
    assert "\n" not in str(caught.value)


def test_an_older_file_without_its_version_is_the_first_format(origin, tmp_path):
    folder = of_gptq(tmp_path / "x", origin)
    before = engine(folder, "gptq@4:group=32").logits(IDS)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["checkpoint_format"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(engine(folder, "gptq@4:group=32").logits(IDS), before)
