"""Scales and zero-points: the least squared error against every scale and zero-point there is, percentiles, ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from llmq.errors import BadChoice
from llmq.methods import parse_method
from llmq.methods.layers.packed_linear import Grid
from llmq.methods.ranges import INSIDE, RANGES, scale_and_zero, squared_error


def heavy_tailed(groups: int, numbers: int) -> torch.Tensor:
    """As weights are: a few numbers far from the others."""
    x = torch.randn(groups, numbers)
    return x * torch.where(torch.rand_like(x) < 0.05, 4.0, 1.0)


def brute_force(group: torch.Tensor, bits: int) -> float:
    """The least error of a group over all its zero-points and a thousand scales."""
    most, width = 2**bits - 1, group.amax().clamp_min(0) - group.amin().clamp_max(0)
    scales = (width / most * torch.linspace(0.2, 1.2, 1000)).half()
    errors = [
        squared_error(group.expand(1000, -1), scales, torch.full((1000,), float(z)), most) for z in range(most + 1)
    ]
    return torch.stack(errors).min().item()


@pytest.mark.parametrize("bits", [3, 4])
def test_the_least_squared_error_is_near_that_of_every_scale_and_zero_point(bits):
    groups = heavy_tailed(24, 32)
    found = squared_error(groups, *scale_and_zero(groups, bits, "mse"), 2**bits - 1)
    plain = squared_error(groups, *scale_and_zero(groups, bits), 2**bits - 1)
    least = torch.tensor([brute_force(group, bits) for group in groups])
    assert (found <= plain).all(), "group by group, never worse"
    assert (found >= 0.999 * least).all(), "the brute force is the floor"
    assert found.sum() < 1.12 * least.sum() < plain.sum(), "12 % from the floor, and the floor far from min and max"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_weight_with_outliers_loses_less(bits):
    linear = nn.Linear(256, 64, bias=False)
    linear.weight.data = heavy_tailed(64, 256)
    lost = {
        kind: (parse_method(f"rtn@{bits}:group=64:range={kind}").quantize(linear).dense() - linear.weight).norm()
        for kind in RANGES
    }
    assert lost["mse"] < lost["minmax"]


def test_percentiles_are_numpys():
    groups = torch.randn(5, 4000)
    scale, zero = scale_and_zero(groups, 8, "percentile")
    ends = np.percentile(groups.numpy(), [50 * (1 - INSIDE), 50 * (1 + INSIDE)], axis=1)
    low, high = -zero * scale.float(), (255 - zero) * scale.float()
    np.testing.assert_allclose([low, high], ends, atol=0.02 * np.ptp(ends))
    inside = ((groups >= low[:, None] - scale[:, None]) & (groups <= high[:, None] + scale[:, None])).float().mean()
    assert INSIDE - 0.001 <= inside < 1
    small = torch.randn(3, 64)
    assert all(map(torch.equal, scale_and_zero(small, 4, "percentile"), scale_and_zero(small, 4)))


@pytest.mark.parametrize("kind", RANGES)
def test_constant_and_zero_groups_come_back(kind):
    weight = torch.tensor([0.0, 0.25, -3.0])[:, None].expand(3, 16).contiguous()
    grid = Grid(4, 16, kind)
    scale, zero = (grid.spread(values, 16).float() for values in grid.of(weight))
    back = (grid.round(weight, scale, zero) - zero) * scale
    torch.testing.assert_close(back, weight, rtol=2**-10, atol=0)
    assert (back[0] == 0).all()


@pytest.mark.parametrize("kind", RANGES)
def test_what_is_no_number_is_refused(kind):
    with pytest.raises(BadChoice, match="infinite or not a number"):
        Grid(4, 0, kind).of(torch.tensor([[1.0, float("inf")]]))


def test_a_range_that_is_none_is_refused():
    with pytest.raises(BadChoice, match="'widest'; choose from minmax, mse, percentile"):
        parse_method("rtn@range=widest")
