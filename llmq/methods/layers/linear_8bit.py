"""A linear layer as bitsandbytes saves it, multiplied by `torch.ops.llmq`, which transformers saves and compiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from llmq.errors import BadChoice, ModelUnavailable
from llmq.kernels import registered  # noqa: F401 makes torch.ops.llmq
from llmq.methods import swap
from llmq.methods.layers.int8_linear import int8_weight


class Linear8bit(nn.Linear):
    """`weight`: int8 (out, in); `SCB`: float32 (out,), the rows' absmax; `weight_format`: uint8 (), 0 for row by row;
    so bitsandbytes names them. Before loading all are on the meta device, and a weight that is still to be quantized is
    in floating point."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, threshold: float, device: torch.device | str):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias, self.threshold, self.shared = weight, bias, threshold, SharedSplit()
        self.register_buffer("SCB", torch.zeros(self.out_features, device=device, dtype=torch.float32))
        self.register_buffer("weight_format", torch.zeros((), device=device, dtype=torch.uint8))

    @classmethod
    def over(cls, linear: nn.Linear, threshold: float) -> Linear8bit:
        """The codes of `linear`, on its device."""
        made = int8_weight(linear.weight)
        layer = cls(nn.Parameter(made.codes, requires_grad=False), linear.bias, threshold, made.codes.device)
        layer.SCB = made.absmax
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out) in the type of `x`; the rows of one call pool their outlier columns."""
        if not x.is_floating_point():  # some models cast what comes to the type of the weight
            raise BadChoice("this model casts activations to a weight's type, which is int8 here: skip its layers")
        if x.numel() == self.in_features:
            split = self.shared.of(x, self)
            y = torch.ops.llmq.product(*split, self.weight, self.SCB, self.bias, x.dtype)
        else:
            rows = x.reshape(-1, self.in_features)
            y = torch.ops.llmq.linear_rows(rows, self.weight, self.SCB, self.bias, self.threshold)
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn, recurse: bool = True) -> Linear8bit:
        """Move to a device; scales keep their type whatever the others become."""
        scales = self.SCB
        super()._apply(fn, recurse)
        if self.SCB.dtype != scales.dtype:
            self.SCB = scales.to(self.SCB.device)
        return self

    def require_whole(self, name: str) -> None:
        """Raises ModelUnavailable unless codes and scales came out of the checkpoint, row by row."""
        if self.weight.dtype != torch.int8 or self.weight.shape != (self.out_features, self.in_features):
            raise ModelUnavailable(f"the checkpoint has no int8 weight of {self.out_features} rows for {name}")
        if not getattr(self.SCB, "_is_hf_initialized", False) or self.SCB.numel() != self.out_features:
            raise ModelUnavailable(f"the checkpoint has no {self.out_features} scales for {name}")
        if not getattr(self.weight_format, "_is_hf_initialized", False):
            self.weight_format.zero_()  # files of early versions name no format
        if self.weight_format.any():
            raise ModelUnavailable(f"{name} is stored in another format than row by row: save it again")
        self.SCB = self.SCB.view(-1)


class SharedSplit:
    """The decomposition of one token's activations, made once for all layers of a group that get the same tensor."""

    def __init__(self):
        self.last: Linear8bit | None = None
        self.made: tuple | None = None

    def of(self, x: torch.Tensor, layer: Linear8bit) -> registered.Split:
        """The split of `x` for `layer`; nothing is kept once the last layer of the group has it."""
        made = self.made
        if made is None or made[0] is not x or made[1] != layer.threshold:
            made = x, layer.threshold, torch.ops.llmq.split(x, layer.threshold)
        self.made = None if self.last in (None, layer) else made
        return made[2]


def convert_(model: nn.Module, threshold: float) -> None:
    """Put int8 layers in the place of every linear layer but the head of a loaded model, or of those that are int8 in
    an int8 checkpoint. Raises BadChoice where there are none."""
    layers = swap.opened_int8(model) or list(swap.linear_layers(model))
    swap.replace_(model, layers, lambda linear, _: Linear8bit.over(linear, threshold), {})
    share_splits(model)


def share_splits(model: nn.Module) -> None:
    """Let the layers side by side in one module, as wide as each other, share their splits: q, k, v; gate, up."""
    for parent in model.modules():
        groups: dict[int, list[Linear8bit]] = {}
        for layer in parent.children():
            if isinstance(layer, Linear8bit):
                groups.setdefault(layer.in_features, []).append(layer)
        for group in groups.values():
            shared = SharedSplit()
            shared.last = group[-1]
            for layer in group:
                layer.shared = shared


def layers_of(model: nn.Module) -> Iterator[tuple[str, Linear8bit]]:
    """(name, layer) of every int8 layer of this kind."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear8bit))
