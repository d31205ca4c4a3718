"""Weights for a shape without a checkpoint: right sizes, the same each time, and outliers like a trained model's."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config
from torch import nn

from llmq.models.random_weights import random_llama
from llmq.models.skeleton import meta_model

TOKENS = 24


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_have_the_shape_of_their_configuration(tied):
    config = tiny_config(tie_word_embeddings=tied, num_key_value_heads=1, intermediate_size=48)
    model = random_llama(config, "cpu")
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_model(config).named_parameters()}
    assert {name: tuple(tensor.shape) for name, tensor in model.named_parameters()} == shapes
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_rotary_frequencies_are_computed_not_left_over():
    config = tiny_config()
    expected = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(random_llama(config, "cpu").model.rotary_emb.inv_freq, expected)


def test_random_weights_repeat_with_their_seed():
    heads = [random_llama(tiny_config(), "cpu", seed).lm_head.weight for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def outlier_shares(**shape) -> dict[str, float]:
    """Linear layer -> share of its input columns with |x| >= 6 anywhere in a prompt."""
    model, shares = random_llama(tiny_config(**shape), "cpu").float(), {}

    def note(name):
        return lambda module, args: shares.update({name: (args[0].abs() >= 6).flatten(0, -2).any(0).float().mean()})

    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(name))
    with torch.inference_mode():
        model(torch.arange(TOKENS)[None])
    assert len(shares) == 7 * model.config.num_hidden_layers
    return {name: share.item() for name, share in shares.items()}


@pytest.mark.parametrize(
    "shape", [{}, {"hidden_size": 256, "intermediate_size": 512}, {"num_hidden_layers": 5, "num_key_value_heads": 1}]
)
def test_planted_outliers_reach_the_threshold_in_every_linear_layer(shape):
    assert [name for name, share in outlier_shares(**shape).items() if share == 0] == []


def test_outliers_stay_in_few_columns():
    """In trained models they are under a percent; a prefill of mostly outlier columns would measure another method."""
    shares = outlier_shares(hidden_size=512, intermediate_size=1024)
    assert {name: share for name, share in shares.items() if share > 0.25} == {}
