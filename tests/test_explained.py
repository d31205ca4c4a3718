"""What the methods say of themselves: one screen each, whose every number is what the method itself computes."""

from __future__ import annotations

import re

import pytest
import torch

from llmq.inspect.rounding import worked_at
from llmq.methods import METHODS, parse_method
from llmq.methods.awq import RATIOS, factors_of
from llmq.methods.base import Method
from llmq.methods.gptq import _rounded_block
from llmq.methods.layers.packed_linear import Grid
from llmq.methods.nf4 import levels
from llmq.methods.smoothquant import ALPHAS, factors

PARTS = ("**What.**", "**Source.**", "**Needs.**", "**Fails when.**")
ROWS = [[-0.5, 0.03, 0.2, 0.8], [0.01, 0.02, -0.04, 0.03]]
TOKENS = [[0.6, -0.2, 0.2, 14.0], [0.3, -0.5, 0.1, 8.0]]
WORKED = [  # method, numbers, whether they are a weight, the place of the example
    ("absmax", ROWS, True, (0, 2)),
    ("zeropoint", ROWS, True, (0, 2)),
    ("vectorwise", ROWS, True, (1, 2)),
    ("groupwise@2", ROWS, True, (0, 1)),
    ("llm-int8", TOKENS, False, (0, 1)),
    ("rtn@group=4", ROWS, True, (0, 2)),
    ("fp8", ROWS, True, (0, 1)),
    ("nf4", ROWS[:1], True, (0, 2)),
]


def said(name: str) -> str:
    return METHODS[name].explanation()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_needs_source_and_limits_on_one_screen(name):
    text = said(name)
    assert [part for part in PARTS if part not in text] == [] and text.index("**What.**") == 0
    assert len(text.split()) < 560 and max(len(line) for line in text.split("\n") if line.startswith("    ")) < 90
    assert METHODS[name].dense or re.search(r"arXiv \d{4}\.\d{5}", text)


def test_a_method_without_a_text_has_the_nearest_ones_or_its_own_words():
    assert said("absmax-w8a32") == said("absmax") != said("vectorwise") and said("llm-int8-head") == said("llm-int8")

    class Own(Method):
        name, about, source = "no-such-method", "Rounds up.", "This test"

    try:
        assert Own.explanation() == "**What.** Rounds up.\n\n**Source.** This test\n"
    finally:
        del Own


@pytest.mark.parametrize(("typed", "numbers", "weight", "place"), WORKED)
def test_the_worked_example_is_what_the_method_computes(typed, numbers, weight, place):
    _, *lines = worked_at(torch.tensor(numbers), parse_method(typed).rounding(weight=weight), place)
    text = said(typed.partition("@")[0])
    assert [line for line in lines if f"    {line}\n" not in text] == []


def test_what_the_examples_compare_with():
    whole = worked_at(torch.tensor(ROWS), METHODS["absmax"].rounding(weight=True), (1, 2))
    assert "−6 × 0.006299 = −0.0378" in whole[-1] and "−6 × 0.006299 = −0.0378" in said("vectorwise")
    row = worked_at(torch.tensor(TOKENS), METHODS["vectorwise"].rounding(weight=False), (0, 1))
    assert "= −0.2205" in row[-1] and "come back as −0.2205" in said("llm-int8")
    kept = worked_at(torch.tensor(TOKENS), METHODS["llm-int8"].rounding(weight=False), (0, 3))
    assert kept[1] in said("llm-int8")
    assert "the zero-point would be 98;" in said("zeropoint") and round(0.5 / (1.3 / 255)) == 98
    assert (2**31 - 1) // 127**2 == 133_144 and "133,144" in said("absmax")


