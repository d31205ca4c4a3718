"""Factors folded into what comes before: the layers behind one norm share theirs, and the norm is divided by them.

Then no input is divided when the model runs, and a checkpoint needs no place for factors. As the papers of AWQ and
SmoothQuant do it, with the output projections as AWQ's: theirs go into the rows of the layer before, where each of its
outputs is one of their inputs. The model in 16 bit stays the same, which is tried on a few tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

from llmq.errors import BadChoice
from llmq.fields import Switch

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llmq.methods.base import Method

FOLDED = Annotated[bool, Switch(help="Layers behind one norm share their factors, which are folded into it.")]
BEHIND = {  # of a decoder layer: what is divided, and what is multiplied
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "mlp.up_proj": ("mlp.down_proj",),
}
TRIED = 16  # tokens
TOLERANCE = 0.1  # of the logits' standard deviation, root mean square; FP16 loses 0.015 of the demo model's


def fold_(model: nn.Module, method: Method, statistics: Mapping[str, torch.Tensor]) -> None:
    """Fold the factors that `method` finds with the `statistics` of the layers' inputs into `model`, in place. Raises
    BadChoice for a model that is no LLaMA in this."""
    before = _logits(model)
    folded = list(_pairs(model, statistics))
    for divided, layers, found in folded:
        factors = _factors(method, layers, found)
        _divide_(divided, factors)
        for layer in layers:
            layer.weight.data = (layer.weight.data.float() * factors).to(layer.weight.dtype)
    lost = (_logits(model) - before).square().mean().sqrt()
    if not folded or not lost <= TOLERANCE * before.std():
        raise BadChoice(f"{type(model).__name__} has its norms elsewhere than a LLaMA: choose {method.name} unfolded")


def _pairs(model: nn.Module, statistics: Mapping) -> Iterator[tuple[nn.Module, list[nn.Module], torch.Tensor]]:
    """What is divided, the layers behind it, and the statistics of their input."""
    modules = dict(model.named_modules())
    for block in (name.removesuffix(".self_attn.q_proj") for name in modules if name.endswith(".self_attn.q_proj")):
        for first, behind in BEHIND.items():
            names = [f"{block}.{name}" for name in behind]
            if f"{block}.{first}" in modules and modules.keys() >= {*names}:
                divided, layers = modules[f"{block}.{first}"], [modules[name] for name in names]
                if len(divided.weight) == layers[0].in_features:  # not where heads share values
                    yield divided, layers, statistics[names[0]]


def _factors(method: Method, layers: list[nn.Module], statistics: torch.Tensor) -> torch.Tensor:
    """What the method finds for the layers as if they were one, float32 (in,)."""
    import torch
    from torch import nn

    weight = torch.cat([layer.weight.data for layer in layers])
    stacked = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    stacked.weight = nn.Parameter(weight, requires_grad=False)
    return method.quantize(stacked, statistics).factors.float()


def _divide_(module: nn.Module, factors: torch.Tensor) -> None:
    """Divide the outputs of a norm or a linear layer."""
    for parameter in module.parameters(recurse=False):
        divisors = factors.view(-1, *[1] * (parameter.ndim - 1))
        parameter.data = (parameter.data.float() / divisors).to(parameter.dtype)


def _logits(model: nn.Module) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        ids = torch.arange(TRIED, device=next(model.parameters()).device)[None]
        return model(ids, use_cache=False).logits.float()
