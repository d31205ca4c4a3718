"""The rounding lab: every method's own rounding on one tensor, its errors, the worked numbers, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tiny_runs import light
from torch import nn

from llmq.errors import BadChoice
from llmq.figures.rounding import error_figure, histogram_figure
from llmq.inspect.rounding import CHUNK, Planted, check, errors_of, view_of
from llmq.kernels.primitives import quantize_rows, split_rows
from llmq.labs import load_answer, save_answer
from llmq.labs.rounding import METHODS_SHOWN, Rounded, Rounding, Taken, first_layer, layer_names, typed
from llmq.machine.door import Machine
from llmq.methods import METHODS, parse_method
from llmq.methods.layers import fp8_linear, naive_linear, zero_point_linear
from llmq.models.opening import open_model

OWN = "0.0312 -0.12 0.4 0.05; -0.3 0.22 0.011 -0.08"


@pytest.fixture(autouse=True, scope="module")
def lightly():
    with light():
        yield


def matrix(rows: int = 70, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 0.02


def rounded_by(name: str, x: torch.Tensor, *, weight: bool = True) -> torch.Tensor:
    rounding = parse_method(name).rounding(weight=weight)
    return rounding.apply(x, rounding.fit(x))[1]


def layer_of(name: str, x: torch.Tensor) -> nn.Module:
    linear = nn.Linear(x.shape[1], x.shape[0], bias=False)
    linear.weight.data = x.clone()
    return parse_method(name).quantize(linear)


@pytest.mark.parametrize(
    "name", ["absmax", "vectorwise", "groupwise@32", "zeropoint", "fp8", "fp8@tensor", "rtn@3:group=32"]
)
def test_the_numbers_are_those_of_the_methods_layer(name):
    """An identity as the input brings a layer's weight to light."""
    x = matrix()
    layer = layer_of(name, x)
    if isinstance(layer, zero_point_linear.ZeroPointLinear):
        seen = (layer.weight.float() - layer.zero) * layer.scale
    elif isinstance(layer, fp8_linear.Fp8Linear):
        seen = layer.weight.float() * layer.scale
    elif isinstance(layer, naive_linear.NaiveLinear):
        seen = layer._scaled(layer.weight, layer.absmax) if layer.method.group else layer.weight * (layer.absmax / 127)
    else:
        seen = layer.dense()
    torch.testing.assert_close(rounded_by(name, x), seen, rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [96, 64, 50])
