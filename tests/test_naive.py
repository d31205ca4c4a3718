"""Naive 8 bit: the papers' formulas, computed here once more and differently, and the order the methods must have."""

from __future__ import annotations

import pytest
import torch
from planted import planted_llama
from torch import nn

from llmq.kernels.primitives import int8_linear, quantize_rows
from llmq.methods import METHODS
from llmq.methods.layers.naive_linear import NaiveLinear, rounded
from llmq.methods.naive import Absmax, AbsmaxW8A32, AbsmaxW32A8, Vectorwise

SHAPES = [(1, 7, 5), (3, 16, 8), (11, 33, 1), (2, 1, 4)]  # rows, in, out


def layer(width: int, out: int, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(width, out, bias=bias)


def error(y: torch.Tensor, truth: torch.Tensor) -> float:
    return ((y - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("by_row", [True, False], ids=["a scale a row", "a scale a tensor"])
@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
def test_a_value_comes_back_within_half_a_step(rows, width, out, by_row):
    x = torch.randn(rows, width) * 10
    codes, absmax = rounded(x, 0 if by_row else None)
    assert codes.abs().max() == 127 and torch.equal(codes, codes.round())
    assert ((codes * absmax / 127 - x).abs() <= absmax / 127 / 2 * (1 + 1e-5)).all()


def test_zeros_stay_zeros():
    codes, _ = rounded(torch.zeros(2, 3), 0)
    assert torch.equal(codes, torch.zeros(2, 3))


@pytest.mark.parametrize("vectorwise", [True, False])
@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
def test_the_layer_is_the_formula_in_float64(rows, width, out, vectorwise):
    """Equation 3 (absmax) and section 3.1 of the paper, with integers multiplied as integers."""
    linear, x = layer(width, out), torch.randn(rows, width)
    found = NaiveLinear.over(linear, (Vectorwise if vectorwise else Absmax)())(x)
    w = linear.weight.data.double()
    over = {"dim": 1, "keepdim": True} if vectorwise else {"dim": (0, 1), "keepdim": True}
    cx, cw = x.double().abs().amax(**over), w.abs().amax(**over)
    integers = torch.round(127 * x.double() / cx).long() @ torch.round(127 * w / cw).long().T
    expected = integers.double() * cx * cw.T / 127**2 + linear.bias.double()
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_each_half_alone():
    """W8A32 is the product with the rounded weight, W32A8 with the rounded input."""
    linear, x = layer(16, 8, bias=False), torch.randn(4, 16)
    codes, absmax = rounded(linear.weight.data, None)
    w8 = NaiveLinear.over(linear, AbsmaxW8A32())(x)
    assert torch.allclose(w8, x @ (codes * absmax / 127).T, atol=1e-6)
    codes, absmax = rounded(x, None)
    a8 = NaiveLinear.over(linear, AbsmaxW32A8())(x)
    assert torch.allclose(a8, (codes * absmax / 127) @ linear.weight.T, atol=1e-6)


def test_with_an_outlier_the_ladder_of_the_paper():
    """The decomposition beats a scale a row, which beats a scale a tensor."""
    linear, x = layer(256, 64, bias=False), torch.randn(32, 256)
    x[5, 17] = 200.0
    truth = x @ linear.weight.T
    decomposed = error(int8_linear(x, quantize_rows(linear.weight.data), 6.0), truth)
    by_row, by_tensor = (error(NaiveLinear.over(linear, way)(x), truth) for way in (Vectorwise(), Absmax()))
    assert decomposed < by_row / 2 < by_tensor / 4


@pytest.mark.parametrize("method", ["absmax", "vectorwise", "absmax-w8a32", "absmax-w32a8"])
def test_every_linear_layer_but_the_head_is_replaced(method):
    method = METHODS[method]
    model = method.quantize_(planted_llama(torch.float16), "cpu")
    names = [name for name, module in model.named_modules() if isinstance(module, NaiveLinear)]
    assert len(names) == 3 * 7 and "lm_head" not in names
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == (torch.int8 if method.weights else torch.float32)
    assert model(torch.arange(5)[None]).logits.dtype == torch.float32
