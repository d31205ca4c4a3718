"""What an int8 label really converts: the share of a model's linear weights, and of all its weights, in fewer bits."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmq.methods.swap import replaced_layers

if TYPE_CHECKING:
    from torch import nn

    from llmq.methods.base import Method


@dataclass(frozen=True)
class Coverage:
    """Numbers of weights. Linear: every matrix that is multiplied, in a linear layer or not (experts), and the head, be
    it a tied embedding. `left`: the linear ones that stay as they are, by name, with 'N' for the number of a layer."""

    linear_weights: int
    converted_linear_weights: int
    all_weights: int
    converted_weights: int
    left: tuple[str, ...]

    @property
    def linear_share(self) -> float:
        return self.converted_linear_weights / max(1, self.linear_weights)

    @property
    def shares(self) -> dict[str, float]:
        """As a contestant states them: of the linear weights, and of all."""
        return {"linear": self.linear_share, "all": self.share}

    @property
    def share(self) -> float:
        return self.converted_weights / max(1, self.all_weights)


def coverage(model) -> Coverage:
    """Count a loaded model, or the weights of a lean engine. Converted is what takes a byte a number, or less."""
    return _counted(_lean(model) if hasattr(model, "parts") else _parameters(model))


def predicted_coverage(meta_model: nn.Module, method: Method) -> Coverage:
    """What `method` will convert, from a dense model on the meta device."""
    converted = {id(layer.weight) for layer in replaced_layers(meta_model, method) if method.bits <= 8}
    return _counted((name, w, size, linear, id(w) in converted) for name, w, size, linear, _ in _parameters(meta_model))


def _counted(weights) -> Coverage:
    numbers, names, linear, converted = {}, {}, set(), set()
    for name, weight, numbers_in_it, is_linear, is_converted in weights:
        key = id(weight)  # a tied weight has two places
        numbers[key] = numbers_in_it
        names.setdefault(key, re.sub(r"\d+", "N", name))
        linear |= {key} if is_linear else set()
        converted |= {key} if is_converted else set()
    left = tuple(dict.fromkeys(names[key] for key in numbers if key in linear - converted))
    groups = (linear, linear & converted, numbers, converted)
    return Coverage(*(sum(numbers[key] for key in group) for group in groups), left)


def _parameters(model: nn.Module):
    from torch import nn

    for place, module in model.named_modules():
        for name, weight in module.named_parameters(place, recurse=False):
            linear = weight.ndim > 1 and not isinstance(module, nn.Embedding | nn.modules.conv._ConvNd)
            packed = linear and isinstance(module, nn.Linear)  # several numbers may share a byte
            size = module.out_features * module.in_features if packed else weight.numel()
            yield name, weight, size, linear, weight.element_size() == 1


def _lean(weights):
    for part in weights.parts():
        linear = len(part.shape) > 1 and (part is not weights.embedding or part is weights.head)
        converted = getattr(part, "absmax", None) is not None
        yield "head" if part is weights.head else "layers", part, math.prod(part.shape), linear, converted
