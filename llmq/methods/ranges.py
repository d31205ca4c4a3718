"""The range that the codes of a few bits are spread over: a scale and a zero-point for each group of weights.

`minmax`: from the smallest weight of a group to its largest, so that none is clipped. `percentile`: the largest and the
smallest few of a thousand are clipped, for the sake of finer steps. `mse`: the scale and the zero-point for which
Σ (w - ŵ)² of the group is least: the range is narrowed step by step, and the best one's scale then is the least-squares
one of its codes, s = Σ w q / Σ q² with q = code - zero, as long as that helps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RANGES = ("minmax", "mse", "percentile")
INSIDE = 0.999  # of a group's weights are within its percentiles
NARROWEST, STEPS = 0.4, 40  # of the whole range, in so many steps
REFINEMENTS = 4


def scale_and_zero(groups: torch.Tensor, bits: int, kind: str = "minmax") -> tuple[torch.Tensor, torch.Tensor]:
    """Scale, float16, and zero-point, in the dtype of `groups`, (...,) each, of groups (..., numbers): a number is
    about (code - zero) · scale, codes and zero-points from 0 to 2^bits - 1. 0 is one of the numbers, exactly."""
    most = 2**bits - 1
    low, high = _percentiles(groups) if kind == "percentile" else (groups.amin(-1), groups.amax(-1))
    low, high = low.clamp_max(0), high.clamp_min(0)
    return _least_squares(groups, low, high, most) if kind == "mse" else _stored(low, high, most)


def squared_error(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, most: int) -> torch.Tensor:
    """Σ (w - ŵ)² of each group, (...,)."""
    step = scale.to(groups.dtype)[..., None]
    return (_steps(groups, step, zero, most) * step - groups).square().sum(-1)


def _steps(groups: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, most: int) -> torch.Tensor:
    """code - zero of each number."""
    zero = zero[..., None]
    return (groups / step).round().add_(zero).clamp_(0, most).sub_(zero)


def _stored(low: torch.Tensor, high: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = _positive((high - low) / most)
    return scale, (-low / scale.to(low.dtype)).round().clamp(0, most)


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """As it is stored, float16; 1 where that is 0."""
    import torch

    scale = scale.to(torch.float16)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _percentiles(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest numbers of a group that leave half of what is not inside on either side; its ends in small groups."""
    count = groups.shape[-1]
    outside = int((1 - INSIDE) / 2 * count + 0.5)
    return groups.kthvalue(1 + outside, -1).values, groups.kthvalue(count - outside, -1).values


def _least_squares(
    groups: torch.Tensor, low: torch.Tensor, high: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    best = _stored(low, high, most)
    least = squared_error(groups, *best, most)
    for step in range(1, STEPS + 1):
        share = 1 - (1 - NARROWEST) * step / STEPS
        best, least = _better(groups, best, least, _stored(low * share, high * share, most), most)
    for _ in range(REFINEMENTS):
        scale, zero = best
        steps = _steps(groups, scale.to(groups.dtype)[..., None], zero, most)
        fitted = (groups * steps).sum(-1) / steps.square().sum(-1).clamp_min(1)
        best, least = _better(groups, best, least, (_positive(fitted), zero), most)
    return best


def _better(groups: torch.Tensor, best: tuple, least: torch.Tensor, other: tuple, most: int) -> tuple:
    """Of two scales and zero-points, group by group, those of the smaller error; and that error."""
    import torch

    error = squared_error(groups, *other, most)
    kept = error >= least
    return tuple(torch.where(kept, a, b) for a, b in zip(best, other, strict=True)), torch.where(kept, least, error)
