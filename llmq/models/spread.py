"""One model over the memory of several GPUs: whole layers on each, one after the other, by accelerate's hooks.

A step then visits the GPUs in turn, so several hold more than one and compute no faster; more speed is tensor
parallelism's (`llmq.bench.tensor_parallel`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmq.devices import are_several, parts
from llmq.models.skeleton import meta_model

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


def device_map(config: PretrainedConfig, device: str) -> dict[str, str]:
    """Return the device of every part of a model of `config`: {"": device} for a single one, else even shares of the
    weights, in the model's order and without parting a layer."""
    return even_shares(meta_model(config), device) if are_several(device) else {"": device}


def even_shares(model: nn.Module, device: str) -> dict[str, str]:
    """Return the same for a model on the meta device. A part is where its middle byte falls; a tied head is with its
    embedding. accelerate's own map reserves room on the first GPU for parts that would be brought in from a CPU, which
    gave it 2 of 8 layers."""
    devices, places, before, seen = parts(device), {}, 0, {}
    total = sum(tensor.nbytes for tensor in model.parameters())
    for name, part in _whole_parts(model):
        own = {id(tensor): tensor.nbytes for tensor in part.parameters()}
        tied = next((seen[tensor] for tensor in own if tensor in seen), None)
        middle = before + sum(own.values()) / 2
        places[name] = tied or devices[min(int(middle / total * len(devices)), len(devices) - 1)]
        before += 0 if tied else sum(own.values())
        seen |= dict.fromkeys(own, places[name])
    return places


def _whole_parts(model: nn.Module, name: str = "", kept: frozenset = frozenset()) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of what stays on one device: layers, and what lies beside them."""
    kept = kept or frozenset(model._no_split_modules)
    for child, module in model.named_children():
        path = f"{name}.{child}" if name else child
        if type(module).__name__ in kept or not any(True for _ in module.children()):
            yield path, module
        else:
            yield from _whole_parts(module, path, kept)


def dispatched(model: PreTrainedModel, places: dict[str, str]) -> PreTrainedModel:
    """Return `model`, whose weights lie where `places` says, with accelerate's hooks, which carry what is computed from
    one device to the next."""
    from accelerate import dispatch_model

    return dispatch_model(model, device_map=places, force_hooks=True)


def device_of(name: str, places: dict[str, str]) -> str:
    """Return where the tensor called `name` belongs: the place of the longest part that it is in."""
    inside = [part for part in places if not part or name == part or name.startswith(f"{part}.")]
    return places[max(inside, key=len)]
