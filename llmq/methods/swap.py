"""The walk over a model: which layers a method replaces, the replacement itself, and what all of it weighs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from llmq.devices import are_several
from llmq.errors import BadChoice

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmq.methods.base import Method


Told = Callable[[float], None]  # with the share of the layers that are done, before each; what it raises ends the walk

_told: ContextVar[Told] = ContextVar("told", default=lambda share: None)


@contextmanager
def telling(told: Told) -> Iterator[None]:
    """While inside, `told` hears of every layer that is about to be replaced, whoever loads the model."""
    before = _told.set(told)
    try:
        yield
    finally:
        _told.reset(before)


def moved_(model: nn.Module, device: str) -> nn.Module:
    """Move `model` to a single device; one that is spread over several lies there already."""
    return model if are_several(device) else model.to(device)


def replace_(model: nn.Module, layers: list, quantize: Callable, statistics: Mapping[str, torch.Tensor]) -> None:
    """Put `quantize(layer, its statistics)` in the place of each of `layers`, (name, module), which are taken out of
    that list: a layer is freed as soon as it is replaced. Raises BadChoice where there are none."""
    require_layers(model, layers)
    layers.reverse()
    total = len(layers)
    while layers:
        _told.get()(1 - len(layers) / total)
        name, layer = layers.pop()
        parent, _, child = name.rpartition(".")
        made = quantize(as_linear(layer), statistics.get(name))
        setattr(model.get_submodule(parent), child, made)
        if made is not layer and getattr(layer, "_hf_hook", None):
            layer._parameters.clear()  # accelerate's hooks hold a layer in a circle, which is collected much later


@contextmanager
def without_hooks(module: nn.Module, after: Callable[[], nn.Module] | None = None) -> Iterator[None]:
    """Take accelerate's hook off `module` for a while; it is put back, or on the module that `after()` returns. A
    hooked module keeps the forward of the class that it had."""
    if not (hook := getattr(module, "_hf_hook", None)):
        yield
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    vars(module).pop("forward", None)  # which it leaves bound to the class
    yield
    add_hook_to_module(after() if after else module, hook)


def require_layers(model: nn.Module, layers: list) -> None:
    """Raises BadChoice where there are none, telling what the model has instead."""
    if not layers:
        owners = (m for m in model.modules() if next(m.parameters(recurse=False), None) is not None)
        kinds = ", ".join(sorted({type(module).__name__ for module in owners}))
        raise BadChoice(f"{type(model).__name__} keeps its weights in {kinds}: no linear layer to replace")


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every linear layer that methods replace: all but the output head, which LLM.int8() as
    transformers integrates it leaves out, what the model keeps in FP32, and classes with a forward of their own."""
    from torch import nn

    head, kept = model.get_output_embeddings(), kept_in_fp32(model)
    for name, module in model.named_modules():
        if (type(module) is nn.Linear or is_conv1d(module)) and module is not head and not kept(f"{name}.weight"):
            yield name, module


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is GPT-2's linear layer, whose weight is (in, out); its class takes seconds to import."""
    return type(module).__name__ == "Conv1D" and module.weight.ndim == 2


def as_linear(layer: nn.Module) -> nn.Linear:
    """A linear layer with its weight as (out, in)."""
    from torch import nn

    if not is_conv1d(layer):
        return layer
    linear = nn.Linear(*layer.weight.shape, device="meta")
    linear.weight, linear.bias = nn.Parameter(layer.weight.data.t().contiguous(), requires_grad=False), layer.bias
    return linear


def kept_in_fp32(model: nn.Module) -> Callable[[str], object]:
    """Tell by its name whether transformers keeps a parameter of a 16-bit model in FP32: routers and the like."""
    lists = (getattr(model, f"_keep_in_fp32_modules{end}", None) or () for end in ("", "_strict"))
    return re.compile("|".join(name for names in lists for name in names).replace("*", ".*") or "$^").search


def opened_int8(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of the layers an int8 checkpoint was opened into."""
    return [(n, m) for n, m in model.named_modules() if getattr(getattr(m, "weight", None), "SCB", None) is not None]


def replaced_layers(meta_model: nn.Module, method: Method) -> list[nn.Module]:
    """The layers of a dense model whose weights `method` stores in a form of its own."""
    layers = [] if method.dense else [layer for _, layer in method.layers(meta_model)]
    if method.int8_head:
        layers += [meta_model.get_input_embeddings(), meta_model.get_output_embeddings()]
    return layers


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    return tuple(layer.weight.shape)[:: -1 if is_conv1d(layer) else 1]


def stored_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Every parameter and buffer once; tied weights are one tensor."""
    return [*model.parameters(), *model.buffers()]


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied weights counted once."""
    return sum(tensor.nbytes for tensor in stored_tensors(model))


def cast_parameters_(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floating-point parameters, but for those the model keeps in FP32, and leave the buffers: rotary
    frequencies stay in FP32, as in a checkpoint."""
    kept = kept_in_fp32(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not kept(name):
            parameter.data = parameter.data.to(dtype)
    return model
