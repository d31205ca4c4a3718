"""A preset's shape with random weights: right for speed and memory, meaningless as text, and labelled so.

Outliers are planted, because the decomposition's cost depends on them: in every layer six channels of each norm's gain
and of the inputs of the o and down projections are amplified, so that every linear layer sees inputs over 6.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from llmq.models.skeleton import meta_model
from llmq.models.spread import device_of, dispatched

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

OUTLIER_CHANNELS = 6
NORM_GAIN = 30.0  # a norm's output is about N(0, 1) a channel; a planted one about N(0, 30)
VALUE_GAIN = 400.0  # attention averages values over the context, which shrinks a planted one again
GATED_GAIN = 300.0  # SiLU(gate)·up of two N(0, 0.5) is about 0.1
OUTPUT_SPREAD = 0.5  # standard deviation of every linear layer's output, so that few unplanted inputs reach 6


@dataclass(frozen=True)
class RandomTensors:
    """The FP16 weights of a LLaMA of `config`'s shape, by their names in a checkpoint; each drawn from its own seed."""

    config: LlamaConfig
    seed: int = 0

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in meta_model(self.config).named_parameters()}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def get(self, name: str, device: str) -> torch.Tensor:
        """Draw the tensor called `name` on `device`: the same for the same name, seed and kind of device."""
        import torch

        shape = self._shapes[name]
        if len(shape) == 1:
            tensor = torch.ones(shape, dtype=torch.float16, device=device)
        else:
            generator = torch.Generator(device).manual_seed(self.seed + zlib.crc32(name.encode()))
            scale = 1.0 if "embed" in name else _spread(shape[1])
            tensor = torch.empty(shape, dtype=torch.float16, device=device).normal_(0.0, scale, generator=generator)
        self._plant(name, tensor)
        return tensor

    def _plant(self, name: str, tensor: torch.Tensor) -> None:
        """Amplify six rows (channels of what comes out) of the tensors that feed a linear layer."""
        layer = re.search(r"layers\.(\d+)\.", name)
        gain = next((gain for part, gain in _PLANTED.items() if part in name), None)
        if layer and gain:
            first = int(layer[1]) * 31
            tensor[[(first + 97 * k) % self.config.hidden_size % len(tensor) for k in range(OUTLIER_CHANNELS)]] *= gain


_PLANTED = {"layernorm": NORM_GAIN, "v_proj": VALUE_GAIN, "up_proj": GATED_GAIN}


def random_llama(config: LlamaConfig, places: str | dict[str, str], seed: int = 0) -> LlamaForCausalLM:
    """Return an fp16 LLaMA of `config`'s shape with the weights of `RandomTensors`: on one device, or its parts where
    `places` says."""
    from torch import nn

    places = {"": places} if isinstance(places, str) else places
    model, tensors = meta_model(config).half(), RandomTensors(config, seed)
    for name, _ in list(model.named_parameters()):
        owner, _, kept = name.rpartition(".")
        tensor = tensors.get(name, device_of(name, places))
        setattr(model.get_submodule(owner), kept, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    # Buffers (rotary frequencies) are computed, not drawn: the skeleton has none.
    rotary = type(model.model.rotary_emb)(config=config).to(device_of("model.rotary_emb", places))
    model.model.rotary_emb = rotary
    rotary.original_inv_freq = rotary.original_inv_freq.clone()  # a tensor of its own, as in a loaded model
    return dispatched(model.eval(), places) if len(places) > 1 else model.eval()


def _spread(inputs: int) -> float:
    """Of the weights, so that a layer fed N(0, 1) and the planted channels puts out N(0, OUTPUT_SPREAD)."""
    return OUTPUT_SPREAD * (inputs + OUTLIER_CHANNELS * NORM_GAIN**2) ** -0.5
