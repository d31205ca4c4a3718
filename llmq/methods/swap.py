"""The walk over a model: which layers a method replaces, the replacement itself, and what all of it weighs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmq.methods.base import Method, WeightBytes


def convert_(model: nn.Module, method: Method, device: str, statistics: Mapping[str, torch.Tensor]) -> nn.Module:
    """Replace every linear layer but the head as `method` says, in place; returns the model in eval mode.

    Layers that an int8 checkpoint was opened into have scales beside their weights; such a model is where it belongs
    and may not be moved.
    """
    import torch

    opened = opened_int8(model)
    cast_parameters_(model if opened else model.to(device), getattr(torch, method.dtype))
    for name, linear in [] if method.dense else [*non_head_linears(model), *opened]:
        replace_module(model, name, method.quantize(linear, statistics.get(name)))
    if method.int8_head:
        from llmq.methods.layers.int8_linear import convert_ends_

        convert_ends_(model, method.threshold)
    return model.eval()


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` says."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def non_head_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, linear) of every linear but the output head, which LLM.int8() as transformers integrates it leaves out."""
    from torch import nn

    head = model.get_output_embeddings()
    found = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and m is not head]
    return iter(found)


def opened_int8(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of the layers an int8 checkpoint was opened into."""
    return [(n, m) for n, m in model.named_modules() if getattr(getattr(m, "weight", None), "SCB", None) is not None]


def predict(meta_model: nn.Module, method: Method) -> WeightBytes:
    """Bytes of `meta_model` (no storage) under `method`; tied weights count once, buffers keep their type."""
    import torch

    from llmq.methods.base import WeightBytes

    layers = [] if method.dense else [linear for _, linear in non_head_linears(meta_model)]
    if method.int8_head:
        layers += [meta_model.get_input_embeddings(), meta_model.get_output_embeddings()]
    quantized = {id(layer.weight): method.bytes(tuple(layer.weight.shape)) for layer in layers}
    itemsize = getattr(torch, method.dtype).itemsize
    rest = sum(
        tensor.numel() * itemsize if tensor.requires_grad else tensor.nbytes
        for tensor in stored_tensors(meta_model)
        if id(tensor) not in quantized
    )
    weights, scales = (sum(getattr(b, part) for b in quantized.values()) for part in ("weights", "scales"))
    return WeightBytes(rest + weights, scales)


def stored_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter and buffer once; tied weights are one tensor."""
    seen = set()
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied weights counted once."""
    return sum(tensor.nbytes for tensor in stored_tensors(model))


def cast_parameters_(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the floating-point parameters and leave the buffers: rotary frequencies stay in FP32, as in a checkpoint."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model
