"""Factors folded into norms and rows: the model in 16 bit stays the same, and so do AWQ's and SmoothQuant's gains."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_llama
from torch import nn

from llmq.errors import BadChoice
from llmq.methods import parse_method
from llmq.methods.calibrate import Calibration
from llmq.methods.folding import fold_
from llmq.methods.layers.naive_linear import NaiveLinear
from llmq.methods.layers.packed_linear import PackedLinear
from llmq.methods.smoothquant import SMALLEST

METHODS = ["awq@4:group=16:folded=on", "smoothquant@folded=on", "smoothquant@auto:folded=on"]
IDS = torch.arange(8, 200)[None]


def planted(**shape) -> nn.Module:
    """A model with a few channels of its norms far larger than the others, as LLaMAs have them."""
    model = tiny_llama(initializer_range=0.1, max_position_embeddings=256, **shape)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data[:3] *= 20
    return model


def statistics_of(model: nn.Module, method) -> dict[str, torch.Tensor]:
    with Calibration(model, method) as found, torch.inference_mode():
        model(IDS)
    return found.statistics


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits[0]


@pytest.mark.parametrize("heads", [2, 4], ids=["heads share values", "a head, a value"])
@pytest.mark.parametrize("name", METHODS)
def test_the_model_stays_the_same(name, heads):
    model, method = planted(num_key_value_heads=heads, attention_bias=True, mlp_bias=True), parse_method(name)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter) if parameter.ndim == 1 else 0
    before, weights = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    fold_(model, method, statistics_of(model, method))
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-3)
    changed = {name.split(".", 3)[-1] for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    assert {"input_layernorm.weight", "post_attention_layernorm.weight", "mlp.up_proj.bias"} <= changed
    assert ("self_attn.v_proj.bias" in changed) == ("self_attn.o_proj.weight" in changed) == (heads == 4)


def test_layers_behind_a_norm_share_the_papers_factors():
    """Equation 4, with the largest weight of a channel over all the layers behind the norm, in float64."""
    model, method = planted(), parse_method("smoothquant@0.6:folded=on")
    found, block = statistics_of(model, method), model.model.layers[0]
    name = "model.layers.0.self_attn.{}_proj"
    weights = torch.cat([model.get_submodule(name.format(x)).weight for x in "qkv"]).double().clone()
    before = block.input_layernorm.weight.double().clone()
    factors = found[name.format("q")].double() ** 0.6 / weights.abs().amax(0).clamp_min(SMALLEST) ** 0.4
    fold_(model, method, found)
    torch.testing.assert_close(block.input_layernorm.weight.double(), before / factors, rtol=1e-5, atol=1e-8)
    after = torch.cat([model.get_submodule(name.format(x)).weight for x in "qkv"]).double()
    rows = slice(0, 32 + 16)  # of q and k: those of v are divided once more where the o projection is folded
    torch.testing.assert_close(after[rows], (weights * factors)[rows], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("name", "plain", "layer"), [
    (METHODS[0], "rtn@4:group=16", PackedLinear), (METHODS[1], "vectorwise", NaiveLinear),
])  # fmt: skip
def test_what_is_folded_is_better_than_what_is_not_smoothed(name, plain, layer):
    truth, lost = logits(planted()), {}
    for spelled in (name, plain):
        method, model = parse_method(spelled), planted()
        found = statistics_of(model, method) if method.calibrated else None
        made = method.quantize_(model, "cpu", found)
        assert all(isinstance(m, layer) and m.factors is None for m in made.modules() if hasattr(m, "factors"))
        lost[spelled] = (logits(made) - truth).square().mean().item()
    assert lost[name] < lost[plain]


def test_a_model_with_its_norms_elsewhere_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    method = parse_method(METHODS[0])
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=259, n_positions=256)).eval()
    with pytest.raises(BadChoice, match="GPT2LMHeadModel has its norms elsewhere than a LLaMA: choose awq unfolded"):
        fold_(model, method, {})
    model = planted()
    model.model.layers[0].post_attention_layernorm.forward = lambda x: x * 1.0  # its weight says nothing of it
    with pytest.raises(BadChoice, match="elsewhere"):
        fold_(model, method, statistics_of(model, method))
