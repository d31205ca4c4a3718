"""How a method rounds one tensor on its own: its scales, its codes, the numbers these stand for, and the sums behind
one of them in words. The functions of the methods' layers do the rounding; nothing is defined here a second time.

`x` is float32 (rows, columns) throughout. A tensor may be rounded some rows at a time: `fit` sees all of it where
`whole`, else the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmq.formatting import format_number

if TYPE_CHECKING:
    import torch

    from llmq.methods.layers.packed_linear import Grid

NF4_BLOCK = 64  # numbers that share a scale


@dataclass(frozen=True)
class Rounding:
    """A kind of rounding. `whole`: one fit serves the whole tensor."""

    whole: ClassVar[bool] = False

    def fit(self, x: torch.Tensor) -> Any:
        """What the codes are made with."""
        raise NotImplementedError

    def apply(self, x: torch.Tensor, fit: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and the numbers they stand for, float32, both of the shape of `x`."""
        raise NotImplementedError

    def sharing(self, x: torch.Tensor, row: int, column: int) -> torch.Tensor:
        """The numbers that share the scale of one, (n,)."""
        return x.flatten() if self.whole else x[row]

    def worked(self, x: float, sharing: torch.Tensor, code: float, value: float) -> list[str]:
        """The formula with the numbers of one element in it, a line a step."""
        raise NotImplementedError


@dataclass(frozen=True)
class Symmetric(Rounding):
    """Int8 codes in [-127, 127] and an absmax for the tensor (`group` None), a row (0) or so many numbers of a row."""

    group: int | None

    @property
    def whole(self) -> bool:
        return self.group is None

    def fit(self, x):
        from llmq.methods.layers.naive_linear import absmax_of

        return absmax_of(x, self.group)

    def apply(self, x, fit):
        from llmq.methods.layers.naive_linear import codes_of, spread

        codes = codes_of(x, fit, self.group)
        return codes, codes * spread(fit / 127, self.group, x.shape[1])

    def sharing(self, x, row, column):
        if not self.group:
            return super().sharing(x, row, column)
        first = column - column % self.group
        return x[row, first : first + self.group]

    def worked(self, x, sharing, code, value):
        absmax = sharing.abs().max().item()
        if absmax == 0:
            return ["scale = max|x| / 127 = 0: every code is 0"]
        scale = absmax / 127
        return [
            f"scale = max|x| / 127 = {_n(absmax)} / 127 = {_n(scale)}",
            f"code = round(x / scale) = round({_n(x)} / {_n(scale)}) = {_n(code)}",
            _back(f"code × scale = {_n(code)} × {_n(scale)}", x, value),
        ]


@dataclass(frozen=True)
class Decomposed(Rounding):
    """LLM.int8()'s: columns with an |x| of `threshold` or more stay in 16 bit, `by_row` only those numbers; the rest is
    int8 with an absmax a row."""

    threshold: float
    by_row: bool = False

    @property
    def whole(self) -> bool:
        return not self.by_row

    def fit(self, x):
        """What stays, bool: (columns,), by row (rows, columns)."""
        if self.by_row:
            return (x.half().abs() >= self.threshold) & (self.threshold > 0)
        low, high = x.aminmax(dim=0)
        return (high.maximum(-low).half() >= self.threshold) & (self.threshold > 0)

    def apply(self, x, fit):
        import torch

        from llmq.kernels.primitives import split_rows

        split = split_rows(x, self.threshold, by_row=self.by_row)
        codes = split.codes.float().masked_fill_(fit, 0)
        values = codes * (split.absmax / 127)[:, None]
        return codes, torch.where(fit, x.half().float(), values) if fit.any() else values

    def sharing(self, x, row, column):
        """The numbers of the row below the threshold; those that decide on its 16 bits where it keeps them."""
        deciding = x[row, column].view(1) if self.by_row else x[:, column]
        kept = self.threshold > 0 and deciding.abs().max() >= self.threshold
        return deciding if kept else x[row][(x[row].abs() < self.threshold) | (self.threshold == 0)]

    def worked(self, x, sharing, code, value):
        largest = sharing.abs().max().item()
        if 0 < self.threshold <= largest:
            what = "|x|" if self.by_row else "max|x| of the column"
            kept = f"{what} = {_n(largest)} ≥ {self.threshold:g}: it stays in 16 bit"
            return [kept, _back(f"FP16({_n(x)})", x, value)]
        return Symmetric(0).worked(x, sharing, code, value)


@dataclass(frozen=True)
class Affine(Rounding):
    """Int8 codes in [-128, 127] with one scale and one zero-point."""

    whole = True

    def fit(self, x):
        from llmq.methods.layers.zero_point_linear import scale_and_zero

        return scale_and_zero(x)

    def apply(self, x, fit):
        from llmq.methods.layers.zero_point_linear import codes_of

        codes = codes_of(x, *fit)
        return codes, (codes - fit[1]) * fit[0]

    def worked(self, x, sharing, code, value):
        return _affine(x, code, value, sharing, self.fit(sharing), steps=255, offset=" − 128")