def test_nf4_is_bitsandbytes(columns):
    """Of a vector: its dequantization of 96 columns on a CPU (0.50) takes other blocks than its quantization."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    x = matrix(64, columns)
    codes, state = quantize_4bit(x.flatten(), blocksize=64, quant_type="nf4")
    own, theirs = rounded_by("nf4", x), dequantize_4bit(codes, state).view(x.shape)
    differ = (own - theirs).abs() > 1e-6 * x.abs().max()
    assert differ.float().mean() < 1e-3, "but for a number half-way between two levels"


def test_llm_int8_is_the_kernels_split_whatever_rows_come_together():
    x = matrix()
    x[3, 7] = 9.0
    split, found = split_rows(x, 6.0), rounded_by("llm-int8", x, weight=False)
    rest = [column for column in range(96) if column != 7]
    assert split.columns.tolist() == [7] and torch.equal(found[:, 7], x[:, 7].half().float())
    assert torch.equal(found[:, rest], (split.codes * (split.absmax / 127)[:, None])[:, rest])
    rounding = METHODS["llm-int8"].rounding(weight=False)
    fit = rounding.fit(x)
    parts = [rounding.apply(part, fit)[1] for part in x.split(13)]
    assert torch.equal(torch.cat(parts), found)
    half = x.half().float()
    assert torch.equal(rounded_by("llm-int8", half), quantize_rows(half).dequantized())


@pytest.mark.parametrize("name", METHODS_SHOWN)
@pytest.mark.parametrize("shape", [(70, 96), (3, 5), (1, 1), (600, 1000)])
def test_errors_are_those_of_every_number(name, shape):
    """Some rows at a time give what the whole tensor gives, in float64."""
    x = matrix(*shape)
    assert shape != (600, 1000) or x.numel() > 2 * CHUNK
    found = errors_of(Planted(x), parse_method(name).rounding(weight=True))
    values = rounded_by(name, x)
    error = (values - x).double()
    assert found.largest == pytest.approx(error.abs().max().item(), rel=1e-6)
    assert found.mean == pytest.approx(error.abs().mean().item(), rel=1e-4, abs=1e-12)
    if error.any():
        assert found.sqnr_db == pytest.approx(
            10 * math.log10(x.double().square().sum() / error.square().sum()), abs=1e-3
        )
    assert found.zeroed == pytest.approx(
        (rounded_by(name, x) == 0).double().mean().item() - (x == 0).double().mean().item()
    )


def test_an_outlier_breaks_a_scale_for_all_and_not_one_for_a_row():
    def decibels(name: str, times: float) -> float:
        rounding = parse_method(name).rounding(weight=name != "llm-int8")
        return errors_of(Planted.into(matrix(512, 512), times), rounding).sqnr_db

    falls = {
        name: decibels(name, 0) - decibels(name, 100) for name in ("absmax", "zeropoint", "vectorwise", "groupwise")
    }
    assert falls["absmax"] > 35 and falls["zeropoint"] > 30 and falls["vectorwise"] < 15 and falls["groupwise"] < 10
    assert abs(decibels("llm-int8", 0) - decibels("llm-int8", 1000)) < 0.1


def test_a_planted_number_is_in_no_error_and_the_tensor_stays_as_it_was():
    x = matrix()
    before, planted = x.clone(), Planted.into(x, 50)
    assert torch.equal(x, before) and planted.outlier == (35, 48)
    assert planted.numbers[35, 48] == 50 * x.abs().max()
    errors, view = view_of(planted, METHODS["rtn"].rounding(weight=True))
    values = rounded_by("rtn", planted.numbers)
    off = (values - planted.numbers).abs()
    off[35, 48] = 0
    assert errors.largest == off.max().item() == view.cells.max()


def test_what_is_drawn_holds_the_largest_error_and_every_number():
    x = matrix(300, 500)
    errors, view = view_of(Planted(x), METHODS["absmax"].rounding(weight=True))
    off = (rounded_by("absmax", x) - x).abs().numpy()
    tall, wide = view.cell
    cells = [[off[i : i + tall, j : j + wide].max() for j in range(0, 500, wide)] for i in range(0, 300, tall)]
    assert view.cells.shape[0] <= 64 and view.cells.shape[1] <= 128 and np.allclose(view.cells, cells)
    assert view.before.sum() == view.after.sum() == view.drawn == x.numel()
    row, column = (int(word) for word in view.worked[1][0].replace(",", "").split()[-3::2])
    assert off[row, column] == errors.largest and "scale = max|x| / 127" in view.worked[0][1]
    assert (view_of(Planted(matrix(2000, 400)), METHODS["absmax"].rounding(weight=True))[1].drawn) < 2000 * 400


@pytest.mark.parametrize("numbers", ["0 0 0; 0 0 0", "1", "5 5 5", "-3 -3; -1 -2", "1e-30 2e-30"])
@pytest.mark.parametrize("name", METHODS_SHOWN)
def test_tensors_at_the_edge(name, numbers):
    *_, answer = Rounding(numbers=numbers, method=name).answers(typed(numbers))
    assert len(answer.rows) == 12 and not math.isnan(answer.errors.sqnr_db) and answer.finding
    assert all(math.isfinite(row.errors.largest) and not math.isnan(row.errors.sqnr_db) for row in answer.rows)
    for draw in (histogram_figure, error_figure):
        assert "NaN" not in draw(answer.view, "x").to_json()


@pytest.mark.parametrize(("numbers", "told"), [
    ("1 two", "'two' is no number; write numbers such as 0.5 -1.2 with spaces between them"),
    ("1 inf", "'inf' is no number; write numbers such as 0.5 -1.2 with spaces between them"),
    ("1 2; 3", "the rows hold 2, 1 numbers; give each the same, and at least one"),
    (";", "the rows hold none numbers; give each the same, and at least one"),
    (" ".join("1" * 4097), "4,097 numbers are given; give at most 4,096"),
])  # fmt: skip
def test_numbers_that_are_none(numbers, told):
    with pytest.raises(BadChoice, match="^" + told.replace(".", r"\.")):
        typed(numbers)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_tensor_that_is_not_finite_is_refused(value):
    x = matrix()
    x[1, 1] = value
    with pytest.raises(BadChoice, match="infinite or not numbers"):
        check(x)


@pytest.mark.parametrize(("field", "value", "told"), [
    ("bits", 9, "bits is 9; choose a whole number from 2 to 8"), ("bits", 1, "bits is 1;"),
    ("outlier", -1, "outlier is -1;"), ("method", "gptq", "unknown method 'gptq'"), ("what", "bias", "unknown what"),
])  # fmt: skip
def test_settings_out_of_range(field, value, told):
    with pytest.raises(BadChoice, match=told):
        Rounding(**{field: value})


@pytest.mark.parametrize("what", ["input", "weight"])
def test_a_tensor_is_taken_out_of_the_model(tiny_folder, what, run, tmp_path):
    model = open_model(str(tiny_folder))
    assert first_layer(model) == "1.down_proj" and len(layer_names(model)) == 14
    items = list(Machine().run(Rounding(model=str(tiny_folder), what=what, prompt="Hello LLaMA")))
    (taken,) = (item for item in items if isinstance(item, Taken))
    first, last = (item for item in items if isinstance(item, Rounded))
    weight = model.tensors().get("model.layers.1.mlp.down_proj.weight", "cpu")
    assert first.rows == () and len(last.rows) == 12 and taken.numbers.shape[1] == weight.shape[1]
    assert what == "input" or torch.equal(taken.numbers.float(), weight.float())
    save_answer(last, tmp_path / "answer.json")
    again = load_answer(tmp_path / "answer.json")
    assert again.finding == last.finding and again.rows == last.rows and again.view.worked == last.view.worked


def test_the_command_line(run, tiny_folder):
    status, out, _ = run("rounding", "--numbers", OWN, "--method", "rtn", "--bits", 3, "--group", 4, "--json")
    found = json.loads(out[-1])
    assert status == 0 and len(found["results"]) == 12 and found["worked"][0][1].startswith("scale = (max − min) / 7")
    status, _, err = run("rounding", "--layer", "9.cow", "--model", tiny_folder, "--device", "cpu")
    assert (status, err[-1]) == (
        2,
        "llmq: unknown layer '9.cow'; choose a linear layer of a block, such as 1.down_proj",
    )
