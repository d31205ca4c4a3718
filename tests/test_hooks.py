"""Hooks come, see every linear layer once, and go, whatever happens inside the block."""

import pytest
import torch
from torch import nn

from llmq.hooks import Watched, decoder_blocks, is_quantized, kind_and_layer, linear_modules


class Int8Linear(nn.Module):
    """A quantized layer that is no nn.Linear."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.ones(out_features, in_features, dtype=torch.int8))

    def forward(self, x):
        return x @ self.weight.to(x.dtype).T


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.blocks = nn.ModuleList([nn.Linear(5, 4), Int8Linear(4, 3)])

    def forward(self, x, fail=False):
        x = self.blocks[0](input=self.norm(self.first(x)))
        if fail:
            raise ZeroDivisionError
        return self.blocks[1](x)


def hooks_left(model):
    return sum(
        len(m._forward_pre_hooks)
        + len(m._forward_hooks)
        + len(m._forward_hooks_with_kwargs)
        + len(m._forward_pre_hooks_with_kwargs)
        for m in model.modules()
    )


def recorded(calls):
    return lambda name, module, x: calls.append((name, module, x))


def test_every_linear_layer_is_called_in_order_with_its_input():
    model, calls, x = Small(), [], torch.randn(2, 3, 6)
    with Watched(linear_modules(model), recorded(calls)):
        model(x)
    assert [name for name, *_ in calls] == ["first", "blocks.0", "blocks.1"] == list(linear_modules(model))
    assert [tuple(seen.shape) for *_, seen in calls] == [(2, 3, 6), (2, 3, 5), (2, 3, 4)]
    assert torch.equal(calls[0][2], x) and calls[0][1] is model.first
    assert torch.equal(calls[1][2], model.norm(model.first(x)))


def test_no_graph_is_kept():
    model, calls = Small(), []
    with Watched(linear_modules(model), recorded(calls)):
        out = model(torch.randn(1, 2, 6))
    assert out.requires_grad, "the model itself must stay differentiable"
    assert not any(seen.requires_grad or seen.grad_fn is not None for *_, seen in calls)


def test_no_hook_is_left_and_none_outlives_the_block():
    model, calls = Small(), []
    with Watched(linear_modules(model), recorded(calls)):
        assert hooks_left(model) > 0
    model(torch.randn(1, 1, 6))
    assert hooks_left(model) == 0 and calls == []


class Pair(nn.Module):
    """Gives a tuple and takes its tensor by name, as decoder blocks of some models do."""

    def forward(self, scale, *, hidden):
        return hidden * scale, None


def test_what_a_layer_puts_out_is_seen_after_its_input():
    model, calls, x = Small(), [], torch.randn(1, 2, 6)
    seen = {"in": [], "out": []}

    def note(side):
        return lambda name, module, tensor: (calls.append((side, name)), seen[side].append(tensor))

    with Watched(linear_modules(model), note("in"), note("out")):
        y = model(x)
    assert calls == [(side, name) for name in linear_modules(model) for side in ("in", "out")]
    assert torch.equal(seen["out"][0], model.first(x)) and torch.equal(seen["out"][-1], y)
    assert y.requires_grad and not any(tensor.requires_grad for tensor in seen["out"])
    only_out, pair = [], Pair()
    with Watched({"pair": pair}, on_output=recorded(only_out)):
        assert hooks_left(pair) == 1, "no hook for what nobody asked"
        pair(2, hidden=x)
    assert [name for name, *_ in only_out] == ["pair"] and torch.equal(only_out[0][2], 2 * x)
    assert hooks_left(model) == hooks_left(pair) == 0


def stacks(**lists) -> nn.Module:
    """A model of lists of blocks: a number is so many bare ones, a list of numbers blocks with so many experts."""
    model = nn.Module()
    model.add_module("before", nn.Linear(2, 2))
    for name, sizes in lists.items():
        blocks = [nn.Linear(2, 2) for _ in range(sizes)] if isinstance(sizes, int) else []
        for count in sizes if isinstance(sizes, list) else ():
            block = nn.Module()
            block.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(count))
            blocks.append(block)
        setattr(model, name, nn.ModuleList(blocks))
    return model


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({"layers": 3}, "layers"),
        ({"norms": 2, "layers": 3, "heads": 2}, "layers"),
        ({"layers": [4, 4]}, "layers"),  # more experts than layers
        ({"encoder": 2, "layers": [9, 9, 9]}, "layers"),
        ({}, None),
        ({"empty": 0}, None),
    ],
)
def test_the_decoder_is_the_longest_stack_that_lies_in_no_other(lists, expected):
    model = nn.Module()
    model.model = stacks(**lists)
    found = decoder_blocks(model)
    stack = list(getattr(model.model, expected)) if expected else []
    assert list(found) == [f"model.{expected}.{number}" for number in range(len(stack))]
    assert all(one is other for one, other in zip(found.values(), stack, strict=True))


def test_a_stack_can_be_the_model_itself_and_a_mixed_list_is_none():
    alone = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert decoder_blocks(alone) == {str(number): block for number, block in enumerate(alone)}
    assert decoder_blocks(nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])) == {}


@pytest.mark.parametrize("where", ["block", "model", "on_input", "on_output"])
def test_no_hook_is_left_after_an_exception(where):
    model = Small()

    def fail(callback):
        if where == callback:
            raise ZeroDivisionError

    callbacks = [lambda *_, name=name: fail(name) for name in ("on_input", "on_output")]
    with pytest.raises(ZeroDivisionError), Watched(linear_modules(model), *callbacks):
        model(torch.randn(1, 1, 6), fail=where == "model")
        raise ZeroDivisionError
    assert hooks_left(model) == 0


def test_nested_blocks_see_the_same_and_remove_only_their_own_hooks():
    model, outer, inner, x = Small(), [], [], torch.randn(1, 2, 6)
    kept = model.first.register_forward_pre_hook(lambda module, args: None)
    with Watched(linear_modules(model), recorded(outer)):
        with Watched(linear_modules(model), recorded(inner)):
            model(x)
        model(x)
    assert (len(outer), len(inner)) == (6, 3)
    assert hooks_left(model) == 1, "the caller's own hook must stay"
    kept.remove()


def test_one_object_serves_one_block_at_a_time():
    model, calls = Small(), []
    hooks = Watched(linear_modules(model), recorded(calls))
    for _ in range(2):
        with hooks:
            model(torch.randn(1, 1, 6))
    with pytest.raises(RuntimeError, match="nest"), hooks, hooks:
        pass
    assert hooks_left(model) == 0 and len(calls) == 6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.17.self_attn.q_proj", ("q/k/v", 17)),
        ("model.layers.0.self_attn.o_proj", ("o", 0)),
        ("model.layers.3.mlp.up_proj", ("gate/up", 3)),
        ("transformer.h.11.mlp.down_proj", ("down", 11)),
        ("transformer.h.2.attn.c_attn", ("c_attn", 2)),
        ("lm_head", ("lm_head", None)),
    ],
)
def test_kind_and_layer_come_from_the_name(name, expected):
    assert kind_and_layer(name) == expected


def test_quantized_means_eight_bits_in_the_weights():
    masked = nn.Linear(4, 3)
    masked.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    assert is_quantized(Int8Linear(4, 3))
    assert not is_quantized(masked) and not is_quantized(nn.Linear(4, 3).half())
