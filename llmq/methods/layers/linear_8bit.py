"""A linear layer as bitsandbytes saves it, multiplied by `torch.ops.llmq`, which transformers saves and compiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from llmq.errors import BadChoice, ModelUnavailable
from llmq.hooks import kind_and_layer
from llmq.kernels import registered  # noqa: F401 makes torch.ops.llmq
from llmq.methods import swap
from llmq.methods.layers.int8_linear import int8_weight

SAME_INPUT = ("q/k/v", "gate/up")  # kinds of layers


class Linear8bit(nn.Linear):
    """`weight`: int8 (out, in); `SCB`: float32 (out,), the rows' absmax; `weight_format`: uint8 (), 0 for row by row;
    so bitsandbytes names them. Before loading all are on the meta device, and a weight that is still to be quantized is
    in floating point."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, threshold: float, device: torch.device | str):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias, self.threshold = weight, bias, threshold
        Group(self)
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
            y = self.group.product(x, self)
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
        self.SCB = self.weight.SCB = self.SCB.view(-1)  # on the weight, too, where other methods look for it


class Group:
    """Layers that are given the same tensor, one after the other: the first asks for the products of all."""

    def __init__(self, *layers: Linear8bit):
        self.layers = layers
        self.made: tuple | None = None  # the input, and the products that the layers after the first still fetch
        for place, layer in enumerate(layers):
            layer.group, layer.place = self, place

    def product(self, x: torch.Tensor, layer: Linear8bit) -> torch.Tensor:
        """What `layer` makes of one token's activations, (out,). Nothing is kept once the last layer has its own; a
        group whose layers turn out to get different tensors is dissolved."""
        if len(self.layers) == 1:
            return self._products(x)[0]
        made = self.made if layer.place else (x, self._products(x))
        if made is None or made[0] is not x or layer.threshold != self.layers[0].threshold:
            return self._dissolved(x, layer)
        self.made = None if layer.place == len(self.layers) - 1 else made
        return made[1][layer.place]

    def _products(self, x: torch.Tensor) -> list[torch.Tensor]:
        weights, scales = [layer.weight for layer in self.layers], [layer.SCB for layer in self.layers]
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        return torch.ops.llmq.linear_token(x, weights, scales, biases, self.layers[0].threshold)

    def _dissolved(self, x: torch.Tensor, layer: Linear8bit) -> torch.Tensor:
        self.made = None
        for member in self.layers:
            Group(member)
        return layer.group.product(x, layer)


def convert_(model: nn.Module, threshold: float) -> None:
    """Put int8 layers in the place of every linear layer but the head of a loaded model, or of those that are int8 in
    an int8 checkpoint. Raises BadChoice where there are none."""
    layers = swap.opened_int8(model) or list(swap.linear_layers(model))
    swap.replace_(model, layers, lambda linear, _: Linear8bit.over(linear, threshold), {})
    group_layers(model)


def group_layers(model: nn.Module) -> None:
    """Join the layers of one module that its name says are given the same tensor: q, k and v; gate and up."""
    for parent in model.modules():
        kinds: dict[str, list[Linear8bit]] = {}
        for name, layer in parent.named_children():
            if isinstance(layer, Linear8bit) and (kind := kind_and_layer(name)[0]) in SAME_INPUT:
                kinds.setdefault(kind, []).append(layer)
        for layers in kinds.values():
            if len({(layer.in_features, layer.bias is None, layer.weight.device) for layer in layers}) == 1:
                Group(*layers)


def layers_of(model: nn.Module) -> Iterator[tuple[str, Linear8bit]]:
    """(name, layer) of every int8 layer of this kind."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear8bit))
