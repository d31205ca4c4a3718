"""GPTQ: weights rounded one input after the other, the error of each made up for by those that are still to come.

With the inputs X of a layer the error of a rounded weight row is (w - q) H (w - q)ᵀ, H = 2 X Xᵀ: the layer's Hessian,
the same for every row. Optimal Brain Surgeon (Hassibi & Stork 1993) says what rounding one weight, by w_j - q_j, asks
of the others: to change by -(w_j - q_j) / [H⁻¹]_jj · [H⁻¹]_j,: . GPTQ takes the inputs in one order for all rows, so
that one H⁻¹ serves them all, and reads the rows that its shrinking inverses would have off one Cholesky factor,
H⁻¹ = Uᵀ U (section 3.3): [H⁻¹]_j,: / [H⁻¹]_jj of the inputs from j on is U_j,: / U_jj.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from llmq.fields import Switch
from llmq.methods.rtn import Grouped

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmq.methods.calibrate import SecondMoments
    from llmq.methods.layers.packed_linear import Grid, PackedLinear

DAMPING = 0.01  # of the mean of H's diagonal is added to it (section 3.3)
BLOCK = 128  # inputs, whose errors reach the weights behind them together


@dataclass(frozen=True)
class Gptq(Grouped):
    """`act_order`: the inputs with the largest activations first; the groups' scales are then those of the weight as it
    was, so that a group stays together. `even`: every token of the calibration counts alike, H = 2 Σ x xᵀ / |x|², as
    the norms behind a layer see them: a few tokens, the first of a text above all, have activations so large that they
    have H to themselves. Both off is the paper's algorithm."""

    act_order: Annotated[
        bool, Switch(help="Round the inputs with the largest activations first.", label="Largest activations first")
    ] = True
    even: Annotated[
        bool, Switch(help="Every token of the calibration counts alike, however large.", label="Tokens count alike")
    ] = True
    name, label = "gptq", "GPTQ"
    about = (
        "Weights of a few bits, rounded one input after the other so that later weights make up for the error of "
        "earlier ones on a calibration text."
    )
    source = "Frantar et al. 2022, GPTQ, arXiv 2210.17323, section 3, algorithm 1"
    calibrated = True
    calibration_windows = 24

    @property
    def calibration(self) -> str:
        return "even-second-moments" if self.even else "second-moments"

    def observer(self, linear: nn.Module) -> SecondMoments:
        from llmq.methods.calibrate import SecondMoments

        return SecondMoments(even=self.even)

    def quantize(self, linear: nn.Linear, statistics: torch.Tensor | None = None) -> PackedLinear:
        """`statistics`: as `SecondMoments` collects them."""
        from llmq.methods.layers.packed_linear import PackedLinear

        assert statistics is not None, "GPTQ needs the statistics of a calibration"
        weight = linear.weight.data.float()
        hessian = statistics[1:].to(weight.device)
        return PackedLinear(*rounded(weight, hessian, self.grid, act_order=self.act_order), self.grid, linear.bias)


def rounded(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, *, act_order: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (out, in), scales and zero-points (out, groups) of a weight (out, in); `hessian` (in, in), up to a factor.

    Algorithm 1 of the paper, whose blocks end here where a group does, since a group's scale is that of its weights
    when its turn comes. An input that is always 0 has no say: its weights become 0.
    """
    import torch

    diagonal, columns = hessian.diagonal(), weight.shape[1]
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(columns)
    order, group = order.to(weight.device), grid.group or columns
    factor = inverse_factor(hessian[order][:, order]).to(weight.dtype)
    weight = weight.masked_fill(diagonal == 0, 0)
    codes, (scale, zero) = torch.empty_like(weight), grid.of(weight)
    weight = weight[:, order]
    for start, end in _blocks(columns, columns if act_order else group):
        if not act_order and start % group == 0:
            own = slice(start // group, start // group + 1)
            scale[:, own], zero[:, own] = grid.of(weight[:, start : start + group])
        inputs = order[start:end]
        owners = inputs // group
        now, own_factor = weight[:, start:end], factor[start:end, start:end]
        codes[:, inputs], errors = _rounded_block(now, own_factor, grid, scale[:, owners], zero[:, owners])
        weight[:, end:] -= errors @ factor[start:end, end:]
    return codes, scale, zero


def _blocks(columns: int, group: int) -> Iterator[tuple[int, int]]:
    """The first input of each block and the one behind its last."""
    for first in range(0, columns, group):
        last = min(first + group, columns)
        yield from ((start, min(start + BLOCK, last)) for start in range(first, last, BLOCK))


def _rounded_block(
    weight: torch.Tensor, factor: torch.Tensor, grid: Grid, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (out, block), and each input's error over its U_jj; all but `factor` (out, block). Changes `weight`."""
    codes, errors = weight.clone(), weight.clone()
    for j in range(weight.shape[1]):
        codes[:, j] = grid.round(weight[:, j], scale[:, j], zero[:, j])
        errors[:, j] = (weight[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]) / factor[j, j]
        weight[:, j + 1 :] -= errors[:, j : j + 1] * factor[j, j + 1 :]
    return codes, errors


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """U, upper triangular, of H⁻¹ = Uᵀ U, in float64, for a damped H."""
    import torch

    hessian = hessian.double()
    damping = DAMPING * hessian.diagonal().mean().item() or 1.0
    damped = hessian + damping * torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
