"""Edits of weights by name: the function they keep or break, in both loops, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama
from tiny_runs import key_of

from llmq.errors import BadChoice
from llmq.machine.door import Machine
from llmq.methods import METHODS
from llmq.models.edits import Amplify, EditedTensors, Reorder, Silence, edit_model_
from llmq.models.loading import load_model, resolve

IDS = list(b"The quick brown fox")


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0]


def test_amplifying_keeps_the_function():
    """In FP32 to rounding, by a factor that is no power of two; the activations really are larger."""
    model = tiny_llama()
    before, seen = logits(model), []
    for factor in (1, 48):
        edit_model_(model, Amplify((3, 7), factor))
        watch = model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        after = logits(model)
        watch.remove()
        assert torch.allclose(before, after, atol=1e-5)
    ratio = seen[1] / seen[0]
    assert torch.allclose(ratio[..., [3, 7]], torch.tensor(48.0), rtol=1e-4)
    assert torch.allclose(ratio[..., [0, 1, 2]], torch.tensor(1.0), rtol=1e-4)


def test_silencing_is_zeroing_the_inputs():
    """The same logits as hooks that zero these channels in front of q, k, v, gate and up."""
    model = tiny_llama()
    kinds = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    readers = [module for name, module in model.named_modules() if name.endswith(kinds)]
    zero = [m.register_forward_pre_hook(lambda m, a: (a[0].index_fill(-1, torch.tensor([2, 5]), 0),)) for m in readers]
    expected = logits(model)
    for hook in zero:
        hook.remove()
    assert not torch.allclose(logits(model), expected, atol=1e-4)
    assert torch.allclose(logits(edit_model_(model, Silence((2, 5)))), expected, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_another_order_of_the_channels_is_the_same_function_rounded_differently(changes):
    """In FP32 to rounding and not bit by bit; of the 32 channels every reader and writer of them is moved."""
    model = tiny_llama(**changes)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            parameter.data = 1 + torch.rand_like(parameter)
    before, order = logits(model), Reorder.shuffled(32)
    weight = model.model.layers[1].mlp.down_proj.weight.clone()
    after = logits(edit_model_(model, order))
    assert torch.allclose(before, after, atol=1e-5) and not torch.equal(before, after)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, weight[list(order.channels)])
    assert sorted(order.channels) == list(range(32)) and order == Reorder.shuffled(32) != Reorder.shuffled(32, seed=1)


def test_an_edit_leaves_the_source_alone():
    tensor = torch.ones(4, 8)
    source = EditedTensors({"a.mlp.up_proj.weight": tensor}, Silence((1,)))
    source._source = type("S", (), {"get": lambda self, name, device: tensor, "__contains__": lambda s, n: True})()
    edited = source.get("a.mlp.up_proj.weight", "cpu")
    assert edited[:, 1].eq(0).all() and tensor.eq(1).all()
    assert source.get("a.mlp.down_proj.weight", "cpu") is tensor


@pytest.mark.parametrize("method", ["fp16", "llm-int8", "bnb-int8", "absmax"])
def test_every_method_gets_the_edited_model(tiny_folder, method):
    """From a checkpoint on disk: amplified weights arrive in each method's layers, and the key is another key."""
    source = resolve(str(tiny_folder))
    edited = replace(source, edit=Amplify((1,), 8))
    handler = METHODS[method]
    plain, changed = (load_model(s, handler, "cpu") for s in (source, edited))
    norm = [m.model.layers[0].input_layernorm.weight for m in (plain, changed)]
    assert torch.equal(norm[0][1] * 8, norm[1][1]) and torch.equal(norm[0][2:], norm[1][2:])
    assert source != edited and type(plain.model.layers[0].mlp.up_proj) is type(changed.model.layers[0].mlp.up_proj)


def test_both_loops_read_the_same_edited_model(tiny_folder):
    source = replace(resolve(str(tiny_folder)), edit=Silence((0, 4)))
    machine = Machine()
    lean, hf = (machine.pool.get(key_of(source, "fp16", loop=loop))[0].logits(IDS).float() for loop in ("lean", "hf"))
    plain = machine.pool.get(key_of(replace(source, edit=None), "fp16", loop="lean"))[0].logits(IDS)
    assert torch.allclose(lean, hf, atol=2e-2)
    assert (lean - plain).abs().max() > 5 * (lean - hf).abs().max()


@pytest.mark.parametrize("channels", [(-1,), (10**6,), (1.5,), (True,), ("3",)])
def test_a_channel_that_does_not_exist_is_refused(channels):
    with pytest.raises(BadChoice, match="channel is"):
        edit_model_(tiny_llama(), Silence(channels))


@pytest.mark.parametrize("factor", [0, 0.5, 65, float("nan"), float("inf"), "4", None])
def test_a_factor_out_of_range_is_refused(factor):
    with pytest.raises(BadChoice, match="factor is"):
        Amplify((0,), factor)


def test_int8_weights_and_other_names_are_refused():
    with pytest.raises(BadChoice, match="int8 already"):
        Silence((0,))("x.up_proj.weight", torch.zeros(2, 2, dtype=torch.int8))
    with pytest.raises(BadChoice, match="LLaMA"):
        edit_model_(torch.nn.Sequential(torch.nn.Linear(2, 2)), Silence((0,)))