@dataclass(frozen=True)
class OnGrid(Rounding):
    """Codes of a few bits with a 16-bit scale and a zero-point for a group of a row."""

    grid: Grid

    def fit(self, x):
        return self.grid.of(x)

    def apply(self, x, fit):
        scale, zero = (self.grid.spread(values.float(), x.shape[1]) for values in fit)
        codes = self.grid.round(x, scale, zero)
        return codes, (codes - zero) * scale

    def sharing(self, x, row, column):
        return Symmetric(self.grid.group).sharing(x, row, column)

    def worked(self, x, sharing, code, value):
        return _affine(x, code, value, sharing, self.grid.of(sharing[None]), steps=2**self.grid.bits - 1)


@dataclass(frozen=True)
class Float8(Rounding):
    """E4M3 with a scale a row, or one a tensor, that brings the largest number to 448."""

    by_row: bool

    @property
    def whole(self) -> bool:
        return not self.by_row

    def fit(self, x):
        from llmq.methods.layers.fp8_linear import scale_of

        return scale_of(x, by_row=self.by_row)

    def apply(self, x, fit):
        from llmq.methods.layers.fp8_linear import codes_of

        codes = codes_of(x, fit).float()
        return codes, codes * fit

    def worked(self, x, sharing, code, value):
        absmax = sharing.abs().max().item()
        scale = absmax / 448 if absmax else 1.0
        return [
            f"scale = max|x| / 448 = {_n(absmax)} / 448 = {_n(scale)}",
            f"code = E4M3(x / scale) = E4M3({_n(x / scale)}) = {_n(code)}",
            _back(f"code × scale = {_n(code)} × {_n(scale)}", x, value),
        ]


@dataclass(frozen=True)
class NormalFloat(Rounding):
    """NF4: the nearest of 16 levels, with an absmax for every 64 numbers one after the other, across rows where these
    have an odd length."""

    def fit(self, x):
        """The absmax of every number's block, (rows, columns)."""
        from torch.nn import functional

        padded = functional.pad(x.flatten().abs(), (0, -x.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
        absmax = padded.amax(1, keepdim=True).expand(-1, NF4_BLOCK).reshape(-1)
        return absmax[: x.numel()].view(x.shape)

    def apply(self, x, fit):
        import torch

        levels = self.levels().to(x.device)
        codes = torch.bucketize(x / fit.masked_fill(fit == 0, 1), (levels[1:] + levels[:-1]) / 2)
        return codes.float(), levels.take(codes) * fit

    @staticmethod
    def levels() -> torch.Tensor:
        """The 16 levels, ascending, as bitsandbytes has them."""
        from llmq.methods.nf4 import levels

        return levels()

    def sharing(self, x, row, column):
        first = (row * x.shape[1] + column) // NF4_BLOCK * NF4_BLOCK
        return x.flatten()[first : first + NF4_BLOCK]

    def worked(self, x, sharing, code, value):
        absmax, level = sharing.abs().max().item(), self.levels()[int(code)].item()
        return [
            f"scale = max|x| of {len(sharing)} numbers = {_n(absmax)}",
            f"x / scale = {_n(x / absmax if absmax else 0.0)}",
            f"code = {int(code)}, whose level is the nearest of 16: {_n(level)}",
            _back(f"level × scale = {_n(level)} × {_n(absmax)}", x, value),
        ]


def _affine(
    x: float, code: float, value: float, sharing: torch.Tensor, fit: tuple, *, steps: int, offset: str = ""
) -> list[str]:
    low, high = (end.item() for end in sharing.aminmax())
    scale, zero = (one.item() for one in fit)
    span = f"({_n(max(high, 0.0))} − {_n(min(low, 0.0), wrapped=True)})"
    return [
        f"scale = (max − min) / {steps} = {span} / {steps} = {_n(scale)}",
        f"zero = round(−min / scale){offset} = {_n(zero)}",
        f"code = round(x / scale) + zero = round({_n(x)} / {_n(scale)}) + {_n(zero, wrapped=True)} = {_n(code)}",
        _back(f"(code − zero) × scale = ({_n(code)} − {_n(zero, wrapped=True)}) × {_n(scale)}", x, value),
    ]


def _back(formula: str, x: float, value: float) -> str:
    return f"back = {formula} = {_n(value)}, error {_n(value - x)}"


def _n(value: float, *, wrapped: bool = False) -> str:
    """A number as it stands in a formula; `wrapped`: a negative one in parentheses."""
    text = format_number(value + 0.0).replace("-", "−")  # no −0
    return f"({text})" if wrapped and value < 0 else text
