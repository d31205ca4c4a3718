"""Round to nearest in groups: the honest baseline of GPTQ and AWQ, with the same codes, scales and zero-points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from llmq.fields import Choice, Number
from llmq.methods.base import Method, WeightBytes
from llmq.methods.ranges import RANGES
from llmq.methods.rounding import OnGrid, Rounding

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmq.methods.layers.packed_linear import Grid, PackedLinear

BITS = Number(2, 8, whole=True, help="Of a stored weight.", label="Bits of a weight", step=1)
GROUP = Number(
    0,
    1 << 20,
    whole=True,
    help="Inputs of a row that share a scale and a zero-point. 0 is a whole row.",
    label="Group",
    zero="a row",
    shown=1024,
    step=32,
)
RANGE = Choice(
    RANGES,
    ("from the smallest to the largest", "of the least squared error", "without the outermost few"),
    help="What the codes of a group are spread over.",
    label="Range",
)


@dataclass(frozen=True)
class Grouped(Method):
    """Weights of `bits` bits with a 16-bit scale and an 8-bit zero-point for every `group` inputs of a row (`ranges`);
    activations keep their 16 bits. The codes are unpacked before every product: right numbers, no speed."""

    bits: Annotated[int, BITS] = 4
    group: Annotated[int, GROUP] = 128
    range: Annotated[str, RANGE] = "minmax"
    emulated = True

    def arithmetic(self, device: str, loop: str = "hf", cpu: str = "") -> str:
        group = f"every {self.group} inputs" if self.group else "a row"
        return (
            f"{self.bits}-bit linear weights with a scale and a zero-point for {group}, unpacked to FP16 before each "
            "product, so its speed means nothing; FP16 activations"
        )

    @property
    def grid(self) -> Grid:
        from llmq.methods.layers.packed_linear import Grid

        return Grid(self.bits, self.group, self.range)

    def quantize(self, linear: nn.Linear, statistics: torch.Tensor | None = None) -> PackedLinear:
        """Each weight to the nearest number of its group."""
        return self.rounded(linear.weight.data.float(), linear.bias)

    def rounded(self, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
        """A layer of the nearest codes of `weight`, float32 (out, in)."""
        from llmq.methods.layers.packed_linear import PackedLinear

        grid, columns = self.grid, weight.shape[1]
        scale, zero = grid.of(weight)
        codes = grid.round(weight, grid.spread(scale, columns), grid.spread(zero, columns))
        return PackedLinear(codes, scale, zero, grid, bias)

    def bytes(self, shape: tuple[int, int]) -> WeightBytes:
        from llmq.methods.layers.packed_linear import packed_bytes

        return WeightBytes(packed_bytes(shape, self.bits), 3 * shape[0] * self.grid.groups(shape[1]))

    def scale_bytes(self, model: nn.Module) -> int:
        return sum(getattr(module, "scale_bytes", 0) for module in model.modules())


@dataclass(frozen=True)
class Rtn(Grouped):
    name, label = "rtn", "rounded to nearest"
    about = "Weights of a few bits, each rounded to the nearest number of its group: what GPTQ and AWQ must beat."
    source = "the baseline of Frantar et al. 2022, GPTQ, arXiv 2210.17323, section 5"

    def rounding(self, *, weight: bool) -> Rounding | None:
        return OnGrid(self.grid) if weight else None
