"""LLM.int8()'s arithmetic: the same codes, scales and outliers as bitsandbytes', and errors where they must be."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from llmq.kernels.primitives import int8_linear, quantize_rows, split_rows

SHAPES = [(1, 64), (7, 96), (33, 577), (2, 1)]


def activations(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Half precision, three columns with outliers of which one is in the first row only."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).half()
    for column, size in ((3, 9.0), (width // 2, -70.0), (width - 1, 6.0)):
        x[0, column % width] = size
    return x


@pytest.mark.parametrize("shape", SHAPES)
def test_weight_codes_and_scales_are_those_of_bitsandbytes(shape):
    weight = activations(*shape, seed=1)
    made = quantize_rows(torch.cat((weight, torch.zeros(1, shape[1]).half())))
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight.clone())
    assert torch.equal(made.codes[:-1], codes) and torch.equal(made.absmax[:-1], absmax.view(-1).float())
    assert not made.codes[-1].any() and made.absmax[-1] == 0
    assert made.codes.dtype == torch.int8 and made.absmax.dtype == torch.float32


@pytest.mark.parametrize("threshold", [6.0, 1.5, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_split_as_in_bitsandbytes(shape, threshold):
    x = activations(*shape)
    made = split_rows(x, threshold)
    codes, absmax, columns = bnb.int8_vectorwise_quant(x.clone(), threshold)
    assert torch.equal(made.absmax, absmax)
    assert made.columns.tolist() == ([] if columns is None else columns.tolist())
    alive = made.absmax > 0  # a row of outliers only: bitsandbytes divides by 0 there
    assert torch.equal(made.codes[alive], codes[alive]) and not made.codes[~alive].any()


def test_a_rounded_weight_is_within_half_a_step():
    weight = activations(20, 50)
    made = quantize_rows(weight)
    error = (made.dequantized() - weight.float()).abs()
    assert (error <= made.absmax[:, None] / 127 / 2 * 1.0001).all() and error.max() > 0


def test_outliers_apart_cost_less_than_outliers_in_the_scale():
    """The paper's point: one large value coarsens a whole row, unless it is kept out of the scale."""
    x, weight = activations(16, 256), quantize_rows(activations(64, 256, seed=2))
    exact = x.float() @ weight.dequantized().T
    apart, together = (int8_linear(x, weight, threshold) for threshold in (6.0, 0.0))
    assert 5 * (apart - exact)[0].norm() < (together - exact)[0].norm()


def test_with_every_column_an_outlier_only_the_weights_are_rounded():
    x, weight = activations(5, 64), quantize_rows(activations(9, 64, seed=4))
    expected = x.double() @ weight.codes.double().T * (weight.absmax.double() / 127)
    torch.testing.assert_close(int8_linear(x, weight, 1e-7), expected.float(), rtol=1e-5, atol=1e-4)
