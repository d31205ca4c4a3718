"""What every method's handler answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llmq.errors import BadChoice

if TYPE_CHECKING:
    import torch
    from torch import nn

DEFAULT_THRESHOLD = 6.0  # LLM.int8() paper, section 3.2; also the default of bitsandbytes through transformers


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model under a method: `weights` counts parameters and buffers, `scales` what is kept beside them."""

    weights: int
    scales: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.scales


class Handler(Protocol):
    """One method's way with weights. `device` is a torch device string such as 'cpu' or 'cuda:0'."""

    has_threshold: bool
    dtype: str  # torch dtype name of embeddings, norms, head and activations
    default_threshold: float | None
    lean_weights: str | None  # 'dense' or 'int8': what the lean loop stores for this method; None: it cannot run it
    int8_head: bool  # whether embedding and head are int8 too
    opens_int8: bool  # whether it can start from a checkpoint of bitsandbytes' int8 weights
    converts: bool  # whether a model loaded with `load_arguments` still has to go through `convert_`

    def arithmetic(self, device: str, loop: str = "hf") -> str:
        """One plain sentence: what is stored in which type, and in which type it is multiplied on this device in this
        loop ('hf' or 'lean')."""

    def check_threshold(self, threshold: float) -> None:
        """Raises BadChoice where there is no threshold to set."""

    def load_arguments(self, device: str) -> dict[str, Any]:
        """Keyword arguments for `AutoModelForCausalLM.from_pretrained`."""

    def convert_(self, model: nn.Module, device: str) -> nn.Module:
        """Turn a dense model already on `device` into this method's, in place (models without a checkpoint). Raises
        BadChoice where there is nothing to convert."""

    def set_threshold(self, model: nn.Module, threshold: float) -> None:
        """Change the outlier threshold of a loaded model; 0 turns the decomposition off."""

    def sixteen_bit_columns(self, module: nn.Module) -> torch.Tensor | None:
        """The columns of the input that `module`, a layer of a model of this method, multiplied in 16 bit in its last
        call, by its own account: int64, ascending, on its device. None for a layer that keeps no such account."""

    def scale_bytes(self, model: nn.Module) -> int:
        """Bytes of quantization scales that are neither parameters nor buffers of `model`."""

    def predict(self, meta_model: nn.Module) -> WeightBytes:
        """Bytes this method will need, from a dense model on the meta device."""


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


def kept_in_fp32(model: nn.Module) -> Callable[[str], object]:
    """Tell by its name whether transformers keeps a parameter of a 16-bit model in FP32: routers and the like."""
    lists = (getattr(model, f"_keep_in_fp32_modules{end}", None) or () for end in ("", "_strict"))
    return re.compile("|".join(name for names in lists for name in names).replace("*", ".*") or "$^").search


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


def replace_linears_(model: nn.Module, make: Callable[[nn.Linear], nn.Module], layers=None) -> None:
    """Put `make(linear)` in the place of each of `layers`, (name, module): by default of all `linear_layers`. Raises
    BadChoice where there is none."""
    layers = list(linear_layers(model) if layers is None else layers)
    if not layers:
        kinds = sorted(
            {type(m).__name__ for m in model.modules() if next(m.parameters(recurse=False), None) is not None}
        )
        raise BadChoice(f"{type(model).__name__} keeps its weights in {', '.join(kinds)}: no linear layer to replace")
    for name, layer in layers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(_as_linear(layer)))


def _as_linear(layer: nn.Module) -> nn.Linear:
    from torch import nn

    if not is_conv1d(layer):
        return layer
    linear = nn.Linear(*layer.weight.shape, device="meta")
    linear.weight, linear.bias = nn.Parameter(layer.weight.data.t().contiguous(), requires_grad=False), layer.bias
    return linear


def int8_bytes(meta_model: nn.Module, *, head: bool = False, int8_size: int = 1, other_size: int = 2) -> WeightBytes:
    """`int8_size` bytes a weight of `linear_layers`, with `head` of embedding and head too, and an FP32 scale a row;
    `other_size` bytes for every other parameter."""
    layers = [module for _, module in linear_layers(meta_model)]
    if head:
        layers += [meta_model.get_input_embeddings(), meta_model.get_output_embeddings()]
    int8 = {id(layer.weight): layer for layer in layers}
    weights = sum(
        tensor.numel() * (int8_size if id(tensor) in int8 else other_size) if tensor.requires_grad else tensor.nbytes
        for tensor in stored_tensors(meta_model)
    )
    return WeightBytes(weights, sum(4 * layer.weight.shape[is_conv1d(layer)] for layer in int8.values()))
