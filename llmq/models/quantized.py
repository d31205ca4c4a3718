"""Checkpoints that are quantized already: which methods may open one, and the model with the codes that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmq.devices import are_several
from llmq.errors import BadChoice, ModelUnavailable
from llmq.models.checkpoint import CheckpointTensors
from llmq.models.config import quantization_of
from llmq.models.loading import Source, blamed_on, folder_of, open_checkpoint, transformers_config

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from llmq.methods import Method
    from llmq.models.config import PlainConfig
    from llmq.models.formats.base import Format

RECORD = "llmq"  # of a config.json that was written here: the method, as people type it


def require_method(source: Source, config: PretrainedConfig | PlainConfig, method: Method) -> None:
    """Raises BadChoice where a checkpoint is quantized and `method` would pass its rounded weights off as its own."""
    settings = quantization_of(config)
    if not settings or (settings.get("load_in_8bit") and method.opens_int8):
        return
    choices = methods_held(source, config)
    if method.stored() in choices:
        return
    kind = "int8" if settings.get("load_in_8bit") else str(settings.get("quant_method"))
    advice = "choose " + (" or ".join(choice.spelled for choice in choices) or "a model in 16 or 32 bit")
    advice = "choose bnb-int8, llm-int8 or int8-weight-only" if kind == "int8" else advice
    raise BadChoice(f"{source.name} holds {kind} weights: {advice}")


def methods_held(source: Source, config: PretrainedConfig | PlainConfig) -> list[Method]:
    """The methods that the layers of a quantized checkpoint may be: the one that wrote it, where it says so."""
    from llmq.methods import parse_method
    from llmq.models.formats import format_of

    if not (found := format_of(quantization_of(config))):
        return []
    with blamed_on(source, "read the quantization"):
        if record := getattr(config, RECORD, None):
            return [parse_method(record["method"])]
        return found.methods(quantization_of(config))


def open_quantized(source: Source, method: Method, device: str) -> PreTrainedModel | None:
    """Return the model with its layers as the checkpoint holds them; None where that is transformers' to do."""
    from llmq.models.formats import format_of
    from llmq.models.skeleton import meta_model

    config = transformers_config(source)
    settings = quantization_of(config)
    found = format_of(settings)
    if not found or not found.mark:
        return None
    if source.edit:
        raise BadChoice(f"{source.name} is quantized: only weights in 16 or 32 bit are edited")
    if are_several(device):
        raise BadChoice(f"{source.name} holds quantized layers, which open on one device: choose such as cuda:0")
    del config.quantization_config
    tensors = CheckpointTensors(folder_of(source), source.name)
    layers = dict(_layers(source, tensors, found, settings, device))
    if not layers:
        raise ModelUnavailable(f"{source.name} is not quantized where its config.json says so")
    arguments = {"config": config, "dtype": method.dtype, "device_map": {"": device}}
    arguments["state_dict"] = dict(_dense(tensors, layers))
    model = open_checkpoint(source, arguments, type(meta_model(config)))
    for name, layer in layers.items():
        layer.bias = model.get_submodule(name).bias
        model.set_submodule(name, layer)
    return model


def _layers(
    source: Source, tensors: CheckpointTensors, found: Format, settings: dict, device: str
) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every quantized layer, on its device."""
    for name in tensors.names():
        layer, _, end = name.rpartition(".")
        if end == found.mark:
            parts = {part: f"{layer}.{part}" for part in found.parts if f"{layer}.{part}" in tensors}
            with blamed_on(source, f"read {layer}"):
                held = {part: tensors.get(full, device) for part, full in parts.items()}
                yield layer, found.read(held, settings)


def _dense(tensors: CheckpointTensors, layers: dict[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a model in 16 bit: what is not quantized as it is, and for the layers weights of their shape
    that take no room, until the layers take their places."""
    import torch

    for name in tensors.names():
        layer, _, end = name.rpartition(".")
        if layer not in layers or end == "bias":
            yield name, tensors.get(name, "cpu")
    for name, layer in layers.items():
        yield f"{name}.weight", torch.zeros(1, dtype=torch.float16).expand(layer.out_features, layer.in_features)
