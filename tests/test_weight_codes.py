"""Methods that store a few bits a weight: packing, grids, GPTQ against brute-force OBS, AWQ's search, FP8's codes."""

from __future__ import annotations

import pytest
import torch
from planted import planted_llama
from torch import nn

from llmq.errors import BadChoice
from llmq.methods import METHODS, parse_method
from llmq.methods.awq import RATIOS, factors_of, output_error
from llmq.methods.calibrate import Calibration, InputSample, SecondMoments
from llmq.methods.coverage import coverage
from llmq.methods.gptq import DAMPING, Gptq, inverse_factor, rounded
from llmq.methods.layers import fp8_linear, zero_point_linear
from llmq.methods.layers.naive_linear import NaiveLinear
from llmq.methods.layers.packed_linear import Grid, PackedLinear, pack, unpack
from llmq.methods.swap import stored_bytes

GRIDS = [Grid(4, 8), Grid(3, 0), Grid(2, 10), Grid(8, 7)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def correlated(rows: int = 200, columns: int = 24, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=dtype) @ torch.randn(columns, columns, dtype=dtype)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 8, 37])
def test_codes_come_back_from_as_many_bits_as_they_have(bits, columns):
    codes = torch.randint(0, 2**bits, (5, columns))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (5, -(-columns // 8) * bits)
    assert torch.equal(unpack(packed, bits, columns).long(), codes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_weight_comes_back_within_half_a_step_and_zero_exactly(grid):
    weight = torch.randn(6, 24, dtype=torch.float64)
    weight[2], weight[3, :5], weight[4] = 0, 0, 0.25
    scale, zero = (grid.spread(values, 24).double() for values in grid.of(weight))
    back = (grid.round(weight, scale, zero) - zero) * scale
    off = (back - weight).abs() / scale
    assert off.max() <= 0.5 + (2**grid.bits - 1) * 2**-11, "the stored scale is FP16: the ends may miss by its rounding"
    assert (back[weight == 0] == 0).all()


def test_a_last_group_may_be_shorter():
    layer = METHODS["rtn"].rounded(torch.randn(3, 130), None)
    assert layer.scale.shape == (3, 2) and layer.dense().shape == (3, 130)


def test_what_is_no_number_is_refused():
    for bad in (float("inf"), float("nan")):
        with pytest.raises(BadChoice, match="infinite or not a number"):
            METHODS["rtn"].rounded(torch.tensor([[1.0, bad]]), None)


@pytest.mark.parametrize(
    "typed", ["rtn@1", "rtn@9", "gptq@bits=4.5", "awq@group=-1", "gptq@act_order=maybe", "fp8@block"]
)
def test_settings_that_cannot_be_are_refused_in_words(typed):
    with pytest.raises(BadChoice):
        parse_method(typed)
    assert parse_method("gptq@bits=3:group=64:act_order=off").spelled == "gptq@3:group=64:act_order=off"


def brute_force_obs(weight, hessian, grid: Grid, order: list[int], *, static: bool):
    """Optimal Brain Surgeon by the book: H⁻¹ whole, every remaining weight changed, the input struck out of H⁻¹."""
    weight, columns = weight.clone(), weight.shape[1]
    group = grid.group or columns
    inverse = torch.linalg.inv(hessian + DAMPING * hessian.diagonal().mean() * torch.eye(columns, dtype=weight.dtype))
    codes, (scale, zero) = torch.empty_like(weight), grid.of(weight)
    for column in order:
        own = column // group
        if not static and column % group == 0:
            scale[:, own : own + 1], zero[:, own : own + 1] = grid.of(weight[:, column : column + group])
        codes[:, column] = grid.round(weight[:, column], scale[:, own], zero[:, own])
        error = weight[:, column] - (codes[:, column] - zero[:, own]) * scale[:, own].double()
        weight = weight - torch.outer(error, inverse[column] / inverse[column, column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes, scale, zero


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "largest first"])
def test_gptq_is_optimal_brain_surgeon(grid, act_order):
    weight, x = torch.randn(6, 24, dtype=torch.float64), correlated()
    hessian = x.T @ x
    order = torch.argsort(hessian.diagonal(), descending=True).tolist() if act_order else list(range(24))
    expected = brute_force_obs(weight, hessian, grid, order, static=act_order)
    found = rounded(weight, hessian, grid, act_order=act_order)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gptq_blocks_end_where_groups_do():
    weight, x = torch.randn(4, 300, dtype=torch.float64), correlated(600, 300)
    hessian = x.T @ x
    for group in (0, 130, 200):
        expected = brute_force_obs(weight, hessian, Grid(4, group), list(range(300)), static=False)
        found = rounded(weight, hessian, Grid(4, group))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), group


def test_the_factor_is_of_the_inverse():
    x = correlated()
    hessian = x.T @ x
    factor = inverse_factor(hessian)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(24)
    assert torch.equal(factor, factor.triu()) and torch.allclose(factor.T @ factor @ damped, torch.eye(24).double())
    assert inverse_factor(torch.zeros(3, 3)).isfinite().all(), "a layer whose inputs are all 0"


def output_errors(layer: nn.Linear, x: torch.Tensor, *names: str) -> list[float]:
    """The squared error of the output under each method, calibrated on `x`."""
    moments = SecondMoments()
    moments.update(x)
    truth, found = layer(x), []
    for name in names:
        method = parse_method(name)
        made = method.quantize(layer, moments.result() if method.calibrated else None)
        found.append((made(x) - truth).square().sum().item())
    return found


def test_calibrated_codes_beat_rounding_to_nearest():
    layer, x = nn.Linear(64, 32), correlated(400, 64, torch.float32)
    x[:, 5] *= 30
    for group in ("group=16", "group=0", "3:group=16"):
        plain, gptq, awq = output_errors(layer, x, *(f"{name}@{group}" for name in ("rtn", "gptq", "awq")))
        assert gptq < plain / 1.5 and awq < plain / 1.2


def test_an_input_that_is_always_0_gets_no_weight_of_gptq():
    layer, x = nn.Linear(16, 4), correlated(50, 16, torch.float32)
    x[:, 3] = 0
    moments = SecondMoments()
    moments.update(x)
    made = Gptq(group=0).quantize(layer, moments.result())
    assert (made.dense()[:, 3] == 0).all() and made(x).isfinite().all()


def test_awq_takes_the_ratio_with_the_smallest_error():
    layer, x = nn.Linear(64, 32), correlated(400, 64, torch.float32)
    x[:, 5] *= 30
    moments = SecondMoments()
    moments.update(x)
    method, truth = parse_method("awq@group=16"), layer(x)
    chosen = method.quantize(layer, moments.result())
    errors = []
    for ratio in RATIOS:
        weight, factors = layer.weight.data, factors_of(moments.result()[0], ratio)
        tried = method.rounded(weight * factors, layer.bias)
        tried.factors = factors
        errors.append((tried(x) - truth).square().sum(1).mean().item())
        assert torch.equal(method.nearest(weight, factors), tried.dense() / factors)
        assert output_error(weight, method.nearest(weight, factors), moments.result()[1:]) == pytest.approx(
            errors[-1], rel=1e-3
        )
    assert (chosen(x) - truth).square().sum(1).mean().item() == pytest.approx(min(errors), rel=1e-3) and min(
        errors
    ) < errors[0]


def test_second_moments_are_those_of_all_rows():
    x, moments = torch.randn(30, 7), SecondMoments()
    for part in (x[:4].half().float(), x[4:].view(2, 13, 7)):
        moments.update(part)
    rows = torch.cat((x[:4].half().float(), x[4:])).double()
    expected = torch.cat((rows.abs().mean(0, keepdim=True), rows.T @ rows / 30))
    assert torch.allclose(moments.result().double(), expected, atol=1e-5)


def test_even_moments_are_those_of_the_rows_directions():
    x, moments = torch.randn(30, 7) * torch.logspace(-3, 4, 30)[:, None], SecondMoments(even=True)
    x[3] = 0
    moments.update(x)
    rows = x.double() / x.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    expected = torch.cat((rows.abs().mean(0, keepdim=True), rows.T @ rows / 30))
    assert torch.allclose(moments.result().double(), expected, atol=1e-5)


def test_a_massive_token_does_not_have_gptq_to_itself():
    """Where each token counts alike, the others lose as little as if it were not there."""
    layer, x = nn.Linear(64, 32), correlated(400, 64, torch.float32)
    x[0] = 1000 * torch.randn(64)

    def lost(name: str, rows: torch.Tensor) -> float:
        method = parse_method(name)
        moments = method.observer(layer)
        moments.update(rows)
        made = method.quantize(layer, moments.result())
        return (made(x[1:]) - layer(x[1:])).square().sum().item()

    even, alone = (lost("gptq@3:group=16", rows) for rows in (x, x[1:]))
    plain, plain_alone = (lost("gptq@3:group=16:even=off", rows) for rows in (x, x[1:]))
    assert even < 1.1 * alone and plain > 1.1 * plain_alone


def test_an_input_sample_is_spread_over_each_call():
    x, sample = torch.randn(1000, 3), InputSample()
    sample.update(x)
    sample.update(x[:5])
    found = sample.result()
    assert torch.equal(found[0], x.abs().amax(0)) and torch.equal(found[1:], torch.cat((x[::16], x[:5])))


def test_the_searched_alpha_is_the_best_of_all():
    layer, x = nn.Linear(64, 32), torch.randn(48, 64)
    x[:, 5] *= 80
    sample = InputSample()
    sample.update(x)
    truth = layer(x)
    searched = parse_method("smoothquant@auto").quantize(layer, sample.result())
    fixed = [parse_method(f"smoothquant@{step / 20}").quantize(layer, x.abs().amax(0)) for step in range(21)]
    errors = [(made(x) - truth).square().sum().item() for made in fixed]
    assert (searched(x) - truth).square().sum().item() == pytest.approx(min(errors)) and min(errors) < errors[16] / 2


def test_one_group_a_row_is_vectorwise():
    layer, x = nn.Linear(24, 8), torch.randn(5, 24)
    vector = NaiveLinear.over(layer, METHODS["vectorwise"])(x)
    for typed in ("groupwise@0", "groupwise@24", "groupwise@100"):
        assert torch.allclose(NaiveLinear.over(layer, parse_method(typed))(x), vector, atol=1e-6)
    finer = NaiveLinear.over(layer, parse_method("groupwise@7"))(x)
    assert (finer - layer(x)).norm() < (vector - layer(x)).norm()


@pytest.mark.parametrize("x", [torch.randn(9, 5), torch.rand(9, 5) + 3, -torch.rand(9, 5), torch.zeros(2, 2)])
def test_a_zero_point_comes_back_within_half_a_step(x):
    codes, scale, zero = zero_point_linear.rounded(x)
    assert codes.min() >= -128 and codes.max() <= 127 and torch.equal(codes, codes.round())
    assert ((codes - zero) * scale - x).abs().max() <= scale / 2 * (1 + 1e-5)


def test_the_worked_example_of_a_zero_point():
    """From -0.5 to 0.8: 255 steps of 0.0050980, and 0 is the code 98 of 0 to 255, -30 of -128 to 127."""
    codes, scale, zero = zero_point_linear.rounded(torch.tensor([-0.5, 0.0, 0.8]))
    assert scale == pytest.approx(1.3 / 255) and zero + 128 == 98 and codes.tolist() == [-128, -30, 127]


@pytest.mark.parametrize("by_row", [True, False])
def test_fp8_codes_are_torchs_own_conversion(by_row):
    x = torch.randn(7, 33) * torch.logspace(-6, 3, 7)[:, None]
    codes, scale = fp8_linear.rounded(x, by_row=by_row)
    expected = (x / scale).to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert codes.float().abs().amax(1).max() == 448 and (x[codes.float() == 448] > 0).all()
    layer = nn.Linear(33, 4)
    made = fp8_linear.Fp8Linear(layer, by_row=by_row)
    w = made.weight.double() * made.scale
    assert torch.allclose(made(x).double(), (codes.double() * scale) @ w.T + layer.bias.double(), rtol=1e-4, atol=1e-3)


def test_outliers_meet_the_16_bit_weights_of_the_papers_formula():
    layer, x = nn.Linear(64, 32).half(), torch.randn(9, 64).half()
    layer.weight.data[:, 5] *= 1e-3  # beside the others of its row this column rounds to codes of 0
    x[:, 5] *= 1000
    ours, papers = (parse_method(f"llm-int8@outlier_weights={bits}").quantize(layer) for bits in (8, 16))
    truth = layer(x).float()
    assert (papers(x) - truth).norm() < (ours(x) - truth).norm() / 10
    x[:, 5] = 0
    assert torch.equal(papers(x), ours(x)), "without an outlier they are the same"
    with pytest.raises(BadChoice, match="16 bit"):
        layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
        parse_method("llm-int8@outlier_weights=16").quantize(layer)


@pytest.mark.parametrize(
    "typed",
    ["rtn@group=16", "gptq@3:group=10", "awq@group=16", "zeropoint", "groupwise@8", "fp8", "fp8@tensor", "nf4"]
    + ["smoothquant@auto", "llm-int8@outlier_weights=16", "llm-int8@outliers=row"],
)
def test_a_model_weighs_what_was_predicted_and_still_speaks(typed):
    method, ids, statistics = parse_method(typed), torch.arange(20)[None], None
    dense = planted_llama(torch.float32)
    if method.calibrated:
        with Calibration(dense, method) as found:
            dense(ids)
        statistics = found.statistics
    predicted = method.predict(planted_llama(torch.float16))
    model = method.quantize_(planted_llama(torch.float16), "cpu", statistics)
    assert (predicted.weights, predicted.scales) == (stored_bytes(model), method.scale_bytes(model))
    assert coverage(model).linear_share == pytest.approx(
        coverage(METHODS["vectorwise"].quantize_(planted_llama(torch.float16), "cpu")).linear_share
    )
    truth = dense(ids).logits
    assert (model(ids).logits.float() - truth).norm() < 0.8 * truth.norm()


@pytest.mark.parametrize("rows", [32, 40, 72])
@pytest.mark.parametrize("columns", [32, 64, 72, 96])
def test_nf4_multiplies_every_shape(rows, columns):
    """bitsandbytes itself does not on every CPU."""
    pytest.importorskip("bitsandbytes")
    linear, x = nn.Linear(columns, rows, dtype=torch.bfloat16), torch.randn(3, columns, dtype=torch.bfloat16)
    with torch.inference_mode():
        truth, found = linear(x).float(), METHODS["nf4"].quantize(linear)(x).float()
    assert (found - truth).norm() < 0.15 * truth.norm()


def test_hooks_find_packed_layers():
    layer = METHODS["rtn"].rounded(torch.randn(4, 16), None)
    assert (
        isinstance(layer, PackedLinear) and isinstance(layer, nn.Linear) and layer(torch.randn(2, 16)).shape == (2, 4)
    )


@pytest.mark.parametrize(
    "name", ["gptq@4:group=8", "gptq@4:group=8:act_order=off:even=off", "awq@4:group=8", "smoothquant@auto"]
)
def test_one_token_is_enough_to_calibrate(name):
    """One row of inputs, half of them 0: a Hessian of rank 1, and no factor of 0 or infinity."""
    method, linear, x = parse_method(name), nn.Linear(24, 16).requires_grad_(False), torch.randn(1, 24)
    x[:, ::2] = 0
    observer = method.observer(linear)
    observer.update(x)
    found = method.quantize(linear, observer.result())(x)
    assert (found - linear(x)).norm() < 0.2 * linear(x).norm()


@pytest.mark.parametrize("name", ["gptq", "awq", "smoothquant"])
def test_no_token_at_all_is_an_error(name):
    with pytest.raises(AssertionError, match="the layer was never run"):
        parse_method(name).observer(nn.Linear(8, 8)).result()
