"""Weights changed on their way out of a checkpoint, by name: so every loop and every method sees the same other model.

The edits speak of channels of the residual stream, as the linear layers behind a norm read them: q, k and v behind the
first norm of a layer, gate and up behind the second. Names are LLaMA's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from llmq.errors import BadChoice

if TYPE_CHECKING:
    import torch

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
READERS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up"))
ENDS = ("embed_tokens.weight", "lm_head.weight", ".norm.weight")
WRITERS = tuple(f"{name}_proj.{part}" for name in ("o", "down") for part in ("weight", "bias"))
LARGEST_FACTOR = 64.0


class Edit(Protocol):
    """A frozen record, equal where the edited models are equal. `channels`: which of the residual stream it touches."""

    channels: tuple[int, ...]

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor called `name` after the edit: a new one where it changes."""


@dataclass(frozen=True)
class Amplify:
    """Scale channels of every norm's weight by `factor` and divide the columns that read them by it: in exact
    arithmetic the same model, with activations `factor` times as large in those channels.

    SmoothQuant (Xiao et al. 2023, arXiv 2211.10438, equation 3) run backwards: it moves range from the activations into
    the weights, this from the weights into the activations.
    """

    channels: tuple[int, ...]
    factor: float

    def __post_init__(self):
        if not (isinstance(self.factor, int | float) and 1 <= self.factor <= LARGEST_FACTOR):
            raise BadChoice(f"factor is {self.factor!r}; choose a number from 1 to {LARGEST_FACTOR:g}")

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(NORMS):
            return _scaled(tensor, self.channels, self.factor)
        return _scaled(tensor, self.channels, 1 / self.factor) if name.endswith(READERS) else tensor


@dataclass(frozen=True)
class Silence:
    """Zero the columns that read these channels: the linear layers behind a norm see 0 there, in every layer."""

    channels: tuple[int, ...]

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return _scaled(tensor, self.channels, 0.0) if name.endswith(READERS) else tensor


@dataclass(frozen=True)
class Reorder:
    """Put the channels in another order, in every weight that reads or writes them: in exact arithmetic the same model,
    with every sum over channels added up in another order. What it changes is rounding and nothing else.

    `channels`: the old place of each new channel.
    """

    channels: tuple[int, ...]

    @classmethod
    def shuffled(cls, width: int, seed: int = 0) -> Reorder:
        """A random order of `width` channels."""
        return cls(tuple(random.Random(seed).sample(range(width), width)))

    def __call__(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith(WRITERS):
            return tensor[list(self.channels)].contiguous()
        return tensor[..., list(self.channels)].contiguous() if name.endswith((*NORMS, *READERS, *ENDS)) else tensor


def require_channels(channels: tuple[int, ...], width: int) -> None:
    """Raises BadChoice for a channel that a stream of `width` channels does not have."""
    for channel in channels:
        if isinstance(channel, bool) or not isinstance(channel, int) or not 0 <= channel < width:
            raise BadChoice(f"channel is {channel!r}; choose whole numbers from 0 to {width - 1}")


def _scaled(tensor: torch.Tensor, channels: tuple[int, ...], factor: float) -> torch.Tensor:
    if not channels or factor == 1:
        return tensor
    require_channels(channels, tensor.shape[-1])
    if not tensor.is_floating_point():
        raise BadChoice("weights that are int8 already cannot be edited; choose a checkpoint in 16 or 32 bit")
    changed = tensor.clone()
    changed[..., list(channels)] *= factor
    return changed


class EditedTensors:
    """A source of tensors (`checkpoint.CheckpointTensors`, say) behind an edit."""

    def __init__(self, source, edit: Edit):
        self._source, self._edit = source, edit

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def get(self, name: str, device: str) -> torch.Tensor:
        return self._edit(name, self._source.get(name, device))


def edit_model_(model, edit: Edit):
    """Edit a dense transformers model in place, and return it. Raises BadChoice where no weight has a LLaMA's name."""
    if not any(name.endswith((*NORMS, *READERS)) for name, _ in model.named_parameters()):
        raise BadChoice("the edit needs a LLaMA's layers; this model names none of its weights like them")
    for name, parameter in model.named_parameters():
        parameter.data = edit(name, parameter.data)
    return model