def test_formats_of_floating_point():
    text = said("fp8")
    for dtype, largest, smallest in ((torch.float8_e4m3fn, "448", -9), (torch.float8_e5m2, "57344", -16)):
        assert torch.finfo(dtype).max == float(largest) and f"= {largest}," in text
        codes = torch.arange(1, 127, dtype=torch.uint8).view(dtype).float()
        assert codes[codes > 0].min() == 2.0**smallest and f"2^−{-smallest}" in text
    assert not torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().isinf().any()
    assert torch.arange(256).to(torch.uint8).view(torch.float8_e5m2).float().isinf().sum() == 2
    near = torch.tensor([415.0, 417.0]).to(torch.float8_e4m3fn).float()
    assert 448 / 14 == 32 and near.tolist() == [416.0, 416.0] and torch.finfo(torch.float16).max == 65504
    assert f"{torch.finfo(torch.bfloat16).max:.3g}" == "3.39e+38"
    between = torch.arange(2**16).to(torch.int32).to(torch.int16)
    for dtype, name, count in ((torch.bfloat16, "bf16", 128), (torch.float16, "bf16", 1024)):
        values = between.view(dtype).float()
        assert ((values >= 1) & (values < 2)).sum() == count and f"{count:,}" in said(name)


def test_nf4_lists_its_levels():
    shown = re.search(r"The levels: (.+?, 1)\. They", said("nf4"))[1].replace("−", "-").split(", ")
    assert [float(level) for level in shown] == [float(f"{level:.4f}") for level in levels().tolist()]
    assert (levels() > 0).sum() == 8 and (levels() < 0).sum() == 7 and 4 + 32 / 64 == 4.5


def test_factors_of_smoothquant_and_awq():
    found = factors(torch.tensor([16.0, 1.0]), torch.tensor([[0.25, -1.0], [0.1, 0.5]]), 0.5)
    assert found.tolist() == [8.0, 1.0] and "= 8,  s_2" in said("smoothquant") and len(ALPHAS) == 21
    assert factors_of(torch.tensor([4.0, 1.0, 0.25]), 0.5).tolist() == [2.0, 1.0, 0.5] and "(2, 1, 0.5)" in said("awq")
    assert (len(RATIOS), RATIOS[-1]) == (20, 0.95)


def test_gptq_example_by_the_paper_by_the_code_and_by_hand():
    """The steps with U are those of OBS with shrinking inverses, and beat rounding to nearest."""
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    inverse = hessian.inverse()
    factor = torch.linalg.cholesky(inverse, upper=True)
    torch.testing.assert_close(factor.T @ factor, inverse)
    assert f"U = ({factor[0, 0]:.4f} −{-factor[0, 1]:.4f}; 0 {factor[1, 1]:.4f})" in said("gptq")
    torch.testing.assert_close(factor[0] / factor[0, 0], inverse[0] / inverse[0, 0])
    rest = inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0]
    torch.testing.assert_close(rest[1, 1], factor[1, 1] ** 2)
    weight, ones = torch.tensor([[0.6, 0.6]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    codes, errors = _rounded_block(weight.clone(), factor, Grid(2, 0), ones, 0 * ones)
    assert codes.tolist() == [[1.0, 0.0]] and f"= −{-errors[0, 0]:.4f}" in said("gptq")
    for rounded, told in ((codes, "GPTQ (1, 0): δᵀ H δ = 0.56"), (ones, "to nearest (1, 1): 0.96")):
        change = rounded - weight
        assert (change @ hessian @ change.T).item() == pytest.approx(float(told.split()[-1])) and told in said("gptq")


@pytest.mark.parametrize(("name", "bits", "told"), [
    ("rtn", "4.19", "4.19 bits a weight"), ("nf4", "4.5", "4.5 bits a weight"),
    ("groupwise", "8.25", "a quarter of a bit"),
])  # fmt: skip
def test_bits_a_weight(name, bits, told):
    stored = METHODS[name].bytes((4096, 4096))
    assert f"{8 * (stored.weights + stored.scales) / 4096**2:.3g}" == bits and told in said(name)
