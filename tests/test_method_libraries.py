"""Our short versions beside the libraries that do the same: torchao's int8 and FP8, llm-compressor's GPTQ.

Each runs where somebody installed it; torchao 0.18 and llm-compressor 0.14 were tried with torch 2.13 on a CPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmq.methods import METHODS
from llmq.methods.gptq import rounded
from llmq.methods.layers.packed_linear import Grid


def weight_of_torchao(linear: nn.Linear, config: str):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False))
    model[0].weight.data = linear.weight.data.clone()
    quantization.quantize_(model, getattr(quantization, config)())
    return model[0]


@pytest.fixture
def linear():
    return nn.Linear(128, 64, bias=False).requires_grad_(False)


def test_fp8_is_torchaos_bit_for_bit(linear):
    theirs, ours = weight_of_torchao(linear, "Float8WeightOnlyConfig").weight, METHODS["fp8"].quantize(linear)
    assert torch.equal(theirs.qdata.view(torch.uint8), ours.weight.view(torch.uint8))
    assert torch.equal(theirs.scale, ours.scale)


def test_int8_weights_are_torchaos_but_for_half_a_step_in_127(linear):
    """torchao's step is absmax / 127.5 and its codes go to -128; LLM.int8() has absmax / 127 and -127."""
    theirs, absmax = weight_of_torchao(linear, "Int8WeightOnlyConfig").weight, linear.weight.abs().amax(1, keepdim=True)
    torch.testing.assert_close(theirs.scale, absmax / 127.5)
    nearest = (linear.weight / theirs.scale).round().clamp(-128, 127)
    assert (theirs.qdata != nearest).float().mean() < 0.001, "but for ties, which its reciprocal of the scale moves"
    ours = METHODS["int8-weight-only"].quantize(linear).weight
    assert (ours.int() - theirs.qdata.int()).abs().max() <= 1
    errors = [(codes.float() * scale - linear.weight).norm() for codes, scale in
              ((ours, absmax / 127), (theirs.qdata, theirs.scale))]  # fmt: skip
    assert abs(errors[0] / errors[1] - 1) < 0.05


def test_w8a8_is_as_near_as_torchaos(linear):
    x = torch.randn(32, 128)
    truth, theirs = linear(x), weight_of_torchao(linear, "Int8DynamicActivationInt8WeightConfig")(x)
    lost = [(y - truth).norm() / truth.norm() for y in (METHODS["vectorwise"].quantize(linear)(x), theirs)]
    assert abs(lost[0] / lost[1] - 1) < 0.1 and max(lost) < 0.02


@pytest.mark.parametrize("group", [32, 128])
def test_gptq_in_the_order_of_activations_has_llm_compressors_codes(group, linear):
    """Both take the groups' scales off the weight as it was; in the order of the inputs ours take them when a group's
    turn comes, as the paper does, for the same objective within a tenth."""
    quantize_weight = pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize").quantize_weight
    from compressed_tensors.quantization import QuantizationArgs

    weight, grid = linear.weight.data, Grid(4, group)
    inputs = torch.randn(512, 128) @ torch.randn(128, 128)
    hessian = inputs.T @ inputs / len(inputs)
    scale, zero = grid.of(weight)

    def theirs(order: str | None) -> torch.Tensor:
        settings = {"num_bits": 4, "group_size": group, "symmetric": False, "strategy": "group", "actorder": order}
        given = (weight.clone()[None], hessian.clone()[None], scale.float()[None], (zero.float() - 8)[None], None)
        return quantize_weight(*given, QuantizationArgs(**settings))[0][0]

    def ours(act_order: bool) -> torch.Tensor:
        codes, *found = rounded(weight, hessian, grid, act_order=act_order)
        scale, zero = (grid.spread(values.float(), 128) for values in found)
        return (codes - zero) * scale

    def objective(found: torch.Tensor) -> float:
        return (((found - weight) @ hessian) * (found - weight)).sum().item()

    assert ((ours(True) - theirs("weight")).abs() > 1e-5).float().mean() < 0.01
    assert objective(ours(True)) == pytest.approx(objective(theirs("weight")), rel=0.01)
    assert objective(ours(False)) == pytest.approx(objective(theirs(None)), rel=0.1)
