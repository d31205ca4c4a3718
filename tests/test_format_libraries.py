"""Checkpoints through the libraries of the field: they open ours, we open theirs, and the codes are equal.

compressed-tensors runs wherever the tests' requirements are installed; GPTQModel (with optimum) where somebody put it:
versions 0.20 and 7.7 were tried on a CPU.
"""

from __future__ import annotations

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from test_formats import IDS, UP, engine, made, saved
from tiny_runs import engine_of, light
from transformers import AutoModelForCausalLM

from llmq.machine.door import Machine
from llmq.methods.layers.packed_linear import unpack
from llmq.models.formats.gptq import GptqFormat

PACKED = [(4, 32, False), (4, 16, True), (8, None, False), (3, 32, False), (8, None, True)]


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    return made(tmp_path_factory.mktemp("origin"))


def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().requires_grad_(False)


def logits(model) -> torch.Tensor:
    return model(torch.tensor([IDS])).logits[0]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference, as a share of b's standard deviation."""
    return ((a.float() - b.float()).square().mean().sqrt() / b.float().std()).item()


@pytest.mark.parametrize("method", ["rtn@4:group=32", "rtn@8:group=0", "rtn@3:group=16", "gptq@4:group=32"])
def test_compressed_tensors_opens_our_packed_codes(method, origin, tmp_path):
    """Through plain transformers: the same FP16 numbers, so the same logits, bit for bit."""
    pytest.importorskip("compressed_tensors")
    saved(origin, tmp_path / "x", method, "--format", "compressed-tensors")
    assert torch.equal(logits(theirs(tmp_path / "x")), engine(tmp_path / "x", method).logits(IDS))


@pytest.mark.parametrize("method", ["vectorwise", "fp8", "fp8@tensor"])
def test_compressed_tensors_opens_our_w8a8(method, origin, tmp_path):
    """The weights are equal within the rounding of a scale to 16 bit; activations are rounded by the library's own
    code, int8 on steps of absmax / 127.5 and not / 127, so that logits agree as two roundings do."""
    pytest.importorskip("compressed_tensors")
    saved(origin, tmp_path / "x", method)
    model, ours = theirs(tmp_path / "x"), engine(tmp_path / "x", method)
    found = logits(model)  # the library unpacks the weights when they are first used
    layer = ours.model.get_submodule(UP)
    scale = layer.scale if hasattr(layer, "scale") else layer.absmax / 127
    torch.testing.assert_close(model.get_submodule(UP).weight.float(), layer.weight.float() * scale, rtol=2**-7, atol=0)
    assert distance(found, ours.logits(IDS)) < (0.03 if method == "vectorwise" else 0.08)


def of_compressed_tensors(folder, bits: int, group: int | None, symmetric: bool) -> dict[str, torch.Tensor]:
    """What the library makes of the tiny model, in `folder`; returns the codes of every layer, from 0."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
        quantize,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model, codes = tiny_llama(torch.float16, hidden_size=64, intermediate_size=128, initializer_range=0.1), {}
    weights = QuantizationArgs(
        num_bits=bits, group_size=group, symmetric=symmetric, strategy="group" if group else "channel"
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(model, config)
    for name, layer in model.named_modules():
        if hasattr(layer, "quantization_scheme"):
            groups = layer.weight.view(len(layer.weight), -1, group or layer.in_features)
            scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), weights)
            layer.weight_scale.data[:], layer.weight_zero_point.data[:] = scale, zero
            made = quantize(layer.weight, scale, zero, weights, dtype=torch.int8)
            codes[name] = made.int() + 2 ** (bits - 1)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    byte_tokenizer().save_pretrained(folder)
    return codes


@pytest.mark.parametrize(("bits", "group", "symmetric"), PACKED)
def test_we_open_what_compressed_tensors_packs(bits, group, symmetric, tmp_path):
    pytest.importorskip("compressed_tensors")
    codes = of_compressed_tensors(tmp_path, bits, group, symmetric)
    found = engine(tmp_path, f"rtn@{bits}:group={group or 0}")
    for name, expected in codes.items():
        layer = found.model.get_submodule(name)
        assert torch.equal(unpack(layer.weight, bits, layer.in_features).int(), expected)
    assert len(codes) == 14
    config = {"quantization_config": dequantizing()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16, **config).eval()
    assert torch.equal(found.logits(IDS), logits(model.requires_grad_(False)))


def dequantizing():
    from transformers import CompressedTensorsConfig

    return CompressedTensorsConfig(dequantize=True)


@pytest.mark.parametrize(
    "method", ["gptq@4:group=32", "gptq@8:group=32:act_order=off", "gptq@3:group=64", "rtn@4:group=32"]
)
def test_gptqmodel_opens_our_gptq(method, origin, tmp_path):
    pytest.importorskip("gptqmodel")
    saved(origin, tmp_path / "x", method, "--format", "gptq")
    assert distance(logits(theirs(tmp_path / "x")), engine(tmp_path / "x", method).logits(IDS)) < 2e-3


@pytest.mark.parametrize("method", ["nf4", "bnb-int8"])
def test_bitsandbytes_opens_ours(method, origin, tmp_path):
    saved(origin, tmp_path / "x", method)
    assert torch.equal(logits(theirs(tmp_path / "x")), engine_of(Machine(), origin, method).logits(IDS))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("mixed", [False, True])
def test_we_open_what_gptqmodel_packs(mixed, bits):
    """Also with `desc_act`, where the inputs of a group are no neighbours."""
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    codes, zero = torch.randint(0, 2**bits, (32, 64)), torch.randint(1, 2**bits, (32, 2))
    owners = torch.arange(64) % 2 if mixed else torch.arange(64) // 32
    scale, linear = torch.rand(32, 2).half() + 0.5, torch.nn.Linear(64, 32, bias=False)
    linear.weight.data = (codes - zero[:, owners]) * scale.float()[:, owners]
    made = TorchLinear(bits=bits, group_size=32, sym=False, desc_act=mixed, in_features=64, out_features=32)
    made.pack_original(linear, scale, zero.float(), owners.int())
    settings = {"bits": bits, "group_size": 32, "desc_act": mixed, "checkpoint_format": "gptq_v2"}
    found = GptqFormat().read(dict(made.named_buffers()), settings)
    assert torch.equal(unpack(found.weight, bits, 64).long(), codes) and torch.equal(found.zero.long(), zero)
    assert torch.equal(found.dense(), linear.weight) and (found.owners is None) != mixed
